"""The product's entry with faults in it: `torchrun fault_main.py PLAN FLAG...`

PLAN is JSON: {"folder", "attempts": [[run, ...], ...]}: for each start of the ranks under `--max-restarts` the runs
that follow each other in its processes while they end with status 0. A run is {"slow": {"decode": seconds, "backward":
seconds}, "slow_from": iteration, "faults": [{"do", "rank", "stage", "iteration"}], "flags"}; a fault of the stage
"backward" comes with the first backward pass within "train". Ranks write into the folder: <attempt>.<rank> with their
process id, <attempt>.fault with the time of a fault, <attempt>.<rank>.status with the status of each run.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_sip import pretrain

RANK = int(os.environ["RANK"])
ATTEMPT = int(os.environ["TORCHELASTIC_RESTART_COUNT"])


class Saboteur:
    """Commits the faults of one run after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.iteration = 0
        self.faults: list[dict[str, Any]] = []
        self.slow: dict[str, float] = {}
        self.slow_from = 0

    def plan(self, run: dict[str, Any]) -> None:
        """What comes next."""
        self.faults = [fault for fault in run.get("faults", ()) if fault["rank"] == RANK]
        self.slow, self.slow_from = run.get("slow", {}), run.get("slow_from", 0)

    def dawdle(self, what: str) -> None:
        """Take longer for it than it needs."""
        if self.iteration >= self.slow_from:
            time.sleep(self.slow.get(what, 0))

    def at(self, stage: str) -> None:
        """This rank is in a stage."""
        for fault in list(self.faults):
            if fault["stage"] == stage and fault["iteration"] == self.iteration:
                self.faults.remove(fault)
                self.commit(fault["do"])

    def commit(self, do: str) -> None:
        """Commit a fault."""
        note = self.folder / f"{ATTEMPT}.fault"
        note.with_suffix(".part").write_text(str(time.time()))
        note.with_suffix(".part").rename(note)
        if do == "hold Python's lock":
            ctypes.PyDLL(None).sleep(10_000)
        if do == "raise":
            raise MemoryError("the made-up end of the memory")
        if do == "lonely collective":
            dist.all_reduce(torch.zeros(1))
        for name in ("SIGSTOP", "SIGKILL", "SIGTERM"):
            if do.startswith(name):
                os.kill(os.getpid(), signal.Signals[name])
        if do == "SIGTERM twice":
            threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        if do.endswith("sleep"):
            time.sleep(10_000)

    def hook(self) -> None:
        """Get into the product."""
        from megatron.core.pipeline_parallel import schedules

        from megatron_sip.parallel.watch import StageWatch
        from megatron_sip.rollout.megatron import MegatronEngine

        stage, backward, decode = StageWatch.stage, schedules.backward_step, MegatronEngine._decode

        @contextmanager
        def faulty_stage(watch: StageWatch, name: str, *where: Any) -> Iterator[None]:
            with stage(watch, name, *where):
                self.iteration = watch.place.iteration or 0
                self.at(name)
                yield

        def faulty_backward(*positional: Any, **named: Any) -> Any:
            self.at("backward")
            self.dawdle("backward")
            return backward(*positional, **named)

        def slow_decode(*positional: Any, **named: Any) -> Any:
            self.dawdle("decode")
            return decode(*positional, **named)

        StageWatch.stage = faulty_stage  # type: ignore[method-assign]
        schedules.backward_step = faulty_backward
        MegatronEngine._decode = slow_decode  # type: ignore[method-assign]


def main() -> int:
    """The runs of this start; the status of the last."""
    whole = json.loads(sys.argv[1])
    folder, status = Path(whole["folder"]), 0
    (folder / f"{ATTEMPT}.{RANK}").write_text(str(os.getpid()))
    saboteur = Saboteur(folder)
    saboteur.hook()
    for run in whole["attempts"][ATTEMPT]:
        saboteur.plan(run)
        status = pretrain.main([*sys.argv[2:], *run.get("flags", ())])
        with (folder / f"{ATTEMPT}.{RANK}.status").open("a") as file:
            file.write(f"{status}\n")
        if status:
            break
    return status


if __name__ == "__main__":
    sys.exit(main())
