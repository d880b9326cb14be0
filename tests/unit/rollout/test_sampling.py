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


def by_float64(logits: torch.Tensor, uniform: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens by one cumulative sum over all columns, and how far each draw lies from the nearest step of it."""
    steps = torch.softmax(logits.double() / temperature, dim=1).cumsum(1)
    tokens = torch.searchsorted(steps, uniform[:, None], right=True).squeeze(1)
    return tokens, (steps - uniform[:, None]).abs().amin(1)


@pytest.mark.parametrize("temperature", [1.0, 0.3, 4.0])
@pytest.mark.parametrize("columns", [4096, 515, 128, 127, 1])
def test_every_draw_is_that_of_one_cumulative_sum_in_float64(columns: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(columns)
    logits = 3 * torch.randn(512, columns, generator=generator)
    banned = torch.rand(512, columns, generator=generator) < 0.2
    banned[:, -1] = False
    if columns == 4096:
        banned[:, 1000:1700] = True  # whole blocks
    logits.masked_fill_(banned, float("-inf"))
    logits[: min(columns, 4)] *= 3000.0  # nearly all mass on one token
    uniform = torch.rand(512, generator=generator, dtype=torch.float64)
    given = logits.clone()
    tokens = sample_tokens(logits, uniform, temperature, 1.0)
    assert torch.equal(logits, given), "the logits are the caller's"
    wanted, distance = by_float64(logits, uniform, temperature)
    assert not banned[torch.arange(512), tokens].any()
    differing = tokens != wanted
    assert float(distance[differing].max() if differing.any() else 0.0) < 1e-6
    assert int(differing.sum()) <= 2


@pytest.mark.parametrize("columns", [4096, 300])
def test_the_ends_of_the_distribution_are_its_first_and_last_token_with_mass(columns: int) -> None:
    logits = torch.randn(4, columns, generator=torch.Generator().manual_seed(0))
    logits[:, :140] = logits[:, -150:] = float("-inf")
    logits[1] *= 3000.0  # all mass on one token: the others underflow
    likeliest = int(logits[1].argmax())
    for uniform, place in ((0.0, 140), (float(np.nextafter(0.0, 1.0)), 140), (1 - 2.0**-53, columns - 151)):
        drawn = sample_tokens(logits, torch.full((4,), uniform, dtype=torch.float64), 1.0, 1.0)
        assert drawn.tolist() == [place, likeliest, place, place]


def test_bfloat16_logits_are_drawn_as_their_values_in_float32() -> None:
    logits = (3 * torch.randn(64, 1000, generator=torch.Generator().manual_seed(0))).bfloat16()
    uniform = torch.from_numpy(np.random.default_rng(0).random(64))
    for temperature in (1.0, 0.5, 0.0):
        drawn = sample_tokens(logits, uniform, temperature, 1.0)
        assert torch.equal(drawn, sample_tokens(logits.float(), uniform, temperature, 1.0))


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    logits = torch.zeros(3, 700)
    logits[0, [650, 300, 301]] = 2.0
    logits[1, [699, 0]] = 1.0
    assert sample_tokens(logits, torch.zeros(3, dtype=torch.float64), 0.0, 1.0).tolist() == [300, 0, 0]


def test_many_draws_over_many_blocks_pass_a_chi_square_test() -> None:
    count, columns = 50_000, 600
    logits = 0.7 * torch.randn(1, columns, generator=torch.Generator().manual_seed(3))
    wanted = torch.softmax(logits[0].double(), dim=0) * count
    assert float(wanted.min()) > 5
    draws = torch.from_numpy(np.random.default_rng(1).random(count))
    tokens = torch.cat([sample_tokens(logits.expand(len(some), -1), some, 1.0, 1.0) for some in draws.split(10_000)])
    statistic = float(((torch.bincount(tokens, minlength=columns) - wanted) ** 2 / wanted).sum())
    # Of 599 degrees of freedom: mean 599, standard deviation 35.
    assert abs(statistic - (columns - 1)) < 3.5 * (2 * (columns - 1)) ** 0.5


def test_numbers_depend_on_seed_sample_and_rollout_alone() -> None:
    base = uniforms(1, 5, 0, 64)
    assert np.array_equal(base[:10], uniforms(1, 5, 0, 10))
    others = [uniforms(2, 5, 0, 64), uniforms(1, 6, 0, 64), uniforms(1, 5, 1, 64)]
    for other in others:
        assert not np.isin(base, other).any()
    assert 0.4 < float(np.mean([uniforms(1, sample, 0, 8) for sample in range(500)])) < 0.6
