"""Progress of an evaluation: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 5.0


class Steps:
    """Counts up to `total`; a bar where standard error is a terminal, plain lines on standard output elsewhere."""

    def __init__(self, what: str, total: int) -> None:
        self._what = what
        self._total = total
        self._done = 0
        self._next_line = time.monotonic() + SECONDS_BETWEEN_LINES
        self._bar = tqdm(total=total, desc=what, leave=False) if sys.stderr.isatty() else None

    def add(self, more: int) -> None:
        """`more` were done."""
        self.at(self._done + more)

    def at(self, done: int) -> None:
        """`done` are done in all."""
        if self._bar is not None:
            self._bar.update(done - self._done)
        elif done == self._total or time.monotonic() >= self._next_line:
            print(f"{self._what}: {done} of {self._total}", flush=True)
            self._next_line = time.monotonic() + SECONDS_BETWEEN_LINES
        self._done = done
        if self._bar is not None and done >= self._total:
            self._bar.close()
