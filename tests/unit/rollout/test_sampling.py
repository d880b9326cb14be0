"""Sampling by inverse CDF: the right distribution, the right edges, the same numbers everywhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_sip.rollout.sampling import sample_tokens, uniforms

PROBABILITIES = torch.tensor([[0.0, 0.5, 0.2, 0.0, 0.3, 0.0]], dtype=torch.float64)
LOGITS = PROBABILITIES.log()


def draw(uniform: float, top_p: float = 1.0, temperature: float = 1.0) -> int:
    return int(sample_tokens(LOGITS, torch.tensor([uniform], dtype=torch.float64), temperature, top_p))


@pytest.mark.parametrize(
    ("uniform", "token"), [(0.0, 1), (0.4999, 1), (0.5001, 2), (0.6999, 2), (0.7001, 4), (1 - 1e-16, 4)]
)
def test_draws_in_vocabulary_order_and_never_a_token_without_mass(uniform: float, token: int) -> None:
    assert draw(uniform) == token


def test_top_p_keeps_the_smallest_set_and_rescales_it() -> None:
    # The two likeliest, 0.5 and 0.3, reach 0.6: token 2 is out, and 0.5 / 0.8 = 0.625 divides them.
    assert [draw(u, top_p=0.6) for u in (0.62, 0.63)] == [1, 4]
    assert [draw(u, top_p=0.4) for u in (0.0, 0.99)] == [1, 1]


def test_temperature_zero_is_greedy_and_two_flattens() -> None:
    assert draw(0.99, temperature=0.0) == 1
    weights = PROBABILITIES[0] ** 0.5
    edge = float(weights[1] / weights.sum())
    assert [draw(u, temperature=2.0) for u in (edge - 1e-6, edge + 1e-6)] == [1, 2]


def test_frequencies_follow_the_distribution() -> None:
    draws = torch.from_numpy(np.random.default_rng(0).random(20000))
    tokens = sample_tokens(LOGITS.expand(20000, -1), draws, 1.0, 1.0)
    frequency = torch.bincount(tokens, minlength=6) / 20000
    assert torch.allclose(frequency.double(), PROBABILITIES[0], atol=0.015)


def test_numbers_depend_on_seed_sample_and_rollout_alone() -> None:
    base = uniforms(1, 5, 0, 64)
    assert np.array_equal(base[:10], uniforms(1, 5, 0, 10))
    others = [uniforms(2, 5, 0, 64), uniforms(1, 6, 0, 64), uniforms(1, 5, 1, 64)]
    for other in others:
        assert not np.isin(base, other).any()
    assert 0.4 < float(np.mean([uniforms(1, sample, 0, 8) for sample in range(500)])) < 0.6
