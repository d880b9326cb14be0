"""What the last layer computes at wanted positions alone, against the same attention at all positions."""

from __future__ import annotations

import pytest
import torch

from megatron_sip.model.attention import scored_attention, shared_prefix_attention
from megatron_sip.model.last_layer import WantedPositions
from megatron_sip.preference.layout import scored_tokens
from megatron_sip.rollout.cache import PrefillCache
from megatron_sip.types import PreferenceBatch

LAYOUTS = [[[7, 4, 3], [2, 5, 6], [2, 5, 6]], [[4, 5, 0], [6, 3, 5], [3, 1, 9]], [[1, 1, 1], [1, 4, 1], [9, 0, 2]]]
WIDTH, HEADS, DIM = 16, 4, 8


def batch_of(layout: list[list[int]]) -> PreferenceBatch:
    prefix, chosen, rejected = torch.tensor(layout).unbind(1)
    rows = len(layout)
    ones = torch.ones(rows, dtype=torch.int64)
    return PreferenceBatch(torch.zeros(rows, WIDTH, dtype=torch.int64), prefix, chosen, rejected, ones, ones)


def tensors(rows: int, kv_heads: int) -> list[torch.Tensor]:
    """Query, key and value with gradients."""
    torch.manual_seed(0)
    shapes = [(WIDTH, rows, HEADS, DIM)] + 2 * [(WIDTH, rows, kv_heads, DIM)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_scored_positions_are_those_of_the_whole_row_with_gradients(layout: list[list[int]], kv_heads: int) -> None:
    inputs = tensors(len(layout), kv_heads)
    scored = scored_tokens(batch_of(layout), with_prefix=False)
    out = scored_attention(*inputs, torch.tensor(layout), scale=0.3)
    wanted = shared_prefix_attention(*inputs, torch.tensor(layout), scale=0.3)[scored.source, scored.row][:, None]
    torch.testing.assert_close(out, wanted, atol=1e-12, rtol=0)
    weight = torch.randn_like(out)
    gradients = torch.autograd.grad((out * weight).sum(), inputs)
    for mine, right in zip(gradients, torch.autograd.grad((wanted * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(mine, right, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_the_end_of_a_prefix_is_that_of_the_whole_prefix_and_the_same_is_kept(kv_heads: int) -> None:
    lengths = torch.tensor([16, 3, 1])
    layout = torch.stack([lengths, 0 * lengths, 0 * lengths], dim=1)
    inputs = [tensor.detach() for tensor in tensors(3, kv_heads)]
    whole, ends = PrefillCache(layout), PrefillCache(layout)
    wanted = whole.attend(1, *inputs, scale=0.3)[lengths - 1, torch.arange(3)][:, None]
    torch.testing.assert_close(ends.attend_at(1, *inputs, 0.3, lengths - 1), wanted, atol=1e-12, rtol=0)
    for mine, right in zip(ends.layers[1], whole.layers[1], strict=True):
        assert torch.equal(mine, right)


def test_confines_itself_to_suffixes_and_leaves_everything_else_whole() -> None:
    layout = LAYOUTS[0]
    batch, rows = batch_of(layout), torch.tensor(layout)
    suffixes, all_tokens = (scored_tokens(batch, with_prefix=flag) for flag in (False, True))
    assert WantedPositions.of(rows, (suffixes.row, suffixes.source)) is not None
    assert WantedPositions.of(rows, (all_tokens.row, all_tokens.source)) is None, "prefix tokens are trained too"
    assert WantedPositions.of(rows, None) is None
    assert WantedPositions.of(object(), (suffixes.row, suffixes.source)) is None
