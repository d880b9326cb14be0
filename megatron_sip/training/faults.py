"""When a run shall stop: signals and the time limit. Whether it stops is decided by all ranks together."""

from __future__ import annotations

import signal
import time
from types import FrameType


class StopSignal:
    """Remembers SIGTERM and SIGINT and watches `--exit-duration-in-mins`.

    A second signal ends the process at once, as the default handler would.
    """

    def __init__(self, exit_duration_in_mins: float | None) -> None:
        limit = exit_duration_in_mins
        self._deadline = None if limit is None else time.monotonic() + 60 * limit
        self._received: signal.Signals | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._received = signal.Signals(number)
        signal.signal(number, signal.SIG_DFL)

    def __call__(self) -> bool:
        """Whether this process was asked to stop."""
        return self._received is not None or (self._deadline is not None and time.monotonic() > self._deadline)

    @property
    def reason(self) -> str:
        """What asked, for the log."""
        if self._received:
            return self._received.name
        return "--exit-duration-in-mins" if self() else "a signal to another rank"
