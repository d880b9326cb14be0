"""What the watch over the stages of a rank holds for overdue, and what it leaves alone."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_sip.parallel import watch
from megatron_sip.parallel.ending import NOT_AGREED
from megatron_sip.parallel.watch import StageWatch

LIMITS = dict.fromkeys(("assemble", "train", "save", "load"), 60.0)


@dataclass
class Asked:
    """A request to stop, by a signal or by the clock."""

    signalled_at: float | None = None
    requested_at: float | None = None
    reason: str = "SIGTERM"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Asked]:
    """A grace that is over at once, and no thread that would end the test runner."""
    monkeypatch.setattr(watch, "AGREE_SECONDS", 0.05)
    monkeypatch.setattr(StageWatch, "_run", lambda _self: None)
    return Asked()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The watch's seconds, which the test sets."""
    now = [100.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    return now


def test_a_signal_that_is_not_agreed_on_ends_the_run(asked: Asked) -> None:
    guard = StageWatch(LIMITS, asked, grace=0.0)
    with guard.stage("train"):
        assert guard._alarm() is None
        asked.signalled_at = time.monotonic() - 1
        alarm = guard._alarm()
    assert alarm is not None
    assert alarm.status == NOT_AGREED


def test_a_time_limit_lets_a_long_step_end(asked: Asked) -> None:
    guard = StageWatch(LIMITS, asked, grace=0.0)
    with guard.stage("train"):
        asked.requested_at = time.monotonic() - 1
        assert guard._alarm() is None


@pytest.mark.parametrize("stage", ["save", "load"])
def test_the_time_to_agree_begins_anew_behind_a_save_or_load(asked: Asked, stage: str) -> None:
    guard = StageWatch(LIMITS, asked, grace=0.0)
    asked.signalled_at = time.monotonic() - 1
    with guard.stage(stage):
        assert guard._alarm() is None
    assert guard._alarm() is None
    time.sleep(0.06)
    assert guard._alarm() is not None


@pytest.mark.parametrize("stage", ["save", "load"])
def test_a_save_or_load_makes_no_later_way_longer(
    asked: Asked, stage: str, monkeypatch: pytest.MonkeyPatch, clock: list[float]
) -> None:
    """Five minutes of a save must not give a rank that hangs later more than five minutes."""
    monkeypatch.setattr(watch, "AGREE_SECONDS", 10.0)
    guard = StageWatch(LIMITS, asked, grace=20.0)
    guard.met("train")
    clock[0] += 2
    with guard.stage(stage):
        clock[0] += 300
    clock[0] += 1
    guard.met("train")
    asked.signalled_at = clock[0]
    with guard.stage("train"):
        clock[0] += 29
        assert guard._alarm() is None
        clock[0] += 2
        alarm = guard._alarm()
    assert alarm is not None
    assert "did not agree to stop within 30 s" in alarm.text


def test_the_way_to_a_far_boundary_goes_on_behind_a_save(
    asked: Asked, monkeypatch: pytest.MonkeyPatch, clock: list[float]
) -> None:
    """40 s of a way were seen; a save on the next such way takes none of the 60 that it may take."""
    monkeypatch.setattr(watch, "AGREE_SECONDS", 10.0)
    guard = StageWatch(LIMITS, asked, grace=20.0)
    guard.met("train")
    clock[0] += 40
    guard.met("train")
    with guard.stage("save"):
        asked.signalled_at = clock[0]
        clock[0] += 300
    with guard.stage("train"):
        clock[0] += 59
        assert guard._alarm() is None
        clock[0] += 2
        alarm = guard._alarm()
    assert alarm is not None
    assert alarm.status == NOT_AGREED


def test_a_run_without_a_launcher_outlives_its_shell(tmp_path: Path) -> None:
    done, code = tmp_path / "done", tmp_path / "run.py"
    code.write_text(
        "import sys, time; from pathlib import Path\n"
        "from megatron_sip.parallel.signals import StopSignal\n"
        "from megatron_sip.parallel.watch import StageWatch\n"
        f"with StageWatch({LIMITS!r}, StopSignal(None), 1.0): time.sleep(1.5)\n"
        "Path(sys.argv[1]).touch()\n"
    )
    root = Path(__file__).resolve().parents[3]
    script = f"PYTHONPATH={root} nohup {sys.executable} {code} {done} >/dev/null 2>&1 &"
    subprocess.run(["bash", "-c", script], check=True, env={"PATH": "/usr/bin:/bin"})
    deadline = time.monotonic() + 120
    while not done.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert done.exists()
