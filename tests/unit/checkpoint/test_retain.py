"""Which checkpoints stay, and that a killed run leaves none without a name."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sip.checkpoint import retain
from megatron_sip.checkpoint.latest import checkpoint_folder, saved_iterations
from megatron_sip.checkpoint.retain import clean, remove, surplus


@pytest.mark.parametrize(
    ("keep_last_n", "retain_interval", "goes"),
    [
        (None, None, []),
        (1, None, [10, 20, 30, 40]),
        (2, None, [10, 20, 30]),
        (9, None, []),
        (None, 20, [10, 30]),
        (2, 20, [10, 30]),
        (1, 30, [10, 20, 40]),
        (3, 1000, [10, 20]),
    ],
)
def test_rules(keep_last_n: int | None, retain_interval: int | None, goes: list[int]) -> None:
    found = surplus([10, 20, 30, 40, 50], 50, keep_last_n=keep_last_n, retain_interval=retain_interval)
    assert found == goes


def test_what_lies_beyond_the_newest_is_of_another_history() -> None:
    """A run that went back to 20 and saved 30 anew leaves 40 and 50 alone, and does not count them."""
    assert surplus([10, 20, 30, 40, 50], 30, keep_last_n=2, retain_interval=None) == [10]


def test_the_newest_are_those_that_were_written_last() -> None:
    """20 was written, then the run went back to 10 and came by 15."""
    assert surplus([10, 20, 15, 25], 25, keep_last_n=2, retain_interval=None) == [10, 20]


def test_the_newest_stays_though_it_is_not_listed() -> None:
    assert surplus([10, 20], 30, keep_last_n=1, retain_interval=None) == [10]


def make(root: Path, *names: str) -> None:
    for name in names:
        (root / name).mkdir()
        (root / name / "file").write_text(name)


def names(root: Path) -> list[str]:
    return sorted(entry.name for entry in root.iterdir())


def test_removal(tmp_path: Path) -> None:
    make(tmp_path, "iter_0000010", "iter_0000010.deleted", "iter_0000020", "iter_0000030", "other")
    (tmp_path / "iter_0000040").symlink_to(tmp_path / "other")
    assert saved_iterations(tmp_path) == [10, 20, 30]
    remove(tmp_path, [10, 20])
    assert names(tmp_path) == ["iter_0000030", "iter_0000040", "other"]
    assert (tmp_path / "other" / "file").exists()


def test_a_removal_that_is_cut_short_leaves_no_half_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "iter_0000010", "iter_0000020")

    def killed(_path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(retain.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove(tmp_path, [10])
    monkeypatch.undo()
    assert saved_iterations(tmp_path) == [20]
    clean(tmp_path)
    assert names(tmp_path) == ["iter_0000020"]


def test_cleaning_up_after_a_killed_run(tmp_path: Path) -> None:
    make(tmp_path, "iter_0000010", "iter_0000010.replaced", "iter_0000020.replaced", "iter_0000030.incomplete")
    make(tmp_path, "iter_0000005.deleted", "my.incomplete", "iter_0000040.bak")
    done = clean(tmp_path)
    # 20 was moved away for a successor that never got its name; 10 has its successor.
    assert names(tmp_path) == ["iter_0000010", "iter_0000020", "iter_0000040.bak", "my.incomplete"]
    assert (checkpoint_folder(tmp_path, 10) / "file").read_text() == "iter_0000010"
    assert (checkpoint_folder(tmp_path, 20) / "file").read_text() == "iter_0000020.replaced"
    assert len(done) == 2
    assert any("iter_0000030.incomplete" in line for line in done)
    assert clean(tmp_path) == []
