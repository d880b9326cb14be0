"""Where and with what a bench ran: device, load, versions, date, and what of it makes the times less sure."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LOAD_BOUND = 0.5
"""Load average above which another process was at work before the bench began."""
SPREAD_BOUND = 0.15
"""`spread` of an arm that passes without a word."""
PACKAGES = ("torch", "megatron-core", "transformers", "transformer-engine", "numpy")


def processor_name() -> str:
    """The CPU as the kernel names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Python and the packages that compute, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def ran_on(around: Mapping[str, Any]) -> str:
    """Device, cores, ranks, threads and dtype of a bench in words, from what its JSON says."""
    ranks, threads = (f"{around[name]} {name if around[name] > 1 else name[:-1]}" for name in ("ranks", "threads"))
    return f"{around['device']}, {around['cores']} cores, {ranks} of {threads}, {around['dtype']}"


def ran_when(around: Mapping[str, Any]) -> str:
    """Load average and date of a bench in words."""
    load = around["load_average"]
    return f"load average {load['before']:.2f} before, {load['after']:.2f} behind; {around['date']}"


def load_average() -> float:
    """Of the last minute."""
    return os.getloadavg()[0]


def load_warning(before: float) -> list[str]:
    """A sentence where something else ran when the bench began."""
    if before <= LOAD_BOUND:
        return []
    return [f"the load average was {before:.2f} before the bench (above {LOAD_BOUND}); wait until it falls"]


def spread(seconds: Sequence[float]) -> float:
    """Longest less shortest of the repeats of one measurement, as a share of their median."""
    return (max(seconds) - min(seconds)) / statistics.median(seconds)


def spread_warning(seconds: Sequence[float]) -> list[str]:
    """A sentence where the repeats differ much."""
    if spread(seconds) <= SPREAD_BOUND:
        return []
    return [f"the repeats lie {100 * spread(seconds):.0f} % apart; measure again with more --repeats"]


def facts(device: str | None) -> dict[str, Any]:
    """Date, device (a GPU's name, else the CPU's), the GPU if there is one, cores and versions."""
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "device": device or processor_name(),
        "gpu": device,
        "cores": os.cpu_count(),
        "versions": versions(),
    }
