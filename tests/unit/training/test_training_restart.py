"""What a worker group that torchrun started again loads."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from megatron_sip.checkpoint.latest import LATEST, candidates, checkpoint_folder
from megatron_sip.checkpoint.manifest import (
    BACKENDS,
    COMMON,
    FORMAT_VERSION,
    RUN_CONFIG,
    Manifest,
    file_entry,
    write_manifest,
)
from megatron_sip.checkpoint.restricted import METADATA
from megatron_sip.config.groups import CheckpointConfig, Config, ModelConfig
from megatron_sip.config.run_config import save_run_config
from megatron_sip.errors import CheckpointError
from megatron_sip.training import restart
from megatron_sip.training.restart import Start, continued, note_found

RESOLVED = ModelConfig(num_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=2)
LONG_AGO = 1.5e9


def save(root: Path, iteration: int, written: float) -> Path:
    """A small checkpoint, and its name in the latest file."""
    folder = checkpoint_folder(root, iteration)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (METADATA, COMMON, BACKENDS, "__0_0.distcp"):
        (folder / name).write_bytes(b"something")
    save_run_config(Config(model=RESOLVED), folder / RUN_CONFIG)
    files = {path.name: file_entry(path) for path in folder.iterdir() if path.name != "manifest.json"}
    write_manifest(folder, Manifest(FORMAT_VERSION, iteration, files, written))
    (root / LATEST).write_text(f"{iteration}\n")
    return folder


@pytest.fixture(params=["note", "no note"])
def config(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A run with a base to begin with, at the second start; the launch's own store is there, or is gone."""
    store = dist.HashStore() if request.param == "note" else None
    monkeypatch.setattr(restart, "launch_store", lambda: store)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    return Config(checkpoint=CheckpointConfig(save=str(tmp_path / "saved"), load="/models/base", finetune=True))


@pytest.fixture
def root(config: Config) -> Path:
    return Path(str(config.checkpoint.save))


def begin(config: Config) -> None:
    """The first start of the ranks comes to its note."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
        note_found(config)


def now() -> float:
    """A time within this launch, by the clock of its host."""
    return psutil.Process(os.getppid()).create_time() + 60


def test_a_later_start_goes_on_from_what_its_launch_saved(config: Config, root: Path) -> None:
    begin(config)
    save(root, 20, now())
    said: list[str] = []
    again = continued(config, said.append).config
    assert again.checkpoint == replace(config.checkpoint, load=str(root), finetune=False)
    assert again.model == RESOLVED
    assert replace(again, model=config.model, checkpoint=config.checkpoint) == config
    assert said == [f"restart 1 of the ranks: this launch saved iteration 20 in {root}, so they go on from there"]


def test_a_checkpoint_of_an_earlier_launch_is_none_of_ours(config: Config, root: Path) -> None:
    save(root, 20, LONG_AGO)
    begin(config)
    said: list[str] = []
    assert continued(config, said.append) == Start(config)
    assert said == [f"restart 1 of the ranks: this launch saved nothing in {root} yet, so they begin as at first"]


def test_the_same_iteration_may_be_saved_by_an_earlier_launch_and_by_this_one(config: Config, root: Path) -> None:
    save(root, 20, LONG_AGO)
    begin(config)
    save(root, 20, now())
    assert continued(config, print).config.model == RESOLVED


def test_the_first_note_stays(config: Config, root: Path) -> None:
    """Each start notes; what the launch itself saved in between must not count as found."""
    begin(config)
    save(root, 20, now())
    note_found(config)
    assert continued(config, print).config.checkpoint.load == str(root)


@pytest.mark.parametrize("config", ["note"], indirect=True)
def test_a_store_that_was_lost_on_the_way_forgets_nothing(
    config: Config, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later start notes in the new one what is of an earlier run, not what is of its own launch."""
    save(root, 10, LONG_AGO)
    begin(config)
    save(root, 20, now())
    store = dist.HashStore()
    monkeypatch.setattr(restart, "launch_store", lambda: store)
    for start in ("2", "3"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", start)
        assert continued(config, print).config.checkpoint.load == str(root)
        note_found(config)


@pytest.mark.parametrize("config", ["note"], indirect=True)
@pytest.mark.parametrize("skew", [-7200.0, 7200.0])
def test_no_clock_has_a_say(config: Config, root: Path, skew: float) -> None:
    """That of a file server, in the times of files, nor that of a rank's host, in manifests."""
    save(root, 10, now() + 3600)
    begin(config)
    assert continued(config, print) == Start(config)
    save(root, 20, now() + skew)
    os.utime(root / LATEST, (LONG_AGO, LONG_AGO))
    assert continued(config, print).config.checkpoint.load == str(root)


@pytest.mark.parametrize("harm", ["latest", "files", "manifest"])
def test_damage_of_an_earlier_run_is_no_matter_of_ours(config: Config, root: Path, harm: str) -> None:
    folder = save(root, 20, LONG_AGO)
    if harm == "latest":
        (root / LATEST).write_text("twenty\n")
    elif harm == "files":
        (folder / COMMON).unlink()
    else:
        (folder / "manifest.json").write_text("{")
    begin(config)
    assert continued(config, print) == Start(config)


def test_a_damaged_one_is_passed_over(config: Config, root: Path) -> None:
    begin(config)
    save(root, 20, now())
    (save(root, 30, now()) / RUN_CONFIG).unlink()
    said: list[str] = []
    assert continued(config, said.append).config.model == RESOLVED
    assert "iter_0000030 is damaged: run_config.yaml is missing" in said[0]
    assert "saved iteration 20" in said[1]


def test_with_all_its_own_damaged_it_does_not_begin_anew(config: Config, root: Path) -> None:
    begin(config)
    (save(root, 20, now()) / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"iter_0000020 is damaged: __0_0.distcp is missing.*no whole checkpoint"):
        continued(config, print)


def test_only_what_this_launch_saved_may_be_loaded(config: Config, root: Path) -> None:
    """An earlier run's 50 is named until the first save is done; its 10 stood there before."""
    save(root, 10, LONG_AGO)
    save(root, 50, LONG_AGO + 1)
    begin(config)
    save(root, 20, now())
    (root / LATEST).write_text("50\n")
    again = continued(config, print)
    assert (again.named, again.among) == (20, {20})
    assert again.behind(20) == {20}
    assert candidates(root, again.named, again.among) == [20]


def test_what_it_was_told_to_go_on_from_may_be_loaded_too(config: Config, root: Path) -> None:
    """The command line names the folder of --save itself: what stood there led here."""
    own = Config(checkpoint=replace(config.checkpoint, load=str(root), finetune=False))
    save(root, 0, LONG_AGO)
    save(root, 10, LONG_AGO + 1)
    assert Start(own).behind(10) == {10}
    begin(own)
    said: list[str] = []
    folder = save(root, 20, now())
    again = continued(own, said.append)
    assert (again.named, again.among) == (20, None)
    assert again.behind(20) == {20, 10}
    (folder / "__0_0.distcp").unlink()
    assert continued(own, said.append).named == 10
    assert "this launch saved iteration 20" in said[0]
    assert said[-1] == f"restart 1 of the ranks: this launch found iteration 10 in {root}, so they go on from there"
    for elsewhere in (config, Config(checkpoint=replace(own.checkpoint, load=None))):
        assert Start(elsewhere).behind(10) == set()
    assert Start(own).behind(0) == set()


def test_the_bytes_of_the_data_are_left_to_all_ranks(config: Config, root: Path) -> None:
    """One rank alone would take long over them, and the load compares them anyway."""
    begin(config)
    file = save(root, 20, now()) / "__0_0.distcp"
    file.write_bytes(b"s0mething")
    assert continued(config, print).config.model == RESOLVED


def test_one_that_a_killed_save_moved_away_is_put_back(config: Config, root: Path) -> None:
    begin(config)
    folder = save(root, 20, now())
    folder.rename(folder.with_name(f"{folder.name}.replaced"))
    assert continued(config, print).config.model == RESOLVED


def test_a_kill_before_the_first_latest_file_loses_nothing(config: Config, root: Path) -> None:
    begin(config)
    save(root, 20, now())
    (root / LATEST).unlink()
    said: list[str] = []
    assert continued(config, said.append).config.model == RESOLVED
    assert f"{root / LATEST} is missing" in said[0]


def test_the_first_start_does_as_it_is_told(config: Config, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(root, 20, now())
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert continued(config, pytest.fail) == Start(config)


@pytest.mark.parametrize("config", ["note"], indirect=True)
def test_a_start_that_torchrun_does_not_count_goes_on_too(
    config: Config, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that comes or leaves makes torchrun start the ranks of the others anew, and is no retry to it."""
    begin(config)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    said: list[str] = []
    assert continued(config, said.append) == Start(config)
    save(root, 20, now())
    note_found(config)
    assert continued(config, said.append).config.checkpoint.load == str(root)
    assert said == [
        f"a new start of the ranks: this launch saved nothing in {root} yet, so they begin as at first",
        f"a new start of the ranks: this launch saved iteration 20 in {root}, so they go on from there",
    ]


def test_a_launch_that_saved_nothing_yet_begins_as_before(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    for checkpoint in (CheckpointConfig(), config.checkpoint):
        own = Config(checkpoint=checkpoint)
        begin(own)
        assert continued(own, print) == Start(own)
