"""Bradley-Terry fits with a position bias, for many pools of equal size at once. Pure numpy.

The model of a pairwise judge: candidate i has a utility t_i, and with i shown first and j second

    logit P(i wins) = t_i - t_j + c_ij + b,    t_i ~ N(0, s^2),  c_ij = -c_ji ~ N(0, (r s)^2),  b ~ N(m_b, s_b^2)

b is the judge's liking for the first option, c_ij what no ranking explains (an intransitive judge) and what a judge
that is asked the same again says again. The posterior is Laplace's approximation around the mode (MAP), with c
integrated out, and a mixture over a small grid of (s, r) weighted by marginal likelihood (empirical Bayes), because
nobody says beforehand how noisy a judge is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[np.float64]
Counts: TypeAlias = npt.NDArray[np.int64]
Mask: TypeAlias = npt.NDArray[np.bool_]
AnswerKind: TypeAlias = Literal["votes", "probabilities"]

CLIP = 0.005
"""Probabilities are taken at least so far from 0 and 1: beyond it the digits of a judge say little."""
_MAX_STEPS = 60
_TINY = 1e-12
_TOLERANCE = 1e-4
"""Logits; the step that is smaller is still taken, and Newton's error after it is of the order of its square."""


@dataclass(frozen=True)
class Prior:
    """What is believed of a judge before it has answered.

    `utility_sds` and `pair_shares` span the grid of s and r. `bias_mean` and `bias_sd` are in logits; the fit of
    earlier pools of the same judge may be given here. `answer_sd` is the noise of one logit of a judge that answers
    with probabilities; votes have none beyond their own.
    """

    utility_sds: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    pair_shares: tuple[float, ...] = (0.2,)
    bias_mean: float = 0.0
    bias_sd: float = 1.0
    answer_sd: float = 0.3

    def __post_init__(self) -> None:
        spreads = (*self.utility_sds, *self.pair_shares, self.bias_sd, self.answer_sd)
        if not self.utility_sds or not self.pair_shares or min(spreads) <= 0:
            raise ValueError("the prior needs at least one utility sd and pair share, and all spreads above 0")

    def grid(self) -> Array:
        """`[grid, 2]`: utility sd s and pair sd r s of each component."""
        return np.array([(sd, share * sd) for sd in self.utility_sds for share in self.pair_shares])


@dataclass(frozen=True)
class Tally:
    """Answers of one pairwise judge about pools of n candidates; row = shown first, column = shown second.

    answered  [pools, n, n] float64, answers received
    total     [pools, n, n] float64, sum of their verdicts (votes), or of the logits of their clipped verdicts
    kind      what an answer is
    """

    answered: Array
    total: Array
    kind: AnswerKind = "votes"

    @property
    def size(self) -> int:
        """Candidates of a pool."""
        return int(self.answered.shape[1])


def clipped_logit(probability: npt.ArrayLike) -> Array:
    """The logit of a probability that is kept `CLIP` away from 0 and 1."""
    kept = np.clip(np.asarray(probability, dtype=np.float64), CLIP, 1 - CLIP)
    return np.log(kept) - np.log1p(-kept)


def sigmoid(logit: Array) -> Array:
    """1 / (1 + exp(-logit)), without overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * logit))


@dataclass(frozen=True)
class Posterior:
    """A mixture of Gaussians over (t_1 .. t_n, b) of each pool.

    weight   [pools, grid], sums to 1
    mode     [pools, grid, n + 1]
    root     [pools, grid, n + 1, n + 1]; root @ root.T is the covariance
    pair_sd  [grid], sd of c_ij in each component
    """

    weight: Array
    mode: Array
    root: Array
    pair_sd: Array

    @property
    def mean(self) -> Array:
        """`[pools, n + 1]`: posterior mean of utilities and bias."""
        return np.asarray((self.weight[..., None] * self.mode).sum(axis=1))

    @property
    def bias(self) -> Array:
        """`[pools]`: fitted liking for the first option, in logits."""
        return self.mean[:, -1]

    @property
    def covariance(self) -> Array:
        """`[pools, n + 1, n + 1]`: mean of the components' covariances."""
        scaled = self.root * np.sqrt(self.weight)[..., None, None]
        pools, grid, width, _ = scaled.shape
        flat = scaled.transpose(0, 2, 1, 3).reshape(pools, width, grid * width)
        return flat @ flat.transpose(0, 2, 1)

    @property
    def pair_precision(self) -> Array:
        """`[pools]`: mean precision of c_ij, 1 / logits^2."""
        return 1.0 / (self.weight @ self.pair_sd) ** 2

    def draws(self, normals: Array) -> Array:
        """`[pools, draws, n]` utilities from standard `normals` `[pools, draws, n + 1]`.

        Each component gives as many draws as its weight is worth, so that only the normals are random.
        """
        pools, count, width = normals.shape
        edges = self.weight.cumsum(axis=1)[:, None, :-1]
        middle = ((np.arange(count) + 0.5) / count)[None, :, None]
        component = (middle > edges).sum(axis=2)
        values = np.empty((pools, count, width))
        for index in range(self.weight.shape[1]):
            chosen = component == index
            if chosen.any():
                of_pool = chosen.any(axis=1)
                moved = normals[of_pool] @ self.root[of_pool, index].transpose(0, 2, 1)
                moved += self.mode[of_pool, index, None]
                values[chosen] = moved[chosen[of_pool]]
        return values[..., :-1]

    def beats(self) -> Array:
        """`[pools, n, n]`: posterior mean of P(i beats j) without position bias; 1/2 on the diagonal.

        The mean of a sigmoid over a Gaussian is taken as in MacKay (1992): sigmoid(m / sqrt(1 + pi v / 8)).
        """
        size = self.mode.shape[2] - 1
        mode, root = self.mode[..., :size], self.root[..., :size, :]
        covariance = root @ np.swapaxes(root, -1, -2)
        own = np.diagonal(covariance, axis1=-2, axis2=-1)
        variance = np.maximum(own[..., :, None] + own[..., None, :] - 2 * covariance, 0.0)
        gap = mode[..., :, None] - mode[..., None, :]
        mean = sigmoid(gap / np.sqrt(1 + np.pi / 8 * variance))
        return np.asarray((self.weight[..., None, None] * mean).sum(axis=1))


def fit(tally: Tally, prior: Prior) -> Posterior:
    """The posterior of every pool; pools do not depend on one another."""
    pools, size = tally.answered.shape[:2]
    grid = prior.grid()
    count = len(grid)
    system = _System(
        answered=np.repeat(tally.answered, count, axis=0),
        total=np.repeat(tally.total, count, axis=0),
        votes=tally.kind == "votes",
        utility_precision=np.tile(grid[:, 0] ** -2, pools),
        pair_precision=np.tile(grid[:, 1] ** -2, pools),
        prior=prior,
    )
    mode, information, pair, pair_information = _maximise(system)
    lower = np.linalg.cholesky(information)
    root = np.swapaxes(np.linalg.inv(lower), -1, -2)
    log_det = 2 * np.log(np.diagonal(lower, axis1=1, axis2=2)).sum(axis=1)
    upper = np.triu_indices(size, 1)
    ratio = pair_information[:, upper[0], upper[1]] / system.pair_precision[:, None]
    evidence = system.log_joint(mode, pair) - 0.5 * (log_det + np.log(ratio).sum(axis=1))
    evidence = evidence.reshape(pools, count)
    weight = np.exp(evidence - evidence.max(axis=1, keepdims=True))
    weight /= weight.sum(axis=1, keepdims=True)
    width = size + 1
    return Posterior(weight, mode.reshape(pools, count, width), root.reshape(pools, count, width, width), grid[:, 1])


@dataclass(frozen=True)
class _System:
    """The log joint density of `rows` independent problems (pools times grid) and its derivatives."""

    answered: Array
    total: Array
    votes: bool
    utility_precision: Array
    pair_precision: Array
    prior: Prior

    def logits(self, mode: Array, pair: Array) -> Array:
        """`[rows, n, n]`: logit that the row candidate wins when it is shown first."""
        utility = mode[:, :-1]
        return utility[:, :, None] - utility[:, None, :] + pair + mode[:, -1, None, None]

    def slopes(self, logit: Array) -> tuple[Array, Array]:
        """First derivative and negative second derivative of the log-likelihood by logit, `[rows, n, n]` each."""
        if self.votes:
            chance = sigmoid(logit)
            expected = self.answered * chance
            return self.total - expected, expected * (1 - chance)
        precision = self.prior.answer_sd**-2
        return (self.total - self.answered * logit) * precision, self.answered * precision

    def log_joint(self, mode: Array, pair: Array) -> Array:
        """`[rows]`: log-likelihood plus log-prior, up to a constant that is the same for the whole grid."""
        logit = self.logits(mode, pair)
        if self.votes:
            terms = self.total * logit - self.answered * np.logaddexp(0.0, logit)
        else:
            terms = (self.total * logit - 0.5 * self.answered * logit**2) * self.prior.answer_sd**-2
        rows = len(mode)
        utility, bias = mode[:, :-1], mode[:, -1]
        size = utility.shape[1]
        penalty = self.utility_precision * (utility**2).sum(axis=1) - size * np.log(self.utility_precision)
        penalty += ((bias - self.prior.bias_mean) / self.prior.bias_sd) ** 2
        penalty += 0.5 * self.pair_precision * (pair**2).reshape(rows, -1).sum(axis=1)
        return np.asarray(terms.reshape(rows, -1).sum(axis=1) - 0.5 * penalty)

    def newton(self, mode: Array, pair: Array) -> tuple[Array, Array, Array, Array]:
        """One Newton step: step of (t, b), step of c, information of (t, b) with c integrated out, and that of c.

        c_ij appears in two terms only, so that it is eliminated pair by pair (a Schur complement): n + 1 unknowns
        remain.
        """
        slope, curve = self.slopes(self.logits(mode, pair))
        size = slope.shape[1]
        both = curve + curve.transpose(0, 2, 1)
        odd = curve - curve.transpose(0, 2, 1)
        kept = self.pair_precision[:, None, None]
        pair_information = both + kept
        pair_slope = slope - slope.transpose(0, 2, 1) - kept * pair
        share = kept / pair_information
        information = self._information(both, odd, share)
        explained = pair_slope / pair_information
        gradient = np.empty_like(mode)
        gradient[:, :size] = (slope - slope.transpose(0, 2, 1) - both * explained).sum(axis=2)
        gradient[:, :size] -= mode[:, :size] * self.utility_precision[:, None]
        rows = len(mode)
        gradient[:, size] = (slope - 0.5 * odd * explained).reshape(rows, -1).sum(axis=1)
        gradient[:, size] -= (mode[:, size] - self.prior.bias_mean) / self.prior.bias_sd**2
        step = np.asarray(np.linalg.solve(information, gradient[..., None])[..., 0], dtype=np.float64)
        moved = both * (step[:, :size, None] - step[:, None, :size]) + odd * step[:, size, None, None]
        return step, (pair_slope - moved) / pair_information, information, pair_information

    def _information(self, both: Array, odd: Array, share: Array) -> Array:
        rows, size, _ = both.shape
        information = np.empty((rows, size + 1, size + 1))
        reduced = both * share
        information[:, :size, :size] = -reduced
        index = np.arange(size)
        information[:, index, index] += reduced.sum(axis=2) + self.utility_precision[:, None]
        cross = (odd * share).sum(axis=2)
        information[:, :size, size] = cross
        information[:, size, :size] = cross
        lost = odd**2 * share / self.pair_precision[:, None, None]
        information[:, size, size] = 0.5 * (both - lost).reshape(rows, -1).sum(axis=1) + self.prior.bias_sd**-2
        return information


def _maximise(system: _System) -> tuple[Array, Array, Array, Array]:
    """Mode of (t, b), their information, mode of c, its information.

    Damped Newton: with r the largest change of a logit, the step is scaled by ln(1 + r) / r, which ascends from
    anywhere on a logistic likelihood (Sun and Tran-Dinh, Math. Program. 178, 2019, for nu = 2) and is a full step in
    the end. A row that has converged is left alone, so that no pool depends on the pools beside it.

    Raises:
        RuntimeError: no convergence, which a finite tally and a proper prior exclude.
    """
    rows, size, _ = system.answered.shape
    mode = np.zeros((rows, size + 1))
    mode[:, size] = system.prior.bias_mean
    pair = np.zeros_like(system.answered)
    information = np.empty((rows, size + 1, size + 1))
    pair_information = np.empty_like(pair)
    going = np.ones(rows, dtype=bool)
    for _ in range(_MAX_STEPS):
        step, pair_step, *precisions = system.newton(mode, pair)
        information[going], pair_information[going] = (precision[going] for precision in precisions)
        change = step[:, :size, None] - step[:, None, :size] + pair_step + step[:, size, None, None]
        largest = np.abs(change).reshape(rows, -1).max(axis=1)
        scale = going * (np.log1p(largest) / np.maximum(largest, _TINY) if system.votes else 1.0)
        mode += scale[:, None] * step
        pair += scale[:, None, None] * pair_step
        going &= largest > _TOLERANCE
        if not going.any():
            return mode, information, pair, pair_information
    raise RuntimeError(f"a Bradley-Terry fit has not converged in {_MAX_STEPS} steps")
