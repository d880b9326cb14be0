"""Command lines of the product like `check_commands.py`, with faults put into the training of some of them.

torchrun check_runs.py CASES.json OUT

A case of CASES.json has besides what `check_commands.py` reads:

    ranks     how many of the launched ranks make the run; the others wait for the next case
    copy      [from, to, iteration] or null: first copy the folder of a run and let it stand at an earlier checkpoint
    fault     {"samples": [...], "factor": f}: the loss of every micro-batch that holds one of them is multiplied by f;
              with "damaged": i a byte of the checkpoint of iteration i changes right before a rollback reads it
              {"poisoned_at": n, "rank": r}: one weight of rank r is nan from the n-th training step of the process on
              {"stopped_at": n, "rank": r}: rank r gets SIGTERM when the n-th training step of the process begins
              {"jumped": [[start, stop], ...]}: the run is told from its start to leave these samples out
              null: nothing
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from check_commands import run

from megatron_sip.loss.reduce import ObjectiveTerms
from megatron_sip.training import assemble, course, step


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def faulty_samples(samples: list[int], factor: float) -> Any:
    """The objective whose loss explodes on some samples."""
    proper = step.objective_terms

    def objective(logps: Any, reference: Any, batch: Any, **settings: Any) -> ObjectiveTerms:
        terms = proper(logps, reference, batch, **settings)
        if not set(batch.sample_index.tolist()) & set(samples):
            return terms
        metrics = terms.metrics.clone()
        metrics[terms.names.index("loss"), 0] *= factor
        return replace(terms, loss=terms.loss * factor, metrics=metrics)

    return replaced(step, "objective_terms", objective)


def poisoned_weight(at: int, rank: int) -> Any:
    """A training step that loses a weight of one rank once, as faulty memory would."""
    proper, calls = step.PolicyTrainer.step, [0]

    def poisoned(trainer: Any, *arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == at and trainer.world.rank == rank:
            next(iter(trainer.policy.decoder.layers[0].mlp.parameters())).data[0, 0] = float("nan")
        return proper(trainer, *arguments)

    return replaced(step.PolicyTrainer, "step", poisoned)


def stopped(at: int, rank: int) -> Any:
    """A training step in whose beginning one rank is told to end."""
    proper, calls = step.PolicyTrainer.step, [0]

    def stopping(trainer: Any, *arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == at and trainer.world.rank == rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return proper(trainer, *arguments)

    return replaced(step.PolicyTrainer, "step", stopping)


def damaged_on_disk(iteration: int) -> Any:
    """A checkpoint whose bytes change before a rollback to it."""
    proper = course.choose

    def choose(root: Path, world: Any, *arguments: Any, named: int, **settings: Any) -> Any:
        if named == iteration and world.is_main:
            [*_, file] = sorted((root / f"iter_{iteration:07d}").glob("*.distcp"))
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
        return proper(root, world, *arguments, named=named, **settings)

    return replaced(course, "choose", choose)


def told_to_jump(jumped: list[list[int]]) -> Any:
    """A run that leaves samples out from its start."""
    proper = assemble.load_checkpoint

    def load(*arguments: Any, **settings: Any) -> Any:
        return replace(proper(*arguments, **settings), jumped=tuple((start, stop) for start, stop in jumped))

    return replaced(assemble, "load_checkpoint", load)


@contextmanager
def fault(of: dict[str, Any] | None) -> Iterator[None]:
    """The fault of a case."""
    if of is None:
        yield
        return
    if "samples" in of:
        context = faulty_samples(of["samples"], float(of["factor"]))
    elif "poisoned_at" in of:
        context = poisoned_weight(of["poisoned_at"], of["rank"])
    elif "stopped_at" in of:
        context = stopped(of["stopped_at"], of["rank"])
    else:
        context = told_to_jump(of["jumped"])
    with context, damaged_on_disk(of["damaged"]) if "damaged" in of else ExitStack():
        yield


def main() -> None:
    cases, out = Path(sys.argv[1]), Path(sys.argv[2])
    rank = int(os.environ["RANK"])
    for case in json.loads(cases.read_text()):
        if rank >= case["ranks"]:
            continue
        case["environment"]["WORLD_SIZE"] = str(case["ranks"])
        if case["copy"] and rank == 0:  # the others wait for this rank in their start
            source, target, iteration = case["copy"]
            shutil.copytree(source, target)
            (Path(target) / "latest_checkpointed_iteration.txt").write_text(f"{iteration}\n")
        with fault(case["fault"]):
            result = run(case)
        if result["status"]:  # the next case may need what this one should have left
            print(f"{case['name']} ended with {result['status']}: {result['stderr']}", file=sys.stderr, flush=True)
        (out / f"{case['name']}.{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
