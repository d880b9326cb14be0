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
