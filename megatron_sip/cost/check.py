"""Predicted against measured seconds of a step, with the speeds of a plan or with speeds fitted on other sizes.

A part's seconds are taken to be a sum of a few kinds of work, each with a constant of the machine: operations over the
rate of matrix products, calls of a layer, parameters, or the step itself. The kinds are those of the plan
(`parts.py`). Constants are fitted with none below 0 and the relative errors squared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from megatron_sip.cost.hardware import Cluster, Efficiency, PartWork
from megatron_sip.cost.measured import PARTS, MeasuredStep
from megatron_sip.cost.memory import memory_per_gpu, stage_parameters
from megatron_sip.cost.parts import StepParts, spread_of_training, step_parts
from megatron_sip.cost.timing import policy_seconds
from megatron_sip.errors import ConfigError

Seconds = Mapping[str, float]
Predictor = Callable[[MeasuredStep], Seconds]


@dataclass(frozen=True)
class Checked:
    """One size: what was measured and what was predicted; `fitted` says that the constants come from this size too."""

    step: MeasuredStep
    predicted: Seconds
    fitted: bool

    def error(self, part: str) -> float:
        """Predicted over measured, less 1; of the whole for the part "whole". 0 where nothing was measured."""
        measured = self.step.total if part == "whole" else self.step.seconds[part]
        predicted = sum(self.predicted.values()) if part == "whole" else self.predicted[part]
        return predicted / measured - 1 if measured else 0.0


def work_of(step: MeasuredStep) -> StepParts:
    """The work of a measured step on its busiest rank."""
    wave = step.run.rollout_batch_size or step.run.global_batch_size
    waves = -(-step.run.global_batch_size // (wave * spread_of_training(step.run, step.ranks).dp))
    return step_parts(step.model, step.run, step.ranks, waves)


def kinds_of_work(step: MeasuredStep) -> dict[str, dict[str, float]]:
    """The kinds of work of each part: seconds at the rate of matrix products, or counts."""
    parts = work_of(step)

    def passes(work: PartWork) -> dict[str, float]:
        return {
            "linear layers and head": work.dense / step.rate,
            "attention": work.attention / step.rate,
            "layer call, s": work.calls,
        }

    prefill = (parts.prefill.dense + parts.prefill.attention) / step.rate
    return {
        "rollout": {"prefill": prefill, **passes(parts.decode)},
        "reference": passes(parts.reference),
        "train": passes(parts.train),
        "optimizer": {"parameter, s": stage_parameters(step.model, step.run)},
        "other": {"step, s": 1.0},
    }


@dataclass(frozen=True)
class Constants:
    """Fitted constants by part and kind of work: times the seconds at the matmul rate, or seconds for each count."""

    values: Mapping[str, Mapping[str, float]]

    def seconds(self, step: MeasuredStep) -> Seconds:
        """Predicted seconds by part."""
        kinds = kinds_of_work(step)
        return {part: sum(self.values[part][kind] * amount for kind, amount in kinds[part].items()) for part in PARTS}


def fit(steps: Sequence[MeasuredStep]) -> Constants:
    """The constants that come nearest to these sizes.

    Raises:
        ConfigError: fewer sizes than constants of a part.
    """
    kinds = [kinds_of_work(step) for step in steps]
    values = {}
    for part in PARTS:
        names = list(kinds[0][part])
        if len(steps) < len(names):
            raise ConfigError(
                f"--fit-on holds {len(steps)} sizes, and {part} has {len(names)} constants; give more files, or a sweep"
            )
        measured = np.array([step.seconds[part] for step in steps])
        used = measured > 0
        amounts = np.array([[kind[part][name] for name in names] for kind in kinds])[used]
        found = nnls(amounts / measured[used, None], np.ones(used.sum()))[0] if used.any() else np.zeros(len(names))
        values[part] = dict(zip(names, found.tolist(), strict=True))
    return Constants(values)


def planned(cluster: Cluster, efficiency: Efficiency) -> Predictor:
    """The prediction of a plan with the shares of the flags; on a CPU the measured matmul rate is the peak."""

    def seconds(step: MeasuredStep) -> Seconds:
        machine = Cluster(
            gpus=step.ranks,
            gpu_memory_gb=cluster.gpu_memory_gb,
            peak_tflops=cluster.peak_tflops if step.gpu else step.rate / 1e12,
            memory_bandwidth_tb=cluster.memory_bandwidth_tb,
            host_bandwidth_gb=cluster.host_bandwidth_gb,
        )
        usable = 1e9 * machine.gpu_memory_gb * (1 - machine.memory_reserve)
        memory = memory_per_gpu(step.model, step.run, 1, usable, efficiency.row_padding)
        found = policy_seconds(step.model, step.run, machine, efficiency, memory)
        return {
            "rollout": found.rollouts,
            "reference": found.reference,
            "train": found.train + found.gradient_reduce,
            "optimizer": found.optimizer,  # medians leave out the steps that move the reference
            # The weights are on their way while answers are awaited, and the bench's judge is instant.
            "other": found.reference_swap if step.gpu else 0.0,
        }

    return seconds


def check(steps: Sequence[MeasuredStep], predict: Predictor, fitted_on: Sequence[MeasuredStep] = ()) -> list[Checked]:
    """Every size against its prediction; one that was measured twice is fitted on, whichever time it was."""
    sizes = [(step.model, step.run) for step in fitted_on]
    return [Checked(step, predict(step), (step.model, step.run) in sizes) for step in steps]
