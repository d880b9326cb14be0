"""What tools/bench/step.py and tools/bench/step_sweep.py measured, read from their JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from megatron_sip.cost.settings import RunSettings
from megatron_sip.cost.sizes import ModelSizes
from megatron_sip.errors import DataError

PARTS = ("rollout", "reference", "train", "optimizer", "other")
"""Parts that are predicted. The wait for a judge is the bench's own setting."""


@dataclass(frozen=True)
class MeasuredStep:
    """One measured size.

    `rate` is the best rate of matrix products of one rank's device, in operations a second: on a CPU the ranks share
    the machine's. `seconds` are those of the `PARTS`. `gpu`: the device is one.
    """

    name: str
    model: ModelSizes
    run: RunSettings
    rate: float
    seconds: Mapping[str, float]
    gpu: bool = False

    @property
    def ranks(self) -> int:
        """Ranks of the policy."""
        return self.run.model_parallel

    @property
    def total(self) -> float:
        """Seconds of the parts together."""
        return sum(self.seconds.values())


def read_measured(path: Path) -> list[MeasuredStep]:
    """The sizes of a bench's file, without those that waited for a judge.

    Raises:
        DataError: no such file, or not what the bench writes; the message names what is missing.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror}); give a file of tools/bench/step.py --json") from error
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}); give a file of tools/bench/step.py --json") from error
    try:
        found = [_step(data, point) for point in _points(data) if not point["judge_seconds"]]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is no file of tools/bench/step.py --json: {error!r} is missing or wrong") from error
    if not found:
        raise DataError(f"{path} holds no step without a judge's wait; measure one with tools/bench/step.py")
    return found


def _points(data: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The file's one point, or those of its sweeps."""
    if "sweeps" not in data:
        yield data
        return
    for points in data["sweeps"].values():
        yield from points


def _step(data: Mapping[str, Any], point: Mapping[str, Any]) -> MeasuredStep:
    tp, pp = point["tensor_model_parallel_size"], point["pipeline_model_parallel_size"]
    run = RunSettings(
        prefix_length=point["prefix"],
        suffix_length=point["suffix"],
        num_rollouts=point["k"],
        global_batch_size=point["batch"],
        micro_batch_size=data["micro_batch_size"] or point["batch"],
        rollout_batch_size=data["rollout_batch_size"],
        # Files that do not tell are of the time in which all rows passed the stages together.
        rollout_pipeline_groups=data.get("rollout_pipeline_groups", 1),
        rollout_cuda_graph=data.get("rollout_cuda_graph"),
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        sequence_parallel=data["sequence_parallel"] and tp > 1,
        dtype=data["dtype"],
        shared_prefix=data["shared_prefix"],
    )
    sizes = {item.name: data["model"][item.name] for item in fields(ModelSizes)}
    layout = f" TP {tp} PP {pp}" if tp * pp > 1 else ""
    name = f"P {run.prefix_length} K {run.num_rollouts} B {run.global_batch_size}{layout}"
    rate = point["flops_per_step"] / point["floor_seconds"] / (tp * pp)
    seconds = {part: float(point["parts"][part]) for part in PARTS}
    # Files that do not tell are of the time in which none was measured on a GPU.
    return MeasuredStep(name, ModelSizes(**sizes), run, rate, seconds, gpu=data.get("gpu") is not None)
