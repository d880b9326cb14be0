"""What is in doubt, and which questions are picked for it."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_sip.preference.bradley_terry import Array, Posterior, Prior, Tally, fit
from megatron_sip.preference.design import choose, doubts

OUT = -np.inf


def test_doubts_by_hand() -> None:
    """Four draws of three candidates. Best: 0 in three, 1 in one. Worst: always 2."""
    totals = np.array([[[3.0, 1.0, 0.0], [4.0, 1.0, 0.0], [2.0, 1.0, 0.0], [1.0, 3.0, 0.0]]])
    found = doubts(totals, 0.9)
    assert (found.best[0], found.worst[0]) == (0.75, 1.0)
    # Taking 0, whose mean is highest, loses 2 in the last draw only.
    loss = 0.5
    top_two = 0.75 * 0.25 / 0.25 + 0.25 * 0.75 / 0.75
    assert found.weight[0] == pytest.approx(np.array([[0, 1, 0], [1, 0, 0], [0, 0, 0]]) * loss * top_two)
    assert doubts(totals, 0.7).weight.sum() == 0.0, "both ends are clear"


def test_who_is_out_is_neither_best_nor_worst() -> None:
    totals = np.array([[[OUT, 1.0, 2.0], [OUT, 2.0, 1.0]], [[OUT, OUT, OUT], [OUT, OUT, OUT]]])
    found = doubts(totals, 0.9)
    assert found.weight[0, 1, 2] > 0
    assert found.weight[0, 0].sum() == 0
    assert (found.best[0], found.worst[0]) == (0.5, 0.5)
    assert found.weight[1].sum() == 0, "nothing is in doubt where nobody is left"


def start(size: int, pools: int = 1) -> tuple[Posterior, Tally]:
    tally = Tally(np.zeros((pools, size, size)), np.zeros((pools, size, size)))
    return fit(tally, Prior()), tally


def pick(weight: Array, left: Array, calls: int) -> Array:
    posterior, tally = start(weight.shape[1])
    noise = np.random.default_rng(0).random(weight.shape)
    return choose(posterior, tally, weight, left, np.array([calls]), noise, 1.0)[0]


def test_the_contrast_that_matters_is_asked_directly_and_both_ways() -> None:
    weight = np.zeros((1, 4, 4))
    weight[0, 1, 3] = weight[0, 3, 1] = 1.0
    picked = pick(weight, 9.0 * (1 - np.eye(4))[None], 4)
    assert picked.sum() == 4
    assert picked[1, 3] == picked[3, 1] == 2, "either order, so that the bias cancels"


def test_a_contrast_that_may_not_be_asked_is_told_by_others() -> None:
    weight = np.zeros((1, 4, 4))
    weight[0, 1, 3] = weight[0, 3, 1] = 1.0
    left = 9.0 * (1 - np.eye(4))[None]
    left[0, 1, 3] = left[0, 3, 1] = 0.0
    picked = pick(weight, left, 6)
    assert picked[1, 3] == picked[3, 1] == 0
    for index in (1, 3):
        assert picked[index].sum() + picked[:, index].sum() >= 2
    assert picked[0, 2] + picked[2, 0] <= 1, "both sides have to be known, the rest only as a bridge"


def test_caps_and_calls_are_kept() -> None:
    weight = (1 - np.eye(3))[None]
    left = np.array([[[0.0, 1.0, 0.0], [1.0, 0.0, 2.0], [0.0, 0.0, 0.0]]])
    assert pick(weight, left, 2).sum() == 2
    assert (pick(weight, left, 50) == left[0]).all()
    assert pick(weight, left, 0).sum() == 0
    assert pick(np.zeros((1, 3, 3)), left, 5).sum() == 0, "nothing is asked where nothing is in doubt"


def test_the_pick_is_the_one_that_shrinks_the_contrasts_most() -> None:
    """The first question against the exact posterior variance of every possible one."""
    rng = np.random.default_rng(4)
    size = 5
    answered = rng.integers(0, 3, (1, size, size)) * (1.0 - np.eye(size))
    tally = Tally(answered, rng.binomial(answered.astype(int), 0.5).astype(float))
    prior = Prior(utility_sds=(1.5,), pair_shares=(0.01,))
    posterior = fit(tally, prior)
    weight = rng.random((1, size, size))
    weight = (weight + weight.transpose(0, 2, 1)) * (1 - np.eye(size))
    picked = choose(
        posterior, tally, weight, 9.0 * (1 - np.eye(size))[None], np.array([1]), np.zeros((1, size, size)), 1.0
    )[0]
    covariance, mean = posterior.covariance[0], posterior.mean[0]

    def after(first: int, second: int) -> float:
        x = np.zeros(size + 1)
        x[first], x[second], x[size] = 1.0, -1.0, 1.0
        chance = 1 / (1 + np.exp(-mean @ x))
        updated = np.linalg.inv(np.linalg.inv(covariance) + chance * (1 - chance) * np.outer(x, x))[:size, :size]
        own = np.diag(updated)
        return float((weight[0] * (own[:, None] + own[None, :] - 2 * updated)).sum())

    left = {(i, j): after(i, j) for i in range(size) for j in range(size) if i != j}
    assert picked[min(left, key=lambda pair: left[pair])] == 1
