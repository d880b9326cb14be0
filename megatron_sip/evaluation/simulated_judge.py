"""A pairwise judge made of numbers, to measure scoring plans where the truth is known.

    logit P(i, shown first, beats j) = s (u_i - u_j) + c_ij + bias,    u_i ~ N(0, 1),  c_ij = -c_ji ~ N(0, pair_sd^2)

s is solved so that one vote on two random candidates is right with the probability `vote_rate`, where bias and c are
0: both come on top and make the judge worse than its vote rate says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq

from megatron_sip.preference.bradley_terry import Array, Counts, sigmoid
from megatron_sip.preference.draw import Purpose, generator
from megatron_sip.types import Answers, Missing, MissingReason, Question

MAX_VOTES = 64
_LOST = Missing(MissingReason.TIMEOUT)


@dataclass(frozen=True)
class JudgeModel:
    """What kind of judge is simulated.

    `bias` is its liking for the first option, in logits; `pair_sd` the spread of its intransitive part.
    `repeats_itself`: it answers the same question (first, second) the same each time. `probabilities`: it answers
    with P(first wins) instead of a vote. `missing` is the share of questions without an answer.
    """

    vote_rate: float = 0.75
    bias: float = 0.0
    pair_sd: float = 0.0
    repeats_itself: bool = False
    probabilities: bool = False
    missing: float = 0.0


def slope_for(vote_rate: float) -> float:
    """s with E[sigmoid(s |u_i - u_j|)] = `vote_rate`, u normal. ValueError for a rate outside (0.5, 1)."""
    if not 0.5 < vote_rate < 1:
        raise ValueError(f"a vote rate lies between 0.5 and 1, not at {vote_rate}")
    points, weights = np.polynomial.hermite_e.hermegauss(200)
    gaps = np.abs(points) * np.sqrt(2)
    weights = weights / weights.sum()
    return float(brentq(lambda slope: weights @ sigmoid(slope * gaps) - vote_rate, 1e-6, 1e3))


class SimulatedJudge:
    """A judge and the pools that it is asked about.

    utilities  [pools, n]
    chances    [pools, n, n] P(row wins), row shown first

    An answer is a function of seed, pool and question: every plan that asks a question hears the same.
    """

    def __init__(self, model: JudgeModel, pools: int, size: int, seed: int) -> None:
        self.model = model
        self.seed = seed
        self.size = size
        draws = np.random.default_rng([seed, pools, size])
        self.utilities = draws.standard_normal((pools, size))
        own = np.triu(draws.standard_normal((pools, size, size)), 1) * model.pair_sd
        gaps = self.utilities[:, :, None] - self.utilities[:, None, :]
        logits = slope_for(model.vote_rate) * gaps + own - own.transpose(0, 2, 1) + model.bias
        self.chances: Array = sigmoid(logits)

    @property
    def pools(self) -> int:
        """Number of pools."""
        return len(self.utilities)

    def verdicts(self, pool: int, votes: int) -> Array:
        """`[votes, n, n]`: the answers to all questions (vote, first, second) about one pool; NaN is missing.

        ValueError for more votes than `MAX_VOTES`.
        """
        if votes > MAX_VOTES:
            raise ValueError(f"{votes} votes are more than the {MAX_VOTES} that are simulated")
        chance = self.chances[pool]
        if self.model.probabilities:
            verdicts = np.repeat(chance[None], votes, axis=0)
        elif self.model.repeats_itself:
            verdicts = np.repeat(self._uniform(pool, 0, 1) < chance, votes, axis=0).astype(np.float64)
        else:
            verdicts = (self._uniform(pool, 0, votes) < chance).astype(np.float64)
        if self.model.missing:
            verdicts[self._uniform(pool, 1, votes) < self.model.missing] = np.nan
        return verdicts

    def answer(self, pool: int, questions: Sequence[Question]) -> Answers:
        """The verdicts on questions about one pool. ValueError for a vote beyond `MAX_VOTES`."""
        if not questions:
            return {}
        vote, first, second = np.array([(asked.vote, asked.first, asked.second) for asked in questions]).T
        verdicts = self.verdicts(pool, int(vote.max()) + 1)[vote, first, second].tolist()
        return {
            question: _LOST if math.isnan(verdict) else verdict
            for question, verdict in zip(questions, verdicts, strict=True)
        }

    def _uniform(self, pool: int, stream: int, votes: int) -> Array:
        """`[votes, n, n]`; more votes only add to what fewer give."""
        return generator(self.seed, Purpose.SIMULATED_JUDGE, pool, stream).random((votes, self.size, self.size))

    def margins(self, best: Counts, worst: Counts) -> Array:
        """`[pools]`: true utility of the chosen less that of the rejected candidate."""
        rows = np.arange(self.pools)
        return np.asarray(self.utilities[rows, best] - self.utilities[rows, worst])
