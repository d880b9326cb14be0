"""Per-row terms to the one number that megatron-core reduces, the same at every layout (method section 5).

megatron-core with `calculate_per_token_loss=True` sums the gradients of all micro-batches and data parallel
ranks and divides them once by the global sum of the counts that the loss function returned. That count is
the number of units of the *primary* term; every other term is scaled by primary count / own count, so that
the division leaves each term over its own global count:

    sum_dpo / pairs + w_nll * sum_nll / chosen tokens + w_ntp * sum_ntp / prefix tokens
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from megatron_sip.config.groups import Config
from megatron_sip.loss.dpo import DpoTerms, dpo_loss, per_token
from megatron_sip.loss.nll import token_nll_sum
from megatron_sip.loss.segments import ReferenceLogps, SegmentLogps
from megatron_sip.types import PreferenceBatch

Unit = Literal["pairs", "chosen_tokens", "prefix_tokens"]
UNITS: tuple[Unit, ...] = ("pairs", "chosen_tokens", "prefix_tokens")
"""Columns of `local_counts`."""


@dataclass(frozen=True)
class LossWeights:
    """Weights of the three terms, and whose count megatron-core divides by."""

    dpo: float
    nll: float
    ntp: float
    primary: Unit

    @classmethod
    def from_config(cls, config: Config) -> LossWeights:
        """The terms of `training.objective` (paper sections 5 and 6)."""
        objective, preference = config.training.objective, config.preference
        if objective == "ntp":
            return cls(dpo=0.0, nll=0.0, ntp=1.0, primary="prefix_tokens")
        if objective in ("online-dpo", "dpo-rewrite-over-rollout"):
            return cls(dpo=1.0, nll=preference.nll_weight, ntp=preference.prefix_ntp_weight, primary="pairs")
        return cls(dpo=0.0, nll=1.0, ntp=preference.prefix_ntp_weight, primary="chosen_tokens")


@dataclass(frozen=True)
class GlobalCounts:
    """What the global batch holds in valid rows: pairs, chosen tokens, and prefix tokens that are predicted."""

    pairs: int
    chosen_tokens: int
    prefix_tokens: int

    @classmethod
    def from_tensor(cls, counts: torch.Tensor) -> GlobalCounts:
        """From the `[3]` tensor of `local_counts` after its sum over data parallel ranks."""
        pairs, chosen, prefix = (int(count) for count in counts.tolist())
        return cls(pairs, chosen, prefix)

    def of(self, unit: Unit) -> int:
        """The count of one unit."""
        return int(getattr(self, unit))


def local_counts(batch: PreferenceBatch) -> torch.Tensor:
    """`[3]` int64 counts of the valid rows in the order of `UNITS`, known before any forward pass.

    Summed over data parallel ranks they make `GlobalCounts`. The first token of a prefix is not predicted.
    """
    valid = batch.valid > 0
    predicted = (batch.prefix_length - 1).clamp(min=0)
    return torch.stack([valid.sum(), (batch.chosen_length * valid).sum(), (predicted * valid).sum()])


@dataclass(frozen=True)
class ObjectiveTerms:
    """What a micro-batch gives to megatron-core's schedule.

    loss     scalar, the local sum; its gradient is to be divided by the global sum of `count`
    count    scalar int32, units of the primary term in this micro-batch
    metrics  [m, 2] float64, sum and count of each of `names`: add over micro-batches and ranks, then divide
    """

    loss: torch.Tensor
    count: torch.Tensor
    metrics: torch.Tensor
    names: tuple[str, ...]


def mean_metrics(metrics: torch.Tensor, names: tuple[str, ...]) -> dict[str, float]:
    """`[m, 2]` summed metrics to means; a metric that counted nothing is left out rather than called 0."""
    return {name: total / count for name, (total, count) in zip(names, metrics.tolist(), strict=True) if count > 0}


def _dpo_terms(
    logps: SegmentLogps,
    reference: ReferenceLogps | None,
    batch: PreferenceBatch,
    beta: float,
    length_normalization: bool,
) -> DpoTerms:
    """DPO of every row; what stands in an invalid row is replaced by 0 before any arithmetic."""
    if reference is None:
        raise ValueError("the DPO term needs the log-probabilities of the reference")
    valid = batch.valid > 0

    def used(sums: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        kept = torch.where(valid, sums, torch.zeros_like(sums))
        return per_token(kept, lengths) if length_normalization else kept

    return dpo_loss(
        used(logps.chosen, batch.chosen_length),
        used(logps.rejected, batch.rejected_length),
        used(reference.chosen, batch.chosen_length),
        used(reference.rejected, batch.rejected_length),
        beta,
    )


def _scale(unit: Unit, weights: LossWeights, counts: GlobalCounts) -> float:
    """Factor that turns megatron-core's division by the primary count into one by the unit's own count."""
    own = counts.of(unit)
    return counts.of(weights.primary) / own if own else 0.0


def objective_terms(
    logps: SegmentLogps,
    reference: ReferenceLogps | None,
    batch: PreferenceBatch,
    weights: LossWeights,
    counts: GlobalCounts,
    beta: float,
    length_normalization: bool,
) -> ObjectiveTerms:
    """The loss of one micro-batch, its count and its metrics.

    `batch` holds the micro-batch's rows (any width), on the device of `logps`; `counts` belong to the
    whole global batch. Rows with `valid = 0` give 0, and their gradient is 0, but the graph is kept, so
    that a rank with nothing to train runs the same backward pass.

    Raises:
        ValueError: DPO without a reference, or with a valid row that has no rejected suffix.
    """
    valid = batch.valid > 0
    loss = torch.zeros((), dtype=logps.chosen.dtype, device=logps.chosen.device)
    recorder = _Recorder(valid)
    if weights.dpo > 0:
        if bool((valid & (batch.rejected_length == 0)).any()):
            raise ValueError("the DPO term needs a rejected suffix in every valid row")
        terms = _dpo_terms(logps, reference, batch, beta, length_normalization)
        dpo = (terms.loss * batch.valid.to(terms.loss.dtype)).sum()
        loss = loss + weights.dpo * _scale("pairs", weights, counts) * dpo
        recorder.rows("loss/dpo", terms.loss)
        recorder.rows("rewards/chosen", terms.chosen_reward)
        recorder.rows("rewards/rejected", terms.rejected_reward)
        recorder.rows("rewards/margins", terms.margin)
        recorder.rows("rewards/accuracies", terms.accuracy)
    if weights.nll > 0:
        nll = token_nll_sum(logps.chosen, batch.valid)
        loss = loss + weights.nll * _scale("chosen_tokens", weights, counts) * nll
        recorder.total("loss/nll", nll, local_counts(batch)[1])
    if weights.ntp > 0:
        ntp = token_nll_sum(logps.prefix, batch.valid)
        loss = loss + weights.ntp * _scale("prefix_tokens", weights, counts) * ntp
        recorder.total("loss/ntp", ntp, local_counts(batch)[2])
    count = local_counts(batch)[UNITS.index(weights.primary)]
    recorder.total("loss", loss, count)
    _record_logps(recorder, logps, reference, weights)
    return ObjectiveTerms(loss, count.to(torch.int32), recorder.tensor(), recorder.names())


def _record_logps(
    recorder: _Recorder,
    logps: SegmentLogps,
    reference: ReferenceLogps | None,
    weights: LossWeights,
) -> None:
    """Log-probabilities of what was trained; which names there are depends on the settings alone."""
    if weights.primary == "prefix_tokens":
        return
    recorder.rows("logps/chosen", logps.chosen)
    if weights.dpo > 0 and reference is not None:
        recorder.rows("logps/rejected", logps.rejected)
        # One-sample estimate of KL(policy || reference) per suffix, as TRL names it; here over the two
        # suffixes that are trained, not over all rollouts.
        difference = logps.chosen - reference.chosen + logps.rejected - reference.rejected
        recorder.rows("objective/kl", difference / 2.0)


class _Recorder:
    """Collects (sum, count) of named metrics, in order, without gradient."""

    def __init__(self, valid: torch.Tensor) -> None:
        self._valid = valid
        self._entries: dict[str, torch.Tensor] = {}

    def rows(self, name: str, values: torch.Tensor) -> None:
        """A metric `[rows]`, averaged over valid rows."""
        kept = torch.where(self._valid, values.detach(), torch.zeros_like(values))
        self.total(name, kept.double().sum(), self._valid.sum())

    def total(self, name: str, total: torch.Tensor, count: torch.Tensor) -> None:
        """A metric that is summed already, with its count."""
        self._entries[name] = torch.stack([total.detach().double(), count.double()])

    def names(self) -> tuple[str, ...]:
        """Names in the order of `tensor`."""
        return tuple(self._entries)

    def tensor(self) -> torch.Tensor:
        """`[m, 2]` float64."""
        return torch.stack(list(self._entries.values()))
