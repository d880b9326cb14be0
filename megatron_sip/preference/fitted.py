"""Scores of a pairwise judge that was not asked about every pair: what all pairs would have said, by the fit.

Under an adaptive plan the opponents of two candidates differ, so that the mean of the answers would say who met whom.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_sip.config.groups import ScoringMethod
from megatron_sip.preference.bradley_terry import Array, Posterior, Prior, Tally, clipped_logit, fit
from megatron_sip.preference.combine import PairwiseScores, mean_scores
from megatron_sip.preference.spec import JudgeSpec
from megatron_sip.types import Answers, Missing, Question, Verdict

VOTE_PRIOR = Prior()
PROBABILITY_PRIOR = Prior(pair_shares=(0.1, 0.3, 1.0), bias_sd=2.0)


def prior_of(judge: JudgeSpec) -> Prior:
    """The prior that fits the judge's kind of answer."""
    return VOTE_PRIOR if judge.answers == "votes" else PROBABILITY_PRIOR


def tally_of(
    num_distinct: int,
    judge: JudgeSpec,
    pools: Sequence[Mapping[Question, Verdict]],
    remaining: frozenset[int] | None = None,
) -> Tally:
    """The answers of `judge` in each of `pools`, among `remaining` candidates (default all)."""
    shape = (len(pools), num_distinct, num_distinct)
    answered, total = np.zeros(shape), np.zeros(shape)
    for pool, verdicts in enumerate(pools):
        for (name, first, second, _), verdict in verdicts.items():
            if name != judge.name or second is None or isinstance(verdict, Missing):
                continue
            if remaining is None or (first in remaining and second in remaining):
                answered[pool, first, second] += 1
                total[pool, first, second] += verdict if judge.answers == "votes" else _logit(verdict)
    return Tally(answered, total, judge.answers)


def _logit(verdict: float) -> float:
    return float(clipped_logit(verdict))


def mean_win_rates(posterior: Posterior, present: Array) -> Array:
    """`[pools, n]`: mean over the other present candidates of P(i beats j); `present` is `[pools, n]`, 1 or 0."""
    beats = posterior.beats() * present[:, None, :]
    own = 0.5 * present
    others = np.maximum(present.sum(axis=1, keepdims=True) - present, 1.0)
    return np.asarray((beats.sum(axis=2) - own) / others)


@dataclass(frozen=True)
class FittedScores:
    """A `combine.PairwiseScores`: the mean of the fitted P(i beats j) over the others, without position bias."""

    def __call__(
        self, num_distinct: int, judge: JudgeSpec, verdicts: Mapping[Question, Verdict], remaining: frozenset[int]
    ) -> list[float | None]:
        """None for a candidate without an answered question among those that remain; nobody's score rests on it."""
        tally = tally_of(num_distinct, judge, [verdicts], remaining)
        met = tally.answered[0].sum(axis=0) + tally.answered[0].sum(axis=1) > 0
        present = [index for index in range(num_distinct) if met[index]]
        scores: list[float | None] = [None] * num_distinct
        if present:
            kept = np.ix_([0], present, present)
            small = Tally(tally.answered[kept], tally.total[kept], tally.kind)
            rates = mean_win_rates(fit(small, prior_of(judge)), np.ones((1, len(present))))
            for place, index in enumerate(present):
                scores[index] = float(np.clip(rates[0, place], 0.0, 1.0))
        return scores


def scores_for(method: ScoringMethod) -> PairwiseScores:
    """How a pairwise judge's answers become scores: fitted where the plan chose the opponents, else means."""
    return FittedScores() if method == "adaptive" else mean_scores


def position_bias(sizes: Sequence[int], answers: Sequence[Answers], judge: JudgeSpec) -> tuple[float, float]:
    """Liking of a pairwise judge for the first option over a batch, in logits: (sum, count), whose ratio is the bias.

    `sizes[i]` counts the distinct candidates of pool i, `answers[i]` are its answers by any plan. The count is the
    information of all pools about the bias, so that the standard error is count ** -0.5, and pairs of several ranks
    or steps add up. The prior of the single fits is taken out again; Laplace's approximation still draws the bias of
    votes to 0, by about an eighth at 8 votes a candidate. (0, 0) without an answer.
    """
    prior = prior_of(judge)
    total = information = 0.0
    for size in sorted(set(sizes)):
        tally = tally_of(size, judge, [given for own, given in zip(sizes, answers, strict=True) if own == size])
        told = tally.answered.reshape(len(tally.answered), -1).sum(axis=1) > 0
        if told.any():
            posterior = fit(Tally(tally.answered[told], tally.total[told], tally.kind), prior)
            precision = 1.0 / posterior.covariance[:, size, size]
            total += float((posterior.bias * precision - prior.bias_mean / prior.bias_sd**2).sum())
            information += float((precision - prior.bias_sd**-2).sum())
    return total, information
