"""Starts gloo workers for the distributed tests: one launch runs many checks, because imports take seconds."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def worker_environment(**environment: str) -> dict[str, str]:
    """What ranks of a test see: this environment, one thread a rank, and `environment`."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
        "TOKENIZERS_PARALLELISM": "false",
        **environment,
    }


def torchrun(world_size: int, *command: str, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess:
    """Run `command` (`-m module args` or `script args`) on `world_size` ranks of this machine."""
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={world_size}",
        "--master-addr=127.0.0.1",
        f"--master-port={free_port()}",
        *command,
    ]
    env = worker_environment(**environment)
    return subprocess.run(launch, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout, check=False)


def complaint(result: subprocess.CompletedProcess) -> str:
    """What the ranks said before torchrun began to talk about it."""
    said = (result.stdout + result.stderr).split("torch/distributed/elastic/multiprocessing/api.py")[0]
    return said[-6000:]


def run_checks(script: str, world_size: int, *arguments: str, timeout: float = 300) -> str:
    """Run a check script of this folder; its standard output. A failed rank fails the test with its words."""
    result = torchrun(world_size, str(Path(__file__).parent / script), *arguments, timeout=timeout)
    if result.returncode != 0:
        raise AssertionError(f"{script} {' '.join(arguments)} failed on {world_size} ranks:\n{complaint(result)}")
    return result.stdout
