"""torchrun as users call it, for the tests; each launch imports everything anew, `forks.py` does not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from megatron_sip.ports import free_port

ROOT = Path(__file__).resolve().parents[2]


def worker_environment(**environment: str) -> dict[str, str]:
    """What ranks of a test see: this environment, one thread a rank, and `environment`."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
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
    with subprocess.Popen(launch, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        try:
            out, err = run.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            # Terminated and not killed, torchrun ends its ranks, which are in sessions of their own.
            run.terminate()
            out, err = run.communicate(timeout=60)
            raise AssertionError(f"{command} took more than {timeout:.0f} s:\n{(out + err)[-6000:]}") from None
    return subprocess.CompletedProcess(launch, run.returncode, out, err)


def complaint(result: subprocess.CompletedProcess) -> str:
    """What the ranks said before the elastic agent began to talk about them."""
    said = result.stdout + result.stderr
    for agent in ("torch/distributed/elastic/multiprocessing/api.py", "== what torch's elastic agent says"):
        said = said.split(agent)[0]
    return said[-6000:]
