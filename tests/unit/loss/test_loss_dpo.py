"""DPO and NLL per row, against formulas written out independently in float64."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_sip.loss.dpo import dpo_loss, per_token
from megatron_sip.loss.nll import token_nll_sum


def four(seed: int, rows: int = 6) -> list[torch.Tensor]:
    """Policy chosen, policy rejected, reference chosen, reference rejected: sums of the size of real ones."""
    generator = torch.Generator().manual_seed(seed)
    return [-300.0 + 20.0 * torch.randn(rows, generator=generator, dtype=torch.float64) for _ in range(4)]


def by_hand(pc: float, pr: float, rc: float, rr: float, beta: float) -> tuple[float, float]:
    """Loss and its derivative after pc, from exp alone: -log(1 / (1 + e^-m)) and -beta (1 - 1 / (1 + e^-m))."""
    margin = beta * ((pc - rc) - (pr - rr))
    win = 1.0 / (1.0 + math.exp(-margin))
    return -math.log(win), -beta * (1.0 - win)


@pytest.mark.parametrize("beta", [0.01, 0.1, 0.5])
def test_loss_rewards_and_gradient_match_the_closed_form(beta: float) -> None:
    inputs = [tensor.requires_grad_() for tensor in four(1)]
    terms = dpo_loss(*inputs, beta)
    terms.loss.sum().backward()
    for row in range(6):
        pc, pr, rc, rr = (tensor[row].item() for tensor in inputs)
        loss, slope = by_hand(pc, pr, rc, rr, beta)
        assert terms.loss[row].item() == pytest.approx(loss, rel=1e-12)
        assert inputs[0].grad[row].item() == pytest.approx(slope, rel=1e-10)
        assert inputs[1].grad[row].item() == pytest.approx(-slope, rel=1e-10)
        assert terms.chosen_reward[row].item() == pytest.approx(beta * (pc - rc), rel=1e-12)
        assert terms.rejected_reward[row].item() == pytest.approx(beta * (pr - rr), rel=1e-12)
        assert terms.margin[row].item() == pytest.approx(beta * (pc - rc - pr + rr), rel=1e-9)
        assert terms.accuracy[row].item() == float(pc - rc > pr - rr)
    assert inputs[2].grad is None
    assert inputs[3].grad is None


def test_policy_equal_to_reference_costs_log_2_and_wins_nothing() -> None:
    chosen, rejected, _, _ = four(2)
    terms = dpo_loss(chosen, rejected, chosen, rejected, 0.1)
    torch.testing.assert_close(terms.loss, torch.full_like(chosen, math.log(2.0)))
    assert terms.accuracy.sum().item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_margins_stay_finite(dtype: torch.dtype) -> None:
    margin = torch.tensor([-1e6, -1e3, 0.0, 1e3, 1e6], dtype=dtype, requires_grad=True)
    zero = torch.zeros_like(margin)
    terms = dpo_loss(margin, zero, zero, zero, 1.0)
    terms.loss.sum().backward()
    expected = torch.tensor([1e6, 1e3, math.log(2.0), 0.0, 0.0], dtype=dtype)
    torch.testing.assert_close(terms.loss.detach(), expected)
    torch.testing.assert_close(margin.grad, torch.tensor([-1.0, -1.0, -0.5, 0.0, 0.0], dtype=dtype))


def test_per_token_divides_by_length_and_leaves_empty_parts_at_zero() -> None:
    logps, lengths = torch.tensor([-6.0, -5.0, 0.0]), torch.tensor([3, 10, 0])
    assert per_token(logps, lengths).tolist() == [-2.0, -0.5, 0.0]


def test_nll_skips_rows_of_weight_0_even_if_they_are_not_numbers() -> None:
    logps = torch.tensor([-2.0, float("nan"), -5.0], requires_grad=True)
    loss = token_nll_sum(logps, torch.tensor([1.0, 0.0, 1.0]))
    loss.backward()
    assert loss.item() == 7.0
    assert logps.grad.tolist() == [-1.0, 0.0, -1.0]
