"""What asks a process to stop: SIGTERM, SIGINT, SIGHUP and `--exit-duration-in-mins`."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from types import FrameType

from megatron_sip.parallel.ending import age

HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
ONE_REQUEST = 1.0
"""Seconds in which signals count as one request: a scheduler signals the launcher and the ranks, and the launcher
passes its own signal on to the ranks."""


def under_torchrun() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def _nothing(_number: int, _frame: FrameType | None) -> None:
    """Only so that Python writes the signal to the wakeup descriptor instead of ending the process."""


class StopSignal:
    """Whether and since when this process is asked to stop.

    A Python handler runs on the main thread between two bytecodes, so never while that waits in a collective. Python's
    wakeup descriptor is written by the C handler at once: another thread that calls `listen` hears of the signal
    whatever the main thread does. Constructed on the main thread.
    """

    def __init__(self, exit_duration_in_mins: float | None) -> None:
        """The minutes count from the start of torchrun: a start of `--max-restarts` gets no new ones from a scheduler.

        Without torchrun they count from here.
        """
        limit, gone = exit_duration_in_mins, age(os.getppid()) if under_torchrun() else 0.0
        self._deadline = None if limit is None else time.monotonic() - gone + 60 * limit
        self._received: tuple[signal.Signals, float] | None = None
        self._again: signal.Signals | None = None
        self._lock = threading.Lock()
        self._ear, mouth = os.pipe()
        for end in (self._ear, mouth):
            os.set_blocking(end, False)
        for number in HANDLED:
            # What nohup or a shell set aside stays so, unless torchrun passes it on: it ends the ranks then.
            if signal.getsignal(number) is not signal.SIG_IGN or under_torchrun():
                signal.signal(number, _nothing)
        signal.set_wakeup_fd(mouth, warn_on_full_buffer=False)

    def listen(self, seconds: float = 0.0) -> None:
        """Wait at most this long for a signal, and note what came."""
        ready, _, _ = select.select([self._ear], [], [], seconds)
        if not ready:
            return
        with self._lock:
            try:
                numbers = os.read(self._ear, 4096)
            except BlockingIOError:  # another thread was faster
                return
            for number in numbers:
                if number in HANDLED:
                    self._note(signal.Signals(number), time.monotonic())

    def _note(self, number: signal.Signals, now: float) -> None:
        if self._received is None:
            self._received = (number, now)
        elif now - self._received[1] > ONE_REQUEST:
            self._again = number

    def __call__(self) -> bool:
        """Whether this process was asked to stop."""
        return self.requested_at is not None

    @property
    def requested_at(self) -> float | None:
        """Monotonic seconds of the request, or None."""
        self.listen()
        moments = [] if self._received is None else [self._received[1]]
        if self._deadline is not None and time.monotonic() > self._deadline:
            moments.append(self._deadline)
        return min(moments, default=None)

    @property
    def signalled_at(self) -> float | None:
        """Monotonic seconds of the signal, or None: behind a signal stands someone who will not wait for ever."""
        self.listen()
        return None if self._received is None else self._received[1]

    @property
    def seconds(self) -> float:
        """Seconds since the request; 0 without one."""
        moment = self.requested_at
        return 0.0 if moment is None else time.monotonic() - moment

    @property
    def again(self) -> signal.Signals | None:
        """The signal that came after the first, from someone who does not want to wait."""
        return self._again

    @property
    def reason(self) -> str:
        """What asked, for the log."""
        if self._received:
            return self._received[0].name
        return "--exit-duration-in-mins" if self() else "a signal to another rank"
