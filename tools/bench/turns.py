"""Pieces of work that are timed in turn in one process, or on the ranks of torchrun together."""

from __future__ import annotations

import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from megatron_sip.errors import SipError
from megatron_sip.parallel.world import World
from tools.bench import machine
from tools.bench.matmul import synchronize

Work = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """One measurement, in seconds of one call: of the wall on the slowest rank, and of the processor on each rank."""

    wall: float
    processor: tuple[float, ...]


def as_command(name: str, run: Callable[[], None]) -> int:
    """The exit status of a bench; an error of its user's is one line with its name."""
    warnings.filterwarnings("ignore", category=UserWarning)
    try:
        run()
    except (SipError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    return 0


def in_turn(
    works: Mapping[str, Work], repeats: int, group: dist.ProcessGroup, least_seconds: float = 0.0
) -> dict[str, list[Timing]]:
    """Measure each work `repeats` times, all of them one after the other, every other time in reverse order.

    Each is called before, to warm up. Where a call then takes less than `least_seconds`, a measurement is the mean of
    so many calls as take that long. All ranks of `group`, which is of the host, call this together.
    """
    calls = {name: _calls(work, group, least_seconds) for name, work in works.items()}
    found: dict[str, list[Timing]] = {name: [] for name in works}
    names = list(works)
    for repeat in range(repeats):
        for name in names[:: -1 if repeat % 2 else 1]:
            found[name].append(_timed(works[name], calls[name], group))
    return found


def _calls(work: Work, group: dist.ProcessGroup, least_seconds: float) -> int:
    """Calls of one measurement; the first of all, which may be slow, does not count where another is cheap."""
    seconds = _timed(work, 1, group).wall
    if seconds < 10 * least_seconds:
        seconds = _timed(work, 1, group).wall
    return max(1, math.ceil(least_seconds / max(seconds, 1e-6)))


def _timed(work: Work, calls: int, group: dist.ProcessGroup) -> Timing:
    """The mean of `calls` calls, the same on all ranks."""
    dist.barrier(group=group)
    wall, own = time.perf_counter(), time.process_time()
    for _ in range(calls):
        work()
    synchronize()
    seconds = torch.tensor([time.perf_counter() - wall, time.process_time() - own], dtype=torch.float64) / calls
    ranks = [torch.empty_like(seconds) for _ in range(group.size())]
    dist.all_gather(ranks, seconds, group=group)
    return Timing(max(float(rank[0]) for rank in ranks), tuple(float(rank[1]) for rank in ranks))


def median_wall(timings: Sequence[Timing]) -> float:
    """Median of the seconds of the wall."""
    return statistics.median(timing.wall for timing in timings)


def as_json(timings: Sequence[Timing]) -> dict[str, Any]:
    """Median seconds, those of the processor summed over the ranks and on the busiest, and every measurement."""
    return {
        "seconds": median_wall(timings),
        "processor_seconds": statistics.median(sum(timing.processor) for timing in timings),
        "busiest_rank_seconds": statistics.median(max(timing.processor) for timing in timings),
        "repeats": [{"seconds": timing.wall, "processor_seconds": list(timing.processor)} for timing in timings],
    }


def surroundings(world: World, load_before: float, threads: int, dtype: str) -> dict[str, Any]:
    """What the JSON of a bench tells besides its measurements."""
    return {
        **machine.facts(torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else None),
        "load_average": {"before": load_before, "after": machine.load_average()},
        "ranks": world.size,
        "threads": threads,
        "dtype": dtype,
    }


def show_surroundings(console: Console, around: Mapping[str, Any], measured: Iterable[Mapping[str, Any]]) -> None:
    """Print where and when it ran, and what makes the times of `as_json` less sure.

    Of all that was measured, the one whose repeats are most apart counts.
    """
    console.print(f"{machine.ran_on(around)}; {machine.ran_when(around)}", highlight=False, soft_wrap=True)
    repeats = [[repeat["seconds"] for repeat in one["repeats"]] for one in measured]
    warnings = machine.load_warning(around["load_average"]["before"])
    for warning in warnings + machine.spread_warning(max(repeats, key=machine.spread)):
        console.print(f"WARNING: {warning}", highlight=False, soft_wrap=True)
