"""Whole checkpoints, damaged ones, and which of them is taken."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron_sip.checkpoint import manifest as manifest_module
from megatron_sip.checkpoint.latest import (
    LATEST,
    candidates,
    checkpoint_folder,
    iteration_of,
    latest_iteration,
    newest_whole,
    saved_iterations,
    whole_problem,
)
from megatron_sip.checkpoint.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    FileEntry,
    Manifest,
    file_entry,
    read_manifest,
    require_bytes,
    share,
    write_manifest,
)
from megatron_sip.errors import CheckpointError


def make(root: Path, iteration: int, *, manifest: bool = True, written: float | None = None) -> Path:
    """A small checkpoint with all of its files."""
    folder = checkpoint_folder(root, iteration)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"weight": torch.full((50, 4), float(iteration))}, checkpoint_id=folder, no_dist=True)
    torch.save({"iteration": iteration}, folder / "common.pt")
    (folder / "metadata.json").write_text("{}")
    (folder / "run_config.yaml").write_text("model: {}\n")
    if manifest:
        files = {path.name: file_entry(path) for path in folder.iterdir()}
        write_manifest(folder, Manifest(FORMAT_VERSION, iteration, files, written or iteration))
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Checkpoints of iterations 2, 4 and 6; the last one is named."""
    for iteration in (2, 4, 6):
        make(tmp_path, iteration)
    (tmp_path / LATEST).write_text("6\n")
    return tmp_path


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


FILES = ("__0_0.distcp", ".metadata", "common.pt", "metadata.json", "run_config.yaml")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (Path.unlink, "is missing"),
        (cut, "bytes where it should have"),
        (grow, "bytes where it should have"),
        (flip, "has changed since it was written"),
    ],
)
def test_every_harm_to_every_file_is_seen(root: Path, file: str, harm: Callable[[Path], None], says: str) -> None:
    folder = checkpoint_folder(root, 6)
    assert whole_problem(folder) is None
    harm(folder / file)
    problem = whole_problem(folder)
    assert problem is not None
    assert problem.startswith(file)
    assert says in problem


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format_version": 1}', '{"format_version": 1, "files": {"a": 3}}'])
def test_a_damaged_manifest_is_no_whole_checkpoint(root: Path, text: str) -> None:
    (checkpoint_folder(root, 6) / MANIFEST).write_text(text)
    assert "manifest.json cannot be read" in str(whole_problem(checkpoint_folder(root, 6)))


def test_a_manifest_names_files_of_its_folder_alone(root: Path) -> None:
    manifest = Manifest(FORMAT_VERSION, 6, {"../secret": FileEntry(1, 0)})
    write_manifest(checkpoint_folder(root, 6), manifest)
    assert "is no file of the folder" in str(whole_problem(checkpoint_folder(root, 6)))


def test_a_file_name_with_a_nul_is_damage(root: Path) -> None:
    """The system's calls would refuse it with an error of another kind."""
    path = checkpoint_folder(root, 6) / MANIFEST
    described = json.loads(path.read_text())
    described["files"]["a\0b"] = {"bytes": 1, "crc32": "00000000"}
    path.write_text(json.dumps(described))
    assert "is no file of the folder" in str(whole_problem(path.parent))


@pytest.mark.parametrize("left_out", [FILES[1:], *((name,) for name in FILES[1:])])
def test_a_manifest_that_leaves_files_out_tells_nothing(root: Path, left_out: tuple[str, ...]) -> None:
    folder = checkpoint_folder(root, 6)
    manifest = read_manifest(folder)
    kept = {name: entry for name, entry in manifest.files.items() if name not in left_out}
    write_manifest(folder, replace(manifest, files=kept))
    assert whole_problem(folder) == f"manifest.json does not list {left_out[0]}"
    write_manifest(folder, replace(manifest, files={}))
    assert whole_problem(folder) == "manifest.json does not list .metadata"


def test_a_checkpoint_under_another_name_is_not_taken_for_that_iteration(root: Path) -> None:
    checkpoint_folder(root, 4).rename(checkpoint_folder(root, 8))
    assert whole_problem(checkpoint_folder(root, 8)) == "manifest.json is that of iteration 4"
    (root / LATEST).write_text("8\n")
    assert newest_whole(root, lambda _: None) == 6


@pytest.mark.parametrize("file", FILES)
def test_without_a_manifest_the_metadata_tell(tmp_path: Path, file: str) -> None:
    """As written by the first versions."""
    folder = make(tmp_path, 3, manifest=False)
    assert whole_problem(folder) is None
    (folder / file).unlink()
    assert f"{file} is missing" in str(whole_problem(folder))


def test_without_a_manifest_a_short_data_file_is_seen(tmp_path: Path) -> None:
    folder = make(tmp_path, 3, manifest=False)
    cut(folder / "__0_0.distcp")
    assert "__0_0.distcp has" in str(whole_problem(folder))


def test_the_newest_whole_one_is_taken_and_the_others_are_named(root: Path) -> None:
    said: list[str] = []
    assert newest_whole(root, said.append) == 6
    assert said == []
    cut(checkpoint_folder(root, 6) / "common.pt")
    flip(checkpoint_folder(root, 4) / "__0_0.distcp")
    assert newest_whole(root, said.append) == 2
    [warning] = said
    assert warning.startswith("WARNING: ")
    for iteration in (6, 4):
        assert f"{checkpoint_folder(root, iteration)} is damaged" in warning
    assert f"taking {checkpoint_folder(root, 2)}" in warning


def test_a_folder_that_is_gone_is_passed_over(root: Path) -> None:
    (root / LATEST).write_text("8\n")
    said: list[str] = []
    assert newest_whole(root, said.append) == 6
    assert "iter_0000008 is damaged: the folder is missing" in said[0]
    with pytest.raises(CheckpointError, match="names iteration 8"):
        latest_iteration(root)


def test_with_none_left_all_are_named(root: Path) -> None:
    for iteration in (2, 4, 6):
        (checkpoint_folder(root, iteration) / "common.pt").unlink()
    with pytest.raises(CheckpointError, match=r"iter_0000006 is damaged.*iter_0000002 is damaged.*no whole checkpoint"):
        newest_whole(root, print)


def test_a_long_check_tells_of_its_progress(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_module, "_CHUNK", 100)
    folder, told = checkpoint_folder(root, 6), []
    size = (folder / "__0_0.distcp").stat().st_size
    require_bytes(folder, read_manifest(folder), ["__0_0.distcp"], lambda: told.append(None))
    assert len(told) == -(-size // 100) > 5


def test_a_rollback_begins_with_its_own_checkpoint_whatever_is_named(root: Path) -> None:
    assert candidates(root, 4) == [4, 2]
    (root / LATEST).write_text("six\n")
    assert candidates(root, 4) == [4, 2]


def test_those_of_an_earlier_run_are_left_alone_whatever_is_named(root: Path) -> None:
    assert candidates(root, among={2, 4}) == [4, 2]
    assert candidates(root, 4, among={4, 6}) == [4]
    assert candidates(root, among={2, 6}) == [6, 2]
    assert candidates(root, among=()) == []


def test_an_earlier_number_in_the_latest_file_is_obeyed(root: Path) -> None:
    (root / LATEST).write_text("4\n")
    assert candidates(root) == [4, 2]
    (checkpoint_folder(root, 4) / "common.pt").unlink()
    assert newest_whole(root, lambda _: None) == 2


def test_what_a_run_went_back_behind_is_not_taken(root: Path) -> None:
    """From 2 on anew, after 4 and 6: those are of another history, whatever became of 5 and 7."""
    for iteration, written in ((3, 8.0), (5, 9.0), (7, 10.0)):
        make(root, iteration, written=written)
    (root / LATEST).write_text("7\n")
    assert candidates(root) == [7, 5, 3, 2]


def test_what_was_written_behind_the_named_one_is_not_taken(root: Path) -> None:
    """The run went back to 2 and on to 3; then the user wanted 6 again: 3 does not lead there, and 4 does."""
    make(root, 3, written=9.0)
    assert candidates(root) == [6, 4, 2]
    cut(checkpoint_folder(root, 6) / "common.pt")
    assert newest_whole(root, lambda _: None) == 4
    # Without its own time, it cannot be told what was before it: by the number then.
    (checkpoint_folder(root, 6) / MANIFEST).write_text("{")
    assert candidates(root) == [6, 3, 2]


def test_checkpoints_without_a_time_come_last(root: Path) -> None:
    for iteration in (1, 3):
        make(root, iteration, manifest=False)
    assert saved_iterations(root) == [1, 3, 2, 4, 6]
    assert candidates(root) == [6, 4, 2, 1]


def test_without_the_latest_file_the_last_one_written_is_taken(root: Path) -> None:
    (root / LATEST).unlink()
    assert candidates(root) == [6, 4, 2]
    said: list[str] = []
    assert newest_whole(root, said.append) == 6
    [warning] = said
    assert warning.startswith(f"WARNING: {root / LATEST} is missing; taking {checkpoint_folder(root, 6)}")
    cut(checkpoint_folder(root, 6) / "common.pt")
    assert newest_whole(root, said.append) == 4
    assert f"{root / LATEST} is missing; {checkpoint_folder(root, 6)} is damaged" in said[1]
    make(root, 3, written=9.0)  # the run had gone back to 2
    assert candidates(root) == [3, 2]


def test_without_the_latest_file_and_a_whole_checkpoint_nothing_begins_anew(root: Path) -> None:
    (root / LATEST).unlink()
    for iteration in (2, 4, 6):
        cut(checkpoint_folder(root, iteration) / "common.pt")
    said = r"latest_checkpointed_iteration.txt is missing; .*iter_0000006 is damaged.*no whole checkpoint is left"
    with pytest.raises(CheckpointError, match=said):
        newest_whole(root, print)


def test_an_interrupted_save_is_no_checkpoint(tmp_path: Path) -> None:
    for name in ("iter_0000002.incomplete", "iter_0000004.deleted"):
        (tmp_path / name).mkdir()
    assert candidates(tmp_path) == []
    assert newest_whole(tmp_path, print) is None


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert newest_whole(tmp_path / "nowhere", print) is None
    assert newest_whole(tmp_path, print) is None


def test_a_damaged_latest_file_is_an_error(root: Path) -> None:
    (root / LATEST).write_text("six\n")
    with pytest.raises(CheckpointError, match="holds 'six', not an iteration"):
        newest_whole(root, print)


def test_a_newer_format_stops_the_search_and_changes_nothing(root: Path) -> None:
    path = checkpoint_folder(root, 6) / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": FORMAT_VERSION + 1}))
    before = {file: file.read_bytes() for file in root.rglob("*") if file.is_file()}
    with pytest.raises(CheckpointError, match="of a newer megatron_sip"):
        newest_whole(root, print)
    assert {file: file.read_bytes() for file in root.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize(
    ("name", "iteration"),
    [
        ("iter_0000006", 6),
        ("iter_12345678", 12345678),
        ("iter_00000006", None),
        ("iter_6", None),
        ("iter_0000006.incomplete", None),
        ("iter_0000006.replaced", None),
        ("audit.jsonl", None),
    ],
)
def test_names_of_folders(name: str, iteration: int | None) -> None:
    assert iteration_of(Path("save") / name) == iteration


def test_the_ranks_share_all_files() -> None:
    files = {f"__{rank}_0.distcp": FileEntry(100 + rank, 0) for rank in range(7)}
    manifest = Manifest(FORMAT_VERSION, 1, files | {".metadata": FileEntry(5, 0)})
    shares = [list(share(manifest, rank, 3)) for rank in range(3)]
    assert sorted(name for names in shares for name in names) == sorted(manifest.files)
    loads = [sum(manifest.files[name].size for name in names) for names in shares]
    assert max(loads) - min(loads) <= 106


def test_a_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    manifest = Manifest(FORMAT_VERSION, 9, {"a": FileEntry(3, 0xBADCAFE), "b": FileEntry(0, 0)}, 17.5)
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
