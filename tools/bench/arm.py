"""The processes that a bench measures in turn: `Arm` is the bench's end of one, `Line` the end in the process.

All arms live as long as the bench, so that imports are paid for once. An arm that is not asked waits in a read of its
socket, where nothing spins. Orders and replies are JSON objects, one a line.
"""

from __future__ import annotations

import json
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from megatron_sip.errors import SipError

Order = dict[str, Any]
Reply = dict[str, Any]

_TAIL = 3000
"""Characters of an arm's output that stand in the error."""
_END_SECONDS = 20.0


class Arm:
    """A process that does what it is ordered; it gets the path of its socket as last argument."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start it, with `environment` and nothing else."""
        self.name = name
        self._folder = tempfile.TemporaryDirectory(prefix="sip-arm-")
        folder = Path(self._folder.name)
        self._log = folder / "log"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(folder / "orders"))
        self._listener.listen(1)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, str(folder / "orders")],
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._line: Line | None = None

    def wait_ready(self) -> Line:
        """Until the arm has built all it needs. SipError where it ended before."""
        self._listener.settimeout(0.2)
        while self._line is None:
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                if self._process.poll() is not None:
                    raise self._ended() from None
            else:
                connection.settimeout(None)
                self._line = Line(connection)
        return self._line

    def ask(self, order: Order) -> Reply:
        """What the arm replies. SipError where it ends instead."""
        line = self.wait_ready()
        try:
            line.write(order)
            reply = next(line.read(), None)
        except OSError:
            reply = None
        if reply is None:
            raise self._ended()
        return reply

    def processor_seconds(self) -> float:
        """Processor time of the arm and its children so far."""
        total = 0.0
        root = psutil.Process(self._process.pid)
        for process in [root, *root.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):  # it ended just now
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def _ended(self) -> SipError:
        try:
            status = str(self._process.wait(_END_SECONDS))
        except subprocess.TimeoutExpired:
            status = "no exit status yet"
        said = self._log.read_text(errors="replace")[-_TAIL:]
        return SipError(f"the arm {self.name} ended ({status}); mend what its last words name:\n{said}")

    def close(self) -> None:
        """Let it end; one that does not is killed with its children."""
        if self._line is not None:
            self._line.close()
        self._listener.close()
        try:
            self._process.wait(_END_SECONDS if self._line else 0)
        except subprocess.TimeoutExpired:
            root = psutil.Process(self._process.pid)
            for process in [*root.children(recursive=True), root]:
                process.kill()
            self._process.wait()
        self._folder.cleanup()

    def __enter__(self) -> Arm:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close()


class Line:
    """JSON objects over a socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._file = connection.makefile("rw", encoding="utf-8")

    @classmethod
    def to(cls, path: str) -> Line:
        """Connect to the bench that listens at `path`; it hears of it as the arm being ready."""
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(path)
        return cls(connection)

    def read(self) -> Iterator[dict[str, Any]]:
        """What the other end writes, until it closes."""
        while text := self._file.readline():
            yield json.loads(text)

    def write(self, value: Mapping[str, Any]) -> None:
        """Send one object."""
        self._file.write(json.dumps(value) + "\n")
        self._file.flush()

    def close(self) -> None:
        """End the line; the other end reads no more."""
        for end in (self._file, self._connection):
            with suppress(OSError):  # what was not sent any more has nobody to read it
                end.close()


def mean_of(steps: Sequence[Reply]) -> Reply:
    """One reply for several steps in a row: mean seconds of the whole and of each part, and the most memory."""
    count = len(steps)
    return {
        "seconds": sum(step["seconds"] for step in steps) / count,
        "parts": {name: sum(step["parts"][name] for step in steps) / count for name in steps[0]["parts"]},
        "memory_gib": max(step["memory_gib"] for step in steps),
    }


class Others:
    """How busy the processors of this machine are with what is no part of the bench."""

    def __init__(self, arms: Sequence[Arm]) -> None:
        self._arms = arms
        self._since = self._now()

    def _now(self) -> tuple[float, float, float]:
        times = psutil.cpu_times()
        busy = sum(times) - times.idle - getattr(times, "iowait", 0.0)
        # Linux counts the time of guests as that of users too.
        busy -= getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
        return time.monotonic(), busy, sum(arm.processor_seconds() for arm in self._arms)

    def cores(self) -> float:
        """Processors that others kept busy, on average since the last call."""
        before, self._since = self._since, self._now()
        seconds, busy, own = (now - then for now, then in zip(self._since, before, strict=True))
        return max(0.0, busy - own) / max(seconds, 1e-9)
