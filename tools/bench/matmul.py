"""An arm that measures the best matmul rate of this machine, by which the floor of a step is told.

python tools/bench/matmul.py SPEC.json SOCKET
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.bench.arm import Line
from tools.bench.step_spec import Spec

_SECONDS = 0.4
"""Time that is spent on one size, at least."""
_LEAST = 3
"""Products of one size, at least."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def synchronize() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def matmul_rate(size: int, dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of the fastest of several products of two square matrices."""
    left, right = (torch.rand(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)
    best, began, done = float("inf"), time.perf_counter(), 0
    while done < _LEAST or time.perf_counter() - began < _SECONDS:
        synchronize()
        started = time.perf_counter()
        torch.mm(left, right, out=out)
        synchronize()
        best = min(best, time.perf_counter() - started)
        done += 1
    return 2.0 * size**3 / best


def run_arm(spec_file: str, path: str) -> None:
    """Measure all sizes whenever asked."""
    spec = Spec.from_json(Path(spec_file).read_text())
    torch.set_num_threads(spec.all_threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    line = Line.to(path)
    for _ in line.read():
        rates = {str(size): matmul_rate(size, DTYPES[spec.dtype], device) for size in spec.matmul_sizes}
        line.write({"rates": rates, "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None})


if __name__ == "__main__":
    run_arm(*sys.argv[1:])
