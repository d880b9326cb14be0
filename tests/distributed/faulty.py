"""Launches `fault_main.py` and measures how long its ranks live on behind a fault."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from launches import Launcher, alive, living

Attempts = Sequence[Sequence[dict[str, Any]]]
START_SECONDS = 240.0
"""From a launch or a restart to a fault, on a busy machine."""


class Faulty:
    """One launch of ranks with faults; `attempts` as in `fault_main.py`."""

    def __init__(self, launcher: Launcher, folder: Path, ranks: int, attempts: Attempts, flags: Sequence[str]) -> None:
        self.folder, self.ranks, self._launcher = folder, ranks, launcher
        self.log = folder / "output.txt"
        plan = json.dumps({"folder": str(folder), "attempts": list(attempts)})
        script = str(Path(__file__).with_name("fault_main.py"))
        self.agent = launcher.start(ranks, len(attempts) - 1, [script, plan, *flags], self.log)

    def said(self) -> str:
        """All its output."""
        return self.log.read_text(errors="replace")

    def processes(self) -> list[psutil.Process]:
        """What lives of the ranks and of what they started."""
        return living(self._launcher, self.agent)

    def pids(self, attempt: int) -> list[int]:
        """The ranks of an attempt."""
        return [int((self.folder / f"{attempt}.{rank}").read_text()) for rank in range(self.ranks)]

    def fault_time(self, attempt: int) -> float:
        """Wait for the last fault of an attempt so far; when it came."""
        note = self.folder / f"{attempt}.fault"
        self.until(note.exists, f"the fault of start {attempt}", START_SECONDS)
        return float(note.read_text())

    def ended_at(self) -> float:
        """When the launch, which is over, wrote its last line."""
        return self.log.stat().st_mtime

    def until(self, condition: Callable[[], bool], what: str, seconds: float) -> None:
        """Poll until `condition` holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"{what} did not come within {seconds:.0f} s:\n{self.said()[-6000:]}"
            time.sleep(0.02)

    def gone(self, attempt: int, since: float, within: float) -> float:
        """Wait until no rank of an attempt is left; seconds since the fault."""
        ranks = [psutil.Process(pid) for pid in self.pids(attempt) if psutil.pid_exists(pid)]
        left = within - (time.time() - since)
        self.until(lambda: not any(alive(one) for one in ranks), f"the end of all ranks of start {attempt}", left)
        return time.time() - since

    def end(self) -> None:
        """Leave nothing running."""
        for process in self.processes():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.agent.kill()
        self.agent.wait(30)


@contextmanager
def launched(
    launcher: Launcher, folder: Path, ranks: int, attempts: Attempts, flags: Sequence[str]
) -> Iterator[Faulty]:
    """A launch of which nothing is left behind the context."""
    folder.mkdir(parents=True, exist_ok=True)
    launch = Faulty(launcher, folder, ranks, attempts, flags)
    try:
        yield launch
    finally:
        launch.end()
