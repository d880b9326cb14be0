"""What a step bench found: medians, floor, ratios, the table and the JSON. Pure functions of what was measured."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from megatron_sip.cost.flops import StepFlops, step_flops
from megatron_sip.cost.sizes import ModelSizes
from tools.bench import machine
from tools.bench.step_spec import Point

PARTS = ("rollout", "judge_wait", "reference", "train", "optimizer", "other")
OTHERS_BOUND = 0.2
"""Processors kept busy by others, above which a measurement says less."""


@dataclass(frozen=True)
class Sample:
    """One measurement of a step: seconds of the whole and of its parts.

    `others` are the processors that were kept busy by what is no part of the bench.
    """

    seconds: float
    parts: Mapping[str, float]
    memory_gib: float
    others: float


@dataclass(frozen=True)
class PrefixSample:
    """Seconds of reference and training on the same pairs: one row a pair, and two."""

    shared: float
    unshared: float


@dataclass(frozen=True)
class Result:
    """All that was measured at one point. `rate` is the best matmul rate, in operations a second of all devices.

    `hf_by_cache` are the steps of transformers with either cache of `generate`; the faster is what ours is set against.
    `policy` are the seconds of a step of this size with an instant judge, one a repeat, where they were measured.
    """

    point: Point
    tensor: int
    pipeline: int
    rate: float
    sip: tuple[Sample, ...]
    hf_by_cache: Mapping[str, tuple[Sample, ...]] = field(default_factory=dict)
    prefix: tuple[PrefixSample, ...] = ()
    save: tuple[float, ...] = ()
    policy: tuple[float, ...] = ()

    @property
    def hf_cache(self) -> str | None:
        """The faster cache; None where transformers was not measured."""
        by_cache = self.hf_by_cache
        return min(by_cache, key=lambda cache: median_seconds(by_cache[cache]), default=None)

    @property
    def hf(self) -> tuple[Sample, ...]:
        """The steps with that cache."""
        return () if self.hf_cache is None else self.hf_by_cache[self.hf_cache]


def median_seconds(samples: Sequence[Sample]) -> float:
    """Median of the whole steps."""
    return statistics.median(sample.seconds for sample in samples)


def median_parts(samples: Sequence[Sample]) -> dict[str, float]:
    """Median of each part by itself, in the order of a step; their sum need not be the median of the whole."""
    return {
        name: statistics.median(sample.parts[name] for sample in samples)
        for name in PARTS
        if all(name in sample.parts for sample in samples)
    }


def floor_parts(flops: StepFlops, rate: float) -> dict[str, float]:
    """Seconds of each part that computes, were it all matrix products at `rate` operations a second."""
    counted = {"rollout": flops.rollouts, "reference": flops.reference, "train": flops.train}
    return {name: part.total / rate for name, part in counted.items()}


def prefix_arithmetic(model: ModelSizes, point: Point) -> float:
    """What share of the unshared operations the shared prefix leaves of reference and training."""
    shared, unshared = (step_flops(model, point.work(share)) for share in (True, False))
    return (shared.reference + shared.train).total / (unshared.reference + unshared.train).total


def over_longer(result: Result) -> float | None:
    """Whole step over the longer of policy's and judge's work, the median of the repeats; None with an instant judge.

    The policy's work is a step with an instant judge of the same repeat, so that a slow minute counts in both. Where
    none was measured it is the step less its wait for the judge, which hides by how much answers slow the policy down
    that come while it works.
    """
    judge = result.point.judge_seconds
    if judge <= 0:
        return None
    policy = result.policy or [sample.seconds - sample.parts["judge_wait"] for sample in result.sip]
    return statistics.median(
        sample.seconds / max(alone, judge) for sample, alone in zip(result.sip, policy, strict=True)
    )


def as_json(model: ModelSizes, result: Result) -> dict[str, Any]:
    """One point with its medians, ratios and every single measurement; what was not compared is null."""
    point, whole = result.point, median_seconds(result.sip)
    flops, parts = step_flops(model, point.work()), median_parts(result.sip)
    floor = flops.total / result.rate
    return {
        "prefix": point.prefix,
        "suffix": point.suffix,
        "k": point.rollouts,
        "batch": point.batch,
        "judge_seconds": point.judge_seconds,
        "tensor_model_parallel_size": result.tensor,
        "pipeline_model_parallel_size": result.pipeline,
        "seconds_per_step": whole,
        "parts": parts,
        "save_seconds": statistics.median(result.save) if result.save else None,
        "floor_seconds": floor,
        "floor_parts": floor_parts(flops, result.rate),
        "flops_per_step": flops.total,
        "times_floor": whole / floor,
        "rollout_tokens_per_second": point.batch * point.rollouts * point.suffix / parts["rollout"],
        "step_over_longer_of_policy_and_judge": over_longer(result),
        "memory_gib": max(sample.memory_gib for sample in result.sip),
        "others_busy_cores": max(sample.others for sample in (*result.sip, *result.hf)),
        "repeats": _repeats(result.sip),
        "speedup_vs_hf": median_seconds(result.hf) / whole if result.hf else None,
        "hf": _hf(result) if result.hf else None,
        "unshared": _prefix(model, result) if result.prefix else None,
    }


def _repeats(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    return [{"seconds": one.seconds, "parts": dict(one.parts), "others_busy_cores": one.others} for one in samples]


def _hf(result: Result) -> dict[str, Any]:
    samples = result.hf
    return {
        "cache": result.hf_cache,
        "seconds_by_cache": {cache: median_seconds(steps) for cache, steps in result.hf_by_cache.items()},
        "seconds_per_step": median_seconds(samples),
        "parts": median_parts(samples),
        "memory_gib": max(sample.memory_gib for sample in samples),
        "repeats": _repeats(samples),
    }


def _prefix(model: ModelSizes, result: Result) -> dict[str, Any]:
    ratios = [sample.shared / sample.unshared for sample in result.prefix]
    return {
        "shared_seconds": statistics.median(sample.shared for sample in result.prefix),
        "unshared_seconds": statistics.median(sample.unshared for sample in result.prefix),
        "ratio": statistics.median(ratios),
        "ratio_of_operations": prefix_arithmetic(model, result.point),
        "ratios": ratios,
    }


def warnings_of(results: Sequence[Result], load_before: float) -> list[str]:
    """What makes the times less sure, a sentence each."""
    said = machine.load_warning(load_before)
    for result in results:
        for name, samples in (("sip", result.sip), ("hf", result.hf)):
            said += [f"{describe(result.point)}, {name}: {text}" for text in _unsure(samples)]
    return said


def _unsure(samples: Sequence[Sample]) -> list[str]:
    said: list[str] = []
    if not samples:
        return said
    busy = max(sample.others for sample in samples)
    if busy > OTHERS_BOUND:
        said.append(f"other processes kept {busy:.1f} processors busy; measure again on a quiet machine")
    return said + machine.spread_warning([sample.seconds for sample in samples])


def describe(point: Point) -> str:
    """The sizes of a point in words."""
    text = f"P = {point.prefix}, S = {point.suffix}, K = {point.rollouts}, batch {point.batch}"
    return text if point.judge_seconds <= 0 else f"{text}, judge {point.judge_seconds:.3g} s"


def table(model: ModelSizes, result: Result) -> Table:
    """Seconds by part: ours, the floor, their ratio, and the baseline's with its ratio to ours."""
    found = as_json(model, result)
    ours, floors, theirs = found["parts"], found["floor_parts"], (found["hf"] or {}).get("parts", {})
    shown = Table(title=f"{describe(result.point)}, TP {result.tensor}, PP {result.pipeline}: seconds")
    for name in ("part", "sip", "floor", "sip / floor", *(("hf", "hf / sip") if result.hf else ())):
        shown.add_column(name, justify="left" if name == "part" else "right")
    for name in PARTS:
        if name in ours:
            cells = [name.replace("_", " "), *_ratio(ours[name], floors.get(name))]
            shown.add_row(*cells, *(_against(theirs.get(name), ours[name]) if result.hf else ()))
    whole = [f"whole, median of {len(result.sip)}", *_ratio(found["seconds_per_step"], found["floor_seconds"])]
    shown.add_section()
    shown.add_row(*whole, *(_against(found["hf"]["seconds_per_step"], found["seconds_per_step"]) if result.hf else ()))
    return shown


def _ratio(seconds: float, floor: float | None) -> tuple[str, str, str]:
    if floor is None:
        return f"{seconds:.3f}", "", ""
    return f"{seconds:.3f}", f"{floor:.3f}", f"{seconds / floor:.2f}"


def _against(theirs: float | None, ours: float) -> tuple[str, str]:
    if theirs is None:
        return "", ""
    return f"{theirs:.3f}", f"{theirs / ours:.2f}" if ours > 1e-4 else ""


def remarks(model: ModelSizes, result: Result) -> list[str]:
    """What belongs to a point and stands in no column of its table."""
    found = as_json(model, result)
    said = [
        f"{found['rollout_tokens_per_second']:.0f} tokens/s of rollouts; {found['flops_per_step'] / 1e9:.0f} GFLOP a "
        f"step; most memory {found['memory_gib']:.2f} GiB"
    ]
    if found["hf"] is not None:
        caches = ", ".join(f"{cache} {seconds:.2f} s" for cache, seconds in found["hf"]["seconds_by_cache"].items())
        said.append(f"hf is the fastest of transformers' caches: {caches}")
    if found["save_seconds"] is not None:
        said.append(f"a checkpoint takes {found['save_seconds']:.2f} s besides, whenever one is saved")
    if found["step_over_longer_of_policy_and_judge"] is not None:
        ratio = found["step_over_longer_of_policy_and_judge"]
        said.append(f"the step takes {ratio:.2f} times the longer of the policy's and the judge's work")
    if found["unshared"] is not None:
        prefix = found["unshared"]
        said.append(
            f"reference and train with the prefix shared {prefix['shared_seconds']:.3f} s, with two rows a pair "
            f"{prefix['unshared_seconds']:.3f} s: {prefix['ratio']:.3f} of it; of the operations "
            f"{prefix['ratio_of_operations']:.3f}"
        )
    return said


def machine_line(around: Mapping[str, Any], rates: Mapping[str, float]) -> str:
    """Where it ran: device, threads, load, rates of matrix products."""
    products = ", ".join(f"{size}: {rate / 1e9:.0f}" for size, rate in rates.items())
    return f"{machine.ran_on(around)}; GFLOP/s of matrix products: {products}; {machine.ran_when(around)}"
