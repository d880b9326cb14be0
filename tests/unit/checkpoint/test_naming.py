"""Killed at any instant of naming and retention, a run finds a whole checkpoint again, and the newest that it can."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_sip.checkpoint.latest import LATEST, candidates, checkpoint_folder, newest_whole, saved_iterations
from megatron_sip.checkpoint.manifest import (
    BACKENDS,
    COMMON,
    FORMAT_VERSION,
    MANIFEST,
    RUN_CONFIG,
    FileEntry,
    Manifest,
    file_entry,
    write_manifest,
)
from megatron_sip.checkpoint.naming import give_name, incomplete_folder, retire
from megatron_sip.checkpoint.publish import Written, publish
from megatron_sip.checkpoint.restricted import METADATA
from megatron_sip.checkpoint.retain import clean
from megatron_sip.config.groups import CheckpointConfig, Config


class KilledError(BaseException):
    """As SIGKILL: nothing of ours catches it."""


class Killer:
    """Ends the process, so to say, before the n-th change to the disk; a removal may be killed half-way."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
        self.at, self.count = at, 0
        for owner, name in ((Path, "rename"), (Path, "replace"), (Path, "open"), (os, "fsync")):
            monkeypatch.setattr(owner, name, self._counted(getattr(owner, name)))
        monkeypatch.setattr(shutil, "rmtree", self._rmtree)

    def _tick(self) -> None:
        self.count += 1
        if self.count == self.at:
            raise KilledError

    def _counted(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def change(*args: Any, **kwargs: Any) -> Any:
            self._tick()
            return real(*args, **kwargs)

        return change

    def _rmtree(self, folder: Path) -> None:
        self._tick()
        for file in sorted(folder.iterdir()):
            file.unlink()
            self._tick()
        folder.rmdir()


def write(folder: Path, iteration: int, mark: str) -> None:
    folder.mkdir(parents=True)
    (folder / "data").write_text(f"{mark} of {iteration}")
    for own in (METADATA, COMMON, BACKENDS, RUN_CONFIG):
        (folder / own).touch()
    write_manifest(folder, Manifest(FORMAT_VERSION, iteration, files_of(folder)))


def files_of(folder: Path) -> dict[str, FileEntry]:
    return {path.name: file_entry(path) for path in folder.iterdir() if path.name != MANIFEST}


def name(root: Path, iteration: int, mark: str, rule: CheckpointConfig) -> None:
    write(incomplete_folder(root, iteration), iteration, mark)
    give_name(root, iteration)
    retire(rule, root, iteration)


@pytest.mark.parametrize("again", [False, True], ids=["the next one", "the same iteration again"])
def test_a_kill_at_any_instant_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    rule, iteration = CheckpointConfig(keep_last_n=2), 6 if again else 8
    outcomes = []
    for at in itertools.count(1):
        root = tmp_path / str(at)
        for old in (2, 4, 6):
            name(root, old, "old", CheckpointConfig())
        write(incomplete_folder(root, iteration), iteration, "new")
        with monkeypatch.context() as patch:
            killer = Killer(patch, at)
            try:
                give_name(root, iteration)
                retire(rule, root, iteration)
            except KilledError:
                pass
            finished = killer.count < at
        clean(root)
        found = newest_whole(root, pytest.fail)
        assert found is not None
        outcomes.append((checkpoint_folder(root, found) / "data").read_text())
        left = [
            entry.name for entry in root.iterdir() if entry.name not in (LATEST, "latest_checkpointed_iteration.tmp")
        ]
        assert sorted(left) == [checkpoint_folder(root, kept).name for kept in saved_iterations(root)]
        if finished:
            break
    assert len(outcomes) > 10
    # First the old one is found, from some instant on the new one, and never the old one again.
    switch = outcomes.index(f"new of {iteration}")
    assert set(outcomes[:switch]) == {"old of 6"}
    assert set(outcomes[switch:]) == {f"new of {iteration}"}
    assert saved_iterations(root) == ([4, 6] if again else [6, 8])


def test_a_kill_in_the_first_save_of_all_locks_nobody_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the folder's name and the first latest file too."""
    found = []
    for at in itertools.count(1):
        root = tmp_path / str(at)
        write(incomplete_folder(root, 2), 2, "new")
        with monkeypatch.context() as patch:
            killer = Killer(patch, at)
            with contextlib.suppress(KilledError):
                give_name(root, 2)
        clean(root)
        said: list[str] = []
        found.append((newest_whole(root, said.append), (root / LATEST).exists()))
        assert len(said) == (found[-1] == (2, False))
        if killer.count < at:
            break
    assert list(dict.fromkeys(found)) == [(None, False), (2, False), (2, True)]


def test_a_damaged_checkpoint_does_not_count_and_is_not_deleted(tmp_path: Path) -> None:
    for iteration in (2, 4, 6):
        name(tmp_path, iteration, "old", CheckpointConfig())
    (checkpoint_folder(tmp_path, 4) / "data").unlink()
    name(tmp_path, 8, "new", CheckpointConfig(keep_last_n=3))
    assert saved_iterations(tmp_path) == [2, 4, 6, 8]
    name(tmp_path, 10, "new", CheckpointConfig(keep_last_n=1, save_retain_interval=3))
    assert saved_iterations(tmp_path) == [4, 6, 10]


def test_a_clock_that_is_behind_changes_no_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run goes on on another host, whose clock is behind by more than the time between two saves."""

    def save(iteration: int, clock: float, rule: CheckpointConfig) -> None:
        partial = incomplete_folder(tmp_path, iteration)
        write(partial, iteration, "new")
        plan: Any = SimpleNamespace(metadata="some", writer=SimpleNamespace(finish=lambda *_: None))
        monkeypatch.setattr("time.time", lambda: clock)
        assert publish(Config(checkpoint=rule), tmp_path, iteration, plan, [Written([], files_of(partial))]) is None

    for iteration, clock in ((10, 5000.0), (20, 5600.0), (30, 2000.0)):
        save(iteration, clock, CheckpointConfig())
    assert candidates(tmp_path) == [30, 20, 10]
    (tmp_path / LATEST).unlink()
    assert candidates(tmp_path) == [30, 20, 10]
    save(40, 2600.0, CheckpointConfig(keep_last_n=2))
    assert saved_iterations(tmp_path) == [30, 40]


def test_a_deletion_that_fails_is_told_and_harms_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name(tmp_path, 2, "old", CheckpointConfig())
    write(incomplete_folder(tmp_path, 4), 4, "new")
    give_name(tmp_path, 4)

    def refuse(_folder: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(shutil, "rmtree", refuse)
    told = retire(CheckpointConfig(keep_last_n=1), tmp_path, 4)
    assert told is not None
    assert "an old checkpoint could not be deleted" in told
    assert newest_whole(tmp_path, pytest.fail) == 4
