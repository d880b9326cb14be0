"""The Bradley-Terry fit against independent formulas, and what has to hold for any tally."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit

from megatron_sip.preference.bradley_terry import CLIP, AnswerKind, Array, Prior, Tally, clipped_logit, fit, sigmoid

SD, SHARE = 1.5, 0.4
PRIOR = Prior(utility_sds=(SD,), pair_shares=(SHARE,), bias_mean=0.3, bias_sd=0.8, answer_sd=0.25)


def random_tally(seed: int, pools: int, size: int, kind: AnswerKind = "votes", votes: int = 3) -> Tally:
    rng = np.random.default_rng(seed)
    answered = rng.integers(0, votes + 1, (pools, size, size)) * (1.0 - np.eye(size))
    if kind == "votes":
        return Tally(answered, rng.binomial(answered.astype(int), 0.6).astype(float), kind)
    return Tally(answered, answered * rng.normal(0.5, 1.5, answered.shape), kind)


def minus_log_joint(x: Array, tally: Tally, prior: Prior, sd: float, share: float) -> float:
    """The joint density written out pair by pair, over x = (t, b, c of the pairs i < j)."""
    size = tally.size
    utility, bias, pair = x[:size], x[size], x[size + 1 :]
    value = 0.5 * (utility**2).sum() / sd**2 + 0.5 * (bias - prior.bias_mean) ** 2 / prior.bias_sd**2
    value += 0.5 * (pair**2).sum() / (share * sd) ** 2
    for (i, j), own in zip(combinations(range(size), 2), pair, strict=True):
        for first, second, sign in ((i, j, 1.0), (j, i, -1.0)):
            logit = utility[first] - utility[second] + bias + sign * own
            count, total = tally.answered[0, first, second], tally.total[0, first, second]
            if tally.kind == "votes":
                value -= total * np.log(expit(logit)) + (count - total) * np.log(expit(-logit))
            else:
                # Up to what does not depend on the parameters: (total - count logit)^2 / (2 count sd^2).
                value += (0.5 * count * logit**2 - total * logit) / prior.answer_sd**2
    return float(value)


def hessian(x: Array, tally: Tally) -> Array:
    """Central second differences of `minus_log_joint`."""
    step, width = 1e-3, len(x)
    shifts = step * np.eye(width)

    def at(y: Array) -> float:
        return minus_log_joint(y, tally, PRIOR, SD, SHARE)

    result = np.empty((width, width))
    for i in range(width):
        for j in range(width):
            plus, minus = at(x + shifts[i] + shifts[j]), at(x + shifts[i] - shifts[j])
            result[i, j] = (plus - minus - at(x - shifts[i] + shifts[j]) + at(x - shifts[i] - shifts[j])) / (
                4 * step**2
            )
    return result


@pytest.mark.parametrize("kind", ["votes", "probabilities"])
@pytest.mark.parametrize("size", [2, 5])
def test_mode_and_covariance_are_those_of_the_joint_density(size: int, kind: AnswerKind) -> None:
    tally = random_tally(7, 1, size, kind)
    width = size + 1 + size * (size - 1) // 2
    found = minimize(minus_log_joint, np.zeros(width), (tally, PRIOR, SD, SHARE), method="BFGS", options={"gtol": 1e-8})
    posterior = fit(tally, PRIOR)
    assert posterior.mean[0] == pytest.approx(found.x[: size + 1], abs=1e-5)
    # Integrating c out of a Gaussian leaves the block of the whole covariance.
    covariance = np.linalg.inv(hessian(found.x, tally))[: size + 1, : size + 1]
    assert posterior.covariance[0] == pytest.approx(covariance, rel=2e-3, abs=2e-4)


@pytest.mark.parametrize("kind", ["votes", "probabilities"])
def test_components_are_weighted_by_their_laplace_evidence(kind: AnswerKind) -> None:
    tally = random_tally(3, 1, 4, kind)
    prior = Prior(utility_sds=(0.7, 2.5), pair_shares=(0.2, 0.9), bias_sd=0.8, answer_sd=0.5)
    logs = []
    for sd, share in ((0.7, 0.2), (0.7, 0.9), (2.5, 0.2), (2.5, 0.9)):
        arguments = (tally, prior, sd, share)
        found = minimize(minus_log_joint, np.zeros(11), arguments, method="BFGS", options={"gtol": 1e-8})
        step = 1e-3 * np.eye(11)

        def at(x: Array, arguments: tuple[Tally, Prior, float, float] = arguments) -> float:
            return minus_log_joint(x, *arguments)

        curve = np.array(
            [
                [at(found.x + a + b) - at(found.x + a - b) - at(found.x - a + b) + at(found.x - a - b) for b in step]
                for a in step
            ]
        ) / (4e-6)
        scale = 4 * np.log(sd) + 6 * np.log(share * sd)  # the normalisation of the priors of 4 t and 6 c
        logs.append(-found.fun - scale - 0.5 * np.linalg.slogdet(curve)[1])
    expected = np.exp(np.array(logs) - max(logs))
    assert fit(tally, prior).weight[0] == pytest.approx(expected / expected.sum(), abs=2e-3)


def test_nothing_answered_leaves_the_prior() -> None:
    posterior = fit(Tally(np.zeros((1, 4, 4)), np.zeros((1, 4, 4))), PRIOR)
    assert posterior.mean[0] == pytest.approx([0, 0, 0, 0, 0.3])
    assert posterior.covariance[0] == pytest.approx(np.diag([SD**2] * 4 + [0.64]))
    assert posterior.beats()[0] == pytest.approx(np.full((4, 4), 0.5))


def test_a_pool_does_not_depend_on_the_pools_beside_it() -> None:
    tally = random_tally(5, 6, 7)
    together = fit(tally, Prior())
    for pool in range(6):
        alone = fit(Tally(tally.answered[pool : pool + 1], tally.total[pool : pool + 1]), Prior())
        assert together.mode[pool] == pytest.approx(alone.mode[0], abs=1e-12)
        assert together.weight[pool] == pytest.approx(alone.weight[0], abs=1e-12)


def test_renamed_candidates_have_the_same_utilities() -> None:
    tally = random_tally(9, 1, 6)
    order = np.array([3, 0, 5, 1, 4, 2])
    renamed = Tally(tally.answered[:, order][:, :, order], tally.total[:, order][:, :, order])
    mean = fit(tally, Prior()).mean[0]
    assert fit(renamed, Prior()).mean[0] == pytest.approx(np.append(mean[order], mean[6]), abs=1e-8)


def test_swapped_options_turn_the_bias_and_leave_the_utilities() -> None:
    tally = random_tally(9, 1, 6)
    swapped = Tally(tally.answered.transpose(0, 2, 1), (tally.answered - tally.total).transpose(0, 2, 1))
    mean, other = fit(tally, Prior()).mean[0], fit(swapped, Prior()).mean[0]
    assert other[:6] == pytest.approx(mean[:6], abs=1e-8)
    assert other[6] == pytest.approx(-mean[6], abs=1e-8)


def test_one_sided_answers_converge_to_finite_utilities() -> None:
    answered = 50.0 * (1 - np.eye(8))
    total = np.triu(answered)
    mean = fit(Tally(answered[None], total[None]), Prior()).mean[0]
    assert np.isfinite(mean).all()
    assert (np.diff(mean[:8]) < 0).all()
    assert abs(mean[8]) < 1e-6


@pytest.mark.parametrize("bias", [-2.0, 0.0, 1.5])
def test_the_bias_is_fitted_and_does_not_move_the_utilities(bias: float) -> None:
    utility = np.array([1.2, 0.4, 0.0, -0.5, -1.1])
    gaps = utility[:, None] - utility[None, :]
    answered = 4000.0 * (1 - np.eye(5))
    tally = Tally(answered[None], (answered * sigmoid(gaps + bias))[None])
    mean = fit(tally, Prior(pair_shares=(0.01,))).mean[0]
    assert mean[:5] == pytest.approx(utility, abs=0.02)
    assert mean[5] == pytest.approx(bias, abs=0.02)


def test_repeating_one_pair_does_not_make_it_certain() -> None:
    """What a judge says of one pair may be the pair's own; the share of that bounds what a pair can tell."""
    sure = []
    for votes in (10.0, 1e6):
        answered = np.zeros((1, 3, 3))
        answered[0, 0, 1] = answered[0, 1, 0] = votes
        total = answered * np.array([[0, 0.8, 0], [0.2, 0, 0], [0, 0, 0]])
        covariance = fit(Tally(answered, total), PRIOR).covariance[0]
        sure.append(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    least = 1 / (1 / (SHARE * SD) ** 2 + 1 / (2 * SD**2))
    assert sure[1] == pytest.approx(least, rel=1e-3)
    assert sure[0] > 1.2 * least


def test_draws_have_the_moments_of_the_mixture() -> None:
    posterior = fit(random_tally(11, 2, 4), Prior())
    draws = posterior.draws(np.random.default_rng(0).standard_normal((2, 40_000, 5)))
    assert draws.shape == (2, 40_000, 4)
    assert draws.mean(axis=1) == pytest.approx(posterior.mean[:, :4], abs=0.03)
    between = posterior.mode - posterior.mean[:, None]
    spread = np.einsum("pg,pgi,pgj->pij", posterior.weight, between, between) + posterior.covariance
    for pool in range(2):
        assert np.cov(draws[pool].T) == pytest.approx(spread[pool, :4, :4], abs=0.06)


def test_the_chance_to_win_is_that_of_the_draws() -> None:
    posterior = fit(random_tally(13, 1, 4), Prior())
    draws = posterior.draws(np.random.default_rng(1).standard_normal((1, 40_000, 5)))[0]
    expected = sigmoid(draws[:, :, None] - draws[:, None, :]).mean(axis=0)
    assert posterior.beats()[0] == pytest.approx(expected, abs=0.015)
    assert posterior.beats()[0] + posterior.beats()[0].T == pytest.approx(np.ones((4, 4)))


def test_logits_are_kept_finite() -> None:
    assert clipped_logit(np.array([0.0, 1.0])) == pytest.approx([np.log(CLIP / (1 - CLIP)), np.log((1 - CLIP) / CLIP)])
    assert clipped_logit(np.array([0.3])) == pytest.approx([np.log(3 / 7)])


@pytest.mark.parametrize("prior", [{"utility_sds": ()}, {"pair_shares": (0.0,)}, {"bias_sd": -1.0}])
def test_a_prior_that_makes_no_sense_is_refused(prior: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="the prior needs"):
        Prior(**prior)  # type: ignore[arg-type]
