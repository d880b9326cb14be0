"""Requests to stop, heard while the main thread does something else."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator

import psutil
import pytest

from megatron_sip.parallel import signals
from megatron_sip.parallel.ending import age
from megatron_sip.parallel.signals import StopSignal


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """None is set aside, as under nohup or in a shell's background; those of the test runner are put back."""
    kept = {number: signal.getsignal(number) for number in signals.HANDLED}
    for number in signals.HANDLED:
        signal.signal(number, signal.SIG_DFL)
    wakeup = signal.set_wakeup_fd(-1)
    yield
    signal.set_wakeup_fd(wakeup)
    for number, handler in kept.items():
        signal.signal(number, handler)


def test_nothing_is_asked_at_first() -> None:
    stop = StopSignal(None)
    assert not stop()
    assert stop.seconds == 0
    assert stop.again is None


@pytest.mark.parametrize("number", signals.HANDLED)
def test_a_signal_is_a_request(number: signal.Signals) -> None:
    stop = StopSignal(None)
    os.kill(os.getpid(), number)
    assert stop()
    assert stop.reason == number.name
    assert 0 <= stop.seconds < 5
    assert stop.again is None


def test_what_nohup_set_aside_is_heard_only_from_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    stop = StopSignal(None)
    os.kill(os.getpid(), signal.SIGHUP)
    assert not stop()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    stop = StopSignal(None)
    os.kill(os.getpid(), signal.SIGHUP)
    assert stop()


def test_signals_at_once_are_one_request_and_a_later_one_insists(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    stop = StopSignal(None)
    os.kill(os.getpid(), signal.SIGTERM)
    stop.listen()
    now[0] += signals.ONE_REQUEST / 2
    os.kill(os.getpid(), signal.SIGTERM)
    stop.listen()
    assert stop.again is None
    now[0] += signals.ONE_REQUEST
    os.kill(os.getpid(), signal.SIGINT)
    stop.listen()
    assert stop.again is signal.SIGINT
    assert stop.reason == "SIGTERM"
    assert stop.requested_at == 100.0


def test_the_time_limit_is_a_request_from_its_moment_on(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    stop = StopSignal(0.5)
    assert not stop()
    now[0] += 32
    assert stop()
    assert stop.seconds == 2
    assert stop.reason == "--exit-duration-in-mins"


def test_the_time_limit_counts_from_the_launchers_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scheduler gives no new minutes to a later start of the ranks."""
    now = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(signals, "age", {os.getppid(): 20.0}.__getitem__)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    stop = StopSignal(0.5)
    now[0] += 9
    assert not stop()
    now[0] += 2
    assert stop()
    assert stop.seconds == 1
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert not StopSignal(0.5)()


def test_the_age_of_a_process() -> None:
    wanted = time.time() - psutil.Process().create_time()
    assert age(os.getpid()) == pytest.approx(wanted, abs=5)
    child = subprocess.Popen(["true"])
    child.wait()
    assert age(child.pid) == 0


def test_listening_returns_as_soon_as_a_signal_comes() -> None:
    stop = StopSignal(None)
    signal.setitimer(signal.ITIMER_REAL, 0)
    began = time.monotonic()
    os.kill(os.getpid(), signal.SIGTERM)
    stop.listen(30)
    assert time.monotonic() - began < 10
    assert stop()
