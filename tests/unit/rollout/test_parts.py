"""Attention to keys in two places, joined, against one softmax over all of them."""

from __future__ import annotations

import pytest
import torch

from megatron_sip.rollout.parts import Part, attention_beside, attention_part, joined, part_of


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("stronger", [0, 1], ids=["first", "second"])
def test_two_parts_are_one_softmax(biased: bool, stronger: int) -> None:
    torch.manual_seed(0)
    query = torch.randn(2, 3, 5, 8)
    keys, values = [torch.randn(2, 3, n, 8) for n in (7, 4)], [torch.randn(2, 3, n, 8) for n in (7, 4)]
    keys[stronger] *= 8.0  # nearly all weight on one part
    bias = torch.zeros(2, 1, 1, 7)
    if biased:
        bias[1, ..., 3:] = float("-inf")
    first = attention_part(query, keys[0], values[0], 0.4, bias if biased else None)
    # What other devices compute.
    again = part_of(query @ keys[0].transpose(-1, -2) * 0.4 + bias, values[0])
    scores = torch.cat([query @ key.transpose(-1, -2) * 0.4 for key in keys], dim=-1).double()
    scores[..., :7] += bias
    wanted = scores.softmax(-1) @ torch.cat(values, dim=2).double()
    for part in (first, again):
        beside = attention_beside(part, query @ keys[1].transpose(-1, -2) * 0.4, values[1])
        torch.testing.assert_close(beside.double(), wanted, atol=1e-5, rtol=0)
        both = joined(part, attention_part(query, keys[1], values[1], 0.4))
        torch.testing.assert_close(both.double(), wanted, atol=1e-5, rtol=0)


def test_a_part_that_has_no_weight_leaves_the_other() -> None:
    none = Part(torch.full((1, 1, 4), 9.0), torch.full((1, 1, 1), -200.0))
    torch.testing.assert_close(attention_beside(none, torch.zeros(1, 1, 2), torch.ones(1, 2, 4)), torch.ones(1, 1, 4))
    unseen = torch.full((1, 1, 2), float("-inf"))
    assert attention_beside(none, unseen, torch.ones(1, 2, 4)).tolist() == [[[9.0] * 4]]
