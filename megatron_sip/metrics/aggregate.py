"""Metrics of a step as (sum, count) pairs, so that ranks and steps combine exactly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist

from megatron_sip.metrics.names import MetricSpec, metric_specs
from megatron_sip.types import CandidateKind, Missing, MissingReason, NoPair, NoPairReason, Pair, Pool, Scores

SumCount = tuple[float, float]


class StepMetrics:
    """Accumulates (sum, count) per declared name; combines over steps, and over ranks in one tensor.

    The names are declared up front (`names.metric_specs`): an undeclared name is refused, since it would
    give ranks tensors of different lengths. A mean over nothing is absent from `result`, never 0.
    """

    def __init__(self, specs: Sequence[MetricSpec] | None = None) -> None:
        """Declare the metrics; the default is every metric without the scores by judge."""
        declared = metric_specs() if specs is None else specs
        self._specs = {spec.name: spec for spec in declared}
        if len(self._specs) != len(declared):
            raise ValueError("a metric is declared twice")
        self._sums: dict[str, float] = dict.fromkeys(self._specs, 0.0)
        self._counts: dict[str, float] = dict.fromkeys(self._specs, 0.0)

    @property
    def names(self) -> tuple[str, ...]:
        """All declared names, sorted: the row order of `to_tensor`."""
        return tuple(sorted(self._specs))

    def add(self, name: str, value: float, count: float = 1.0) -> None:
        """Add `value`, which is the sum over `count` items (one by default). KeyError for an undeclared name."""
        if name not in self._specs:
            raise KeyError(f"metric {name!r} is not declared in metrics/names.py")
        self._sums[name] += float(value)
        self._counts[name] += float(count)

    def add_all(self, values: Mapping[str, SumCount]) -> None:
        """Add (sum, count) pairs, such as those of `pool_metrics`."""
        for name, (value, count) in values.items():
            self.add(name, value, count)

    def to_tensor(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """`[names, 2]` float64: sum and count of each name in the order of `names`."""
        rows = [[self._sums[name], self._counts[name]] for name in self.names]
        return torch.tensor(rows, dtype=torch.float64, device=device)

    def all_reduce(self, group: dist.ProcessGroup | None = None, device: torch.device | str = "cpu") -> StepMetrics:
        """The sum over the ranks of `group`: one collective of one tensor. Every rank of it must call.

        The ranks of one model-parallel group hold the same pools: add a value on one rank of each such group
        and reduce over the world, or on all ranks and reduce over the data parallel group. Anything else
        counts a pool several times.
        """
        tensor = self.to_tensor(device)
        dist.all_reduce(tensor, group=group)
        return self.from_tensor(tensor)

    def from_tensor(self, tensor: torch.Tensor) -> StepMetrics:
        """New metrics with the same declaration and the sums and counts of `tensor` (`[names, 2]`)."""
        if tuple(tensor.shape) != (len(self._specs), 2):
            raise ValueError(f"expected a tensor of shape {(len(self._specs), 2)}, got {tuple(tensor.shape)}")
        other = StepMetrics(tuple(self._specs.values()))
        for name, (value, count) in zip(self.names, tensor.tolist(), strict=True):
            other.add(name, value, count)
        return other

    def result(self) -> dict[str, float]:
        """Means and totals in declared order. A mean over zero items is left out; a total of zero is 0."""
        values: dict[str, float] = {}
        for name, spec in self._specs.items():
            if spec.reduction == "total":
                values[name] = self._sums[name]
            elif self._counts[name] > 0:
                values[name] = self._sums[name] / self._counts[name]
        return values

    def reset(self) -> None:
        """Forget all values, for instance after a log line."""
        self._sums = dict.fromkeys(self._specs, 0.0)
        self._counts = dict.fromkeys(self._specs, 0.0)


def added(parts: Iterable[Mapping[str, SumCount]]) -> dict[str, SumCount]:
    """The (sum, count) of all parts together, by name."""
    whole: dict[str, SumCount] = {}
    for part in parts:
        for name, (value, count) in part.items():
            before = whole.get(name, (0.0, 0.0))
            whole[name] = (before[0] + value, before[1] + count)
    return whole


def pool_metrics(
    pools: Sequence[Pool], scores: Sequence[Scores | None], pairs: Sequence[Pair | NoPair]
) -> dict[str, SumCount]:
    """(sum, count) of everything that is known of the pools before the model trains.

    `scores[i]` is None where an objective asks no judge. `Scores.total` is in the order of the pool's
    candidates. The keys are the same for any input, also for no pools at all, except for
    `scores/<judge>/<kind>`, which is there for the judges that answered.
    """
    if not len(pools) == len(scores) == len(pairs):
        raise ValueError(f"{len(pools)} pools, {len(scores)} scores and {len(pairs)} pairs do not match")
    table = _Table()
    for pool, score, pair in zip(pools, scores, pairs, strict=True):
        table.add("candidates/pool", len(pool.candidates))
        if score is not None:
            _add_scores(table, pool, score)
        _add_pair(table, pair)
    return table.values


class _Table:
    """The (sum, count) dictionary of one call, with every fixed name present from the start."""

    def __init__(self) -> None:
        names = ["pairs/valid", "scores/chosen", "scores/rejected", "scores/margin"]
        names += ["judge/asked", "judge/missing", "judge/missing_share", "candidates/pool", "candidates/left"]
        names += ["lengths/chosen", "lengths/rejected"]
        names += [f"pairs/{reason}" for reason in NoPairReason]
        names += [f"judge/missing_{reason}" for reason in MissingReason]
        names += [f"{group}{kind}" for group in ("chosen/share_", "scores/") for kind in CandidateKind]
        self.values: dict[str, SumCount] = dict.fromkeys(names, (0.0, 0.0))

    def add(self, name: str, value: float, count: float = 1.0) -> None:
        total, items = self.values.get(name, (0.0, 0.0))
        self.values[name] = (total + value, items + count)


def _add_scores(table: _Table, pool: Pool, score: Scores) -> None:
    if len(score.total) != len(pool.candidates):
        raise ValueError(f"{len(score.total)} scores for the {len(pool.candidates)} candidates of a pool")
    for candidate, value in zip(pool.candidates, score.total, strict=True):
        if isinstance(value, Missing):
            table.add("candidates/left", 1)
        else:
            table.add(f"scores/{candidate.kind}", value)
    for judge, parts in score.by_judge.items():
        for candidate, value in zip(pool.candidates, parts, strict=True):
            if not isinstance(value, Missing):
                table.add(f"scores/{judge}/{candidate.kind}", value)
    missing = sum(score.missing_by_reason.values())
    table.add("judge/asked", score.questions_asked)
    table.add("judge/missing", missing)
    table.add("judge/missing_share", missing, score.questions_asked)
    for reason, count in score.missing_by_reason.items():
        table.add(f"judge/missing_{MissingReason(reason)}", count)


def _add_pair(table: _Table, pair: Pair | NoPair) -> None:
    if isinstance(pair, NoPair):
        table.add(f"pairs/{pair.reason}", 1)
        return
    table.add("pairs/valid", 1)
    for kind in CandidateKind:
        table.add(f"chosen/share_{kind}", float(pair.chosen.kind == kind))
    table.add("lengths/chosen", len(pair.chosen.tokens))
    if pair.rejected is not None:
        table.add("lengths/rejected", len(pair.rejected.tokens))
    if pair.chosen_score is not None:
        table.add("scores/chosen", pair.chosen_score)
    if pair.rejected_score is not None:
        table.add("scores/rejected", pair.rejected_score)
    if pair.chosen_score is not None and pair.rejected_score is not None:
        table.add("scores/margin", pair.chosen_score - pair.rejected_score)
