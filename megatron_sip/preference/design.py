"""Which pairs to ask about next, for many pools of equal size at once. Pure numpy.

Two steps. `doubts` finds the contrasts that matter: pairs that compete for the best or the worst place (top-two
Thompson sampling at both ends, Russo 2016, taken as weights rather than as draws). `choose` then picks questions one
by one so that the posterior variance of these contrasts shrinks most (a greedy A-optimal design on the Laplace
approximation); a question that was just picked makes the next like it worth less.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_sip.preference.bradley_terry import Array, Counts, Posterior, Tally, sigmoid

_SURE = 1e-3


@dataclass(frozen=True)
class Doubts:
    """What is still open in each pool.

    weight  [pools, n, n] symmetric, diagonal 0: how much the contrast of two candidates matters
    best    [pools]: posterior probability of the likeliest best candidate
    worst   [pools]: the same of the worst
    """

    weight: Array
    best: Array
    worst: Array


def doubts(totals: Array, confidence: float) -> Doubts:
    """Doubts from draws of the candidates' totals, `[pools, draws, n]`; -inf is a candidate that is out.

    An end whose winner has at least the probability `confidence` is clear and has no weight any more. The others have
    weight by what is lost there by choosing now: the candidate of the highest mean total instead of the true best.
    """
    weight = np.zeros((len(totals), totals.shape[2], totals.shape[2]))
    surest = []
    for values in (totals, np.where(np.isneginf(totals), -np.inf, -totals)):
        share = _shares(values)
        surest.append(share.max(axis=1))
        doubtful = np.where(surest[-1] < confidence, _expected_loss(values), 0.0)
        weight += doubtful[:, None, None] * _top_two(share)
    return Doubts(weight, *surest)


def _expected_loss(totals: Array) -> Array:
    """`[pools]`: mean over draws of the highest total less that of the candidate whose mean total is highest."""
    mean = totals.mean(axis=1)
    somebody = ~np.isneginf(mean).all(axis=1)
    highest, chosen = totals.max(axis=2).mean(axis=1), mean.max(axis=1)
    return np.where(somebody, highest, 0.0) - np.where(somebody, chosen, 0.0)


def _shares(totals: Array) -> Array:
    """`[pools, n]`: how often each candidate has the highest total."""
    pools, count, size = totals.shape
    winner = totals.argmax(axis=2) + size * np.arange(pools)[:, None]
    return np.bincount(winner.ravel(), minlength=pools * size).reshape(pools, size) / count


def _top_two(share: Array) -> Array:
    """Probability that top-two Thompson sampling compares i and j: p_i p_j / (1 - p_i) + p_j p_i / (1 - p_j)."""
    odds = share / np.maximum(1 - share, _SURE)
    weight = odds[:, :, None] * share[:, None, :]
    weight += weight.transpose(0, 2, 1)
    index = np.arange(share.shape[1])
    weight[:, index, index] = 0.0
    return weight


def choose(
    posterior: Posterior, tally: Tally, weight: Array, open_questions: Array, calls: Counts, noise: Array, unit: float
) -> Counts:
    """`[pools, n, n]`: how often to ask about each ordered pair now.

    weight          [pools, n, n] symmetric, of the contrasts
    open_questions  [pools, n, n] how often each question may still be asked
    calls           [pools] questions to pick; fewer where none is open
    noise           [pools, n, n] in [0, 1), breaks ties
    unit            information of one answer of a judge without doubt of its own: 1 for votes, where p (1 - p) of it
                    is got; 1 / variance for logits
    """
    pools, size, _ = weight.shape
    rows = np.arange(pools)
    covariance = posterior.covariance
    contrasts = -weight.copy()
    index = np.arange(size)
    contrasts[:, index, index] = weight.sum(axis=2)
    mean = posterior.mean
    chance = sigmoid(mean[:, :size, None] - mean[:, None, :size] + mean[:, size, None, None])
    curve = chance * (1 - chance) if tally.kind == "votes" else np.full_like(chance, unit)
    known = tally.answered * curve
    known = known + known.transpose(0, 2, 1)
    kept = posterior.pair_precision[:, None, None]
    left = open_questions.astype(np.int64)
    picked = np.zeros_like(left)
    for turn in range(int(calls.max(initial=0))):
        cost = _noise_variance(known, curve, kept)
        variance, gain = _quadratic_forms(covariance, contrasts)
        worth = gain / (cost + variance) * (1 + 1e-6 * noise)
        worth[left <= 0] = -1.0
        flat = worth.reshape(pools, -1)
        place = flat.argmax(axis=1)
        going = (flat[rows, place] > 0) & (turn < calls)
        if not going.any():
            break
        first, second = place // size, place % size
        ahead = covariance[rows, first] - covariance[rows, second] + covariance[rows, size]
        scale = going / (cost[rows, first, second] + variance[rows, first, second])
        covariance = covariance - ahead[:, :, None] * (ahead * scale[:, None])[:, None, :]
        picked[rows, first, second] += going
        left[rows, first, second] -= going
        fresh = curve[rows, first, second] * going
        known[rows, first, second] += fresh
        known[rows, second, first] += fresh
    return picked


def _noise_variance(known: Array, curve: Array, kept: Array) -> Array:
    """Variance of the next answer about t_i - t_j, given what is known of the pair.

    With c_ij of precision k, answers of information S in all tell S k / (S + k) about the contrast. The next one
    adds the difference.
    """
    after = known + curve
    return (known + kept) * (after + kept) / (curve * kept**2)


def _quadratic_forms(covariance: Array, contrasts: Array) -> tuple[Array, Array]:
    """x' V x and x' V L V x for x = e_i - e_j + e_b of all ordered pairs, `[pools, n, n]` each.

    V is the covariance of utilities and bias, L the Laplacian of the weights, over utilities alone.
    """
    size = contrasts.shape[1]
    product = covariance[:, :, :size] @ contrasts @ covariance[:, :size, :]
    return _form(covariance, size), _form(product, size)


def _form(matrix: Array, size: int) -> Array:
    own = np.diagonal(matrix, axis1=1, axis2=2)[:, :size]
    cross = matrix[:, :size, size]
    rows = own + 2 * cross
    columns = own - 2 * cross
    block = matrix[:, :size, :size]
    return rows[:, :, None] + columns[:, None, :] - 2 * block + matrix[:, size, size, None, None]
