"""Where and with what a bench ran: device, load, versions, date."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from pathlib import Path
from typing import Any

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


def load_average() -> float:
    """Of the last minute."""
    return os.getloadavg()[0]


def facts(device: str | None) -> dict[str, Any]:
    """Date, device (a GPU's name, else the CPU's), cores and versions."""
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "device": device or processor_name(),
        "cores": os.cpu_count(),
        "versions": versions(),
    }
