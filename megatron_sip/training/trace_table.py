"""What a Chrome trace says in a few numbers: seconds of the parts of a step, and what took longest.

Read from the file itself, an event at a time: torch's own table needs about 20 kB of memory for each event, and a step
has hundreds of thousands.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from megatron_sip.parallel.regions import PREFIX

ROWS = 40
"""Rows of a table."""
_REGION = "user_annotation"
_ON_CPU = ("cpu_op", _REGION)
_ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")


class Span(NamedTuple):
    """An event with a duration; `start` and `length` in microseconds, `track` is the thread or stream it ran on."""

    kind: str
    name: str
    track: tuple[str, str]
    start: float
    length: float


@dataclass(frozen=True)
class Line:
    """All spans of one name: how many, their seconds, and the seconds of these that no span within them had."""

    name: str
    times: int
    own: float
    total: float


def read_spans(trace: Path) -> list[Span]:
    """The spans of an unpacked trace; what else an event holds is dropped as it is read."""

    def condensed(item: dict[str, Any]) -> Span | dict[str, Any] | None:
        if item.get("ph") == "X" and item.get("cat") in (*_ON_CPU, *_ON_GPU):
            return Span(item["cat"], item["name"], (str(item["pid"]), str(item["tid"])), item["ts"], item["dur"])
        return item if "traceEvents" in item else None

    with trace.open() as file:
        events = json.load(file, object_hook=condensed)["traceEvents"]
    return [event for event in events if event is not None]


def lines_of(spans: Iterable[Span]) -> list[Line]:
    """A line a name, the longest own time first. Spans of one track lie within one another or apart."""
    times: defaultdict[str, int] = defaultdict(int)
    own: defaultdict[str, float] = defaultdict(float)
    total: defaultdict[str, float] = defaultdict(float)
    ordered = sorted(spans, key=lambda span: (span.track, span.start, -span.length))
    for _, on_track in groupby(ordered, key=lambda span: span.track):
        around: list[Span] = []
        for span in on_track:
            while around and around[-1].start + around[-1].length <= span.start:
                around.pop()
            if around:
                own[around[-1].name] -= span.length
            around.append(span)
            times[span.name] += 1
            own[span.name] += span.length
            total[span.name] += span.length
    found = [Line(name, times[name], own[name] / 1e6, total[name] / 1e6) for name in times]
    return sorted(found, key=lambda line: -line.own)


def summary(spans: Sequence[Span]) -> str:
    """Parts of the step in the order in which they first began, then what took longest on the CPU and on the GPU."""
    regions = sorted((span for span in spans if span.kind == _REGION), key=lambda span: span.start)
    names = dict.fromkeys(span.name for span in regions if span.name.startswith(PREFIX))
    on_cpu = {line.name: line for line in lines_of(span for span in spans if span.kind in _ON_CPU)}
    parts = [on_cpu[name] for name in names]
    operations = [line for line in on_cpu.values() if line.name not in names]
    on_gpu = lines_of(span for span in spans if span.kind in _ON_GPU)
    text = _table("part of the step", parts) + _table("operation on the CPU", operations[:ROWS])
    return text + (_table("operation on the GPU", on_gpu[:ROWS]) if on_gpu else "")


def _table(what: str, lines: Sequence[Line]) -> str:
    rows = [f"{what:<64}{'times':>9}{'own (s)':>12}{'whole (s)':>12}"]
    rows += [f"{line.name[:62]:<64}{line.times:>9}{line.own:>12.4f}{line.total:>12.4f}" for line in lines]
    return "\n".join(rows) + "\n\n"
