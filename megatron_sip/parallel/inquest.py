"""Which rank is at fault when a run no longer moves: pure functions over what the ranks report of themselves."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from megatron_sip.parallel.ending import started_at

_COLLECTIVES = ("/torch/distributed/", "/megatron/core/pipeline_parallel/p2p_communication.py")
_WAITS = (".wait(", "synchronize(", ".item(", ".tolist(", ".cpu(")


@dataclass(frozen=True)
class Home:
    """The process of a rank. Ranks with the same `machine` can see each other's processes."""

    machine: str
    pid: int
    started: str
    """The kernel's start time of the process; empty where the system does not tell."""
    group: int
    """Its process group."""

    @classmethod
    def here(cls) -> Home:
        """This process."""
        try:
            # In containers of one machine the same number means different processes; and machines may share a name.
            space = os.readlink("/proc/self/ns/pid")
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        except OSError:
            space = boot = ""
        pid = os.getpid()
        return cls(f"{socket.gethostname()} {space} {boot}".strip(), pid, started_at(pid) or "", os.getpgid(0))

    @property
    def alive(self) -> bool:
        """Whether the process still runs; asked on its own machine."""
        return not self.started or started_at(self.pid) == self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.machine.split()[0]}"


@dataclass(frozen=True)
class Place:
    """Where a rank stands in the run. `entries` counts the stages it has entered."""

    stage: str = "assemble"
    iteration: int | None = None
    samples: tuple[int, int] | None = None
    entries: int = 0

    def __str__(self) -> str:
        text = f"stage {self.stage}"
        if self.iteration is not None:
            text += f" of iteration {self.iteration}"
        if self.samples is not None:
            text += f" (samples {self.samples[0]} to {self.samples[1]})"
        return text


@dataclass(frozen=True)
class Report:
    """What a rank says of itself: its place and, where it was asked, what its main thread does.

    `waiting`: in a collective or for the device, so for another rank perhaps. `done`: it leaves by itself. `beat`: how
    many reports it has given.
    """

    place: Place
    waiting: bool = False
    line: str = ""
    done: bool = False
    beat: int = 0

    def dumps(self) -> str:
        """As text for the store."""
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, text: str | bytes) -> Report:
        """The inverse of `dumps`."""
        fields = json.loads(text)
        place = fields.pop("place")
        samples = place.pop("samples")
        return cls(Place(**place, samples=None if samples is None else (samples[0], samples[1])), **fields)


def standing(frame: FrameType | None) -> tuple[bool, str]:
    """Whether a thread with this innermost frame waits for others, and its innermost line outside of torch."""
    if frame is None:
        return False, "no frame"
    file = frame.f_code.co_filename
    waiting = any(part in file for part in _COLLECTIVES) or any(part in _line(frame) for part in _WAITS)
    outer: FrameType | None = frame
    while outer is not None and "/torch/" in outer.f_code.co_filename:
        outer = outer.f_back
    shown = outer or frame
    name = "/".join(shown.f_code.co_filename.split("/")[-3:])
    return waiting, f"{name}:{shown.f_lineno} in {shown.f_code.co_name}"


def _line(frame: FrameType) -> str:
    """The source line of a frame; past `linecache`, which the main thread may be changing."""
    try:
        return Path(frame.f_code.co_filename).read_text(errors="replace").splitlines()[frame.f_lineno - 1]
    except (OSError, IndexError):
        return ""  # not from a file


@dataclass(frozen=True)
class Finding:
    """The ranks at fault, none if that cannot be told, and what is wrong with them."""

    ranks: tuple[int, ...]
    what: str


def find_fault(reports: Mapping[int, Report], size: int) -> Finding:
    """Who keeps the others waiting, from the reports of all ranks that answered when asked.

    A rank that does not answer; else, among the ranks that are furthest behind, those that do not wait for another.
    """
    silent = tuple(rank for rank in range(size) if rank not in reports)
    if silent:
        return Finding(silent, "does not answer")
    last = min(report.place.entries for report in reports.values())
    behind = [rank for rank, report in sorted(reports.items()) if report.place.entries == last]
    busy = [rank for rank in behind if not reports[rank].waiting]
    if busy:
        return Finding(tuple(busy), f"is in {reports[busy[0]].line}")
    if len(behind) < size:
        return Finding(tuple(behind), f"waits in {reports[behind[0]].line}, behind all others")
    return Finding((), "every rank waits for another")


def ranks_text(ranks: Sequence[int]) -> str:
    """`rank 3` or `ranks 1, 2`."""
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


def hang_text(finding: Finding, reports: Mapping[int, Report], homes: Mapping[int, Home], alarm: str) -> str:
    """The sentence about a run that does not move. `reports` are those of the ranks that answered."""
    if not finding.ranks:
        lines = "; ".join(f"rank {rank} in {report.place}: {report.line}" for rank, report in sorted(reports.items()))
        return f"{alarm}: {finding.what}: {lines}"
    first = finding.ranks[0]
    text = f"{alarm}: {ranks_text(finding.ranks)} ({homes[first]}) {finding.what}"
    return f"{text}, in {reports[first].place}" if first in reports else text
