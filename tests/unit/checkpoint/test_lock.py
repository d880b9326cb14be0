"""The lock of a folder of --save: one live run holds it, a dead one loses it, and of two heirs one alone wins."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_sip.checkpoint.lock import LOCK, SaveLock
from megatron_sip.errors import CheckpointError
from megatron_sip.parallel import ending
from megatron_sip.parallel.inquest import Home

ELSEWHERE = "node7 pid:[1] b007"


def make(root: Path, said: list[str] | None = None, patience: float = 0.5) -> SaveLock:
    say: Callable[[str], None] = (lambda _: None) if said is None else said.append
    return SaveLock(root, say, refresh_seconds=0.1, patience_seconds=patience)


def held_by(root: Path, home: Home) -> Path:
    """A lock that some process left."""
    root.mkdir(exist_ok=True)
    text = json.dumps({"home": asdict(home), "since": "2026-11-25 12:00:00 UTC", "token": f"{home.pid}"})
    (root / LOCK).write_text(text)
    return root / LOCK


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_a_second_run_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    root = tmp_path / "new" / "save"
    first, second = make(root), make(root)
    first.acquire()
    with pytest.raises(CheckpointError, match=rf"--save {root} is in use by another run, process {os.getpid()} on "):
        second.acquire()
    second.require()  # it holds nothing, and so lost nothing
    second.release()
    first.require()
    first.release()
    assert names(root) == []
    second.acquire()
    second.release()
    SaveLock(None, print).acquire()


def test_a_dead_process_of_this_machine_loses_it_at_once(tmp_path: Path) -> None:
    """As a start of the ranks by torchrun behind a kill does: the old main rank is gone."""
    script = (
        "import os, sys, pathlib; from megatron_sip.checkpoint.lock import SaveLock; "
        "SaveLock(pathlib.Path(sys.argv[1]), print).acquire(); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False).returncode == 9
    assert names(tmp_path) == [LOCK]
    said: list[str] = []
    heir, began = make(tmp_path, said, patience=60), time.monotonic()
    heir.acquire()
    assert time.monotonic() - began < 5
    assert len(said) == 1
    assert "which is over, is taken over" in said[0]
    heir.require()
    assert names(tmp_path) == [LOCK]
    heir.release()


def test_a_pid_that_another_process_has_now_is_dead(tmp_path: Path) -> None:
    held_by(tmp_path, replace(Home.here(), started="1"))
    lock = make(tmp_path, patience=60)
    lock.acquire()
    lock.release()


def test_of_another_machine_a_silent_run_is_dead(tmp_path: Path) -> None:
    held_by(tmp_path, replace(Home.here(), machine=ELSEWHERE))
    said: list[str] = []
    lock, began = make(tmp_path, said), time.monotonic()
    lock.acquire()
    assert time.monotonic() - began >= 0.5
    assert "held by process" in said[0]
    assert "on node7, since 2026-11-25 12:00:00 UTC; looking for up to" in said[0]
    lock.release()


def test_of_another_machine_a_run_that_shows_life_holds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = make(tmp_path)
    owner.acquire()
    monkeypatch.setattr(Home, "here", classmethod(lambda _: Home(ELSEWHERE, 1, "5", 1)))
    other = make(tmp_path, patience=60)
    began = time.monotonic()
    with pytest.raises(CheckpointError, match="is in use by another run"):
        other.acquire()
    assert time.monotonic() - began < 20
    owner.release()


@pytest.mark.parametrize("proc", ["hidepid=1", "hidepid=2"])
def test_a_process_that_the_system_hides_is_watched(tmp_path: Path, proc: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of another user, where /proc shows everybody their own processes alone: unreadable, or not there at all."""
    owner = make(tmp_path)
    owner.acquire()

    def kill(_pid: int, _number: int) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    def started_at(_pid: int) -> str | None:
        if proc == "hidepid=1":
            raise PermissionError(errno.EACCES, "Permission denied")
        return None

    monkeypatch.setattr(ending.os, "kill", kill)
    monkeypatch.setattr(ending, "started_at", started_at)
    said: list[str] = []
    with pytest.raises(CheckpointError, match="is in use by another run"):
        make(tmp_path, said, patience=60).acquire()
    assert "looking for up to 60 s whether it lives" in said[0]
    monkeypatch.undo()
    owner.release()


def test_a_lock_without_a_name_is_watched_too(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text('{"home": {"mach')
    lock = make(tmp_path)
    lock.acquire()
    lock.require()
    lock.release()


def test_a_run_that_lost_its_lock_saves_nothing_more(tmp_path: Path) -> None:
    lock = make(tmp_path)
    lock.acquire()
    file = held_by(tmp_path, replace(Home.here(), machine=ELSEWHERE))
    stamp = file.stat().st_mtime_ns
    time.sleep(0.4)
    assert file.stat().st_mtime_ns == stamp  # it does not keep the other's lock alive
    with pytest.raises(CheckpointError, match=r"was taken over by process \d+ on node7, .*it saves nothing more"):
        lock.require()
    lock.release()
    assert names(tmp_path) == [LOCK]


def test_a_lock_that_was_removed_is_made_again(tmp_path: Path) -> None:
    lock = make(tmp_path)
    lock.acquire()
    (tmp_path / LOCK).unlink()
    lock.require()
    assert names(tmp_path) == [LOCK]
    lock.release()


@pytest.mark.parametrize("claimed", [False, True])
def test_of_many_heirs_one_wins(tmp_path: Path, claimed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where an heir was killed between its claim and its rename."""
    dead = replace(Home.here(), started="1")
    file = held_by(tmp_path, dead)
    if claimed:
        with monkeypatch.context() as patch:
            patch.setattr(Home, "here", classmethod(lambda _: dead))
            patch.setattr(Path, "replace", killed)
            with pytest.raises(KeyboardInterrupt):
                make(tmp_path).acquire()
        assert len(names(tmp_path)) == 2
        assert file.exists()
    heirs, outcomes = [make(tmp_path) for _ in range(8)], list[str]()
    gate = threading.Barrier(len(heirs))

    def inherit(heir: SaveLock) -> None:
        gate.wait()
        try:
            heir.acquire()
            outcomes.append("won")
        except CheckpointError:
            outcomes.append("refused")

    threads = [threading.Thread(target=inherit, args=(heir,)) for heir in heirs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(outcomes) == ["refused"] * 7 + ["won"]
    assert names(tmp_path) == [LOCK]
    for heir in heirs:
        heir.release()
    assert names(tmp_path) == []


def killed(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By an open that refuses, since no right keeps root from writing."""
    proper = Path.open

    def refusing(path: Path, mode: str = "r", *arguments: object, **settings: object) -> object:
        if "r" not in mode:
            raise OSError(number, os.strerror(number), str(path))
        return proper(path, mode, *arguments, **settings)

    monkeypatch.setattr(Path, "open", refusing)
    with pytest.raises(CheckpointError, match=rf"cannot write to --save {tmp_path}: {os.strerror(number)}; free space"):
        make(tmp_path).acquire()
    assert names(tmp_path) == []
