"""Attention in parts against one full mask, and what the padding gets."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_sip.model.attention import shared_prefix_attention
from megatron_sip.preference.layout import position_ids

LAYOUTS = [[[7, 4, 3], [2, 5, 6], [2, 5, 6]], [[9, 0, 0], [1, 1, 1], [14, 0, 0]], [[4, 5, 0], [6, 3, 5], [3, 1, 9]]]


def full_mask(layout: list[list[int]], width: int) -> torch.Tensor:
    """`[rows, 1, width, width]`: the same rule, token by token; padding sees itself to stay finite."""
    mask = torch.zeros(len(layout), 1, width, width, dtype=torch.bool)
    for row, (p, c, r) in enumerate(layout):
        for i in range(width):
            for j in range(i + 1):
                inside = i < p + c + r
                crosses = p + c <= i and p <= j < p + c
                mask[row, 0, i, j] = (inside and not crosses) or i == j
    return mask


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_parts_equal_the_full_mask_with_gradients(layout: list[list[int]], kv_heads: int) -> None:
    width, heads, dim = 16, 4, 8
    torch.manual_seed(0)
    shapes = [(width, len(layout), heads, dim)] + 2 * [(width, len(layout), kv_heads, dim)]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    out = shared_prefix_attention(*inputs, torch.tensor(layout), scale=0.3)
    q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in inputs)
    k, v = (tensor.repeat_interleave(heads // kv_heads, dim=1) for tensor in (k, v))
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=full_mask(layout, width), scale=0.3)
    wanted = wanted.permute(2, 0, 1, 3).reshape(width, len(layout), -1)
    used = torch.arange(width)[:, None] < torch.tensor(layout).sum(1)[None]
    torch.testing.assert_close(out[used], wanted[used], atol=1e-12, rtol=0)
    assert not out[~used].any()
    weight = torch.randn_like(out) * used[..., None]
    gradients = torch.autograd.grad((out * weight).sum(), inputs)
    for mine, right in zip(gradients, torch.autograd.grad((wanted * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(mine, right, atol=1e-12, rtol=0)


def test_a_row_longer_than_the_sequence_is_refused() -> None:
    tensors = [torch.zeros(4, 1, 2, 8)] * 3
    with pytest.raises(ValueError, match="does not fit"):
        shared_prefix_attention(*tensors, torch.tensor([[2, 2, 1]]), scale=1.0)


def test_both_suffixes_start_where_the_prefix_ends() -> None:
    positions = position_ids(torch.tensor([[3, 2, 4]]), 10)
    assert positions.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5, 6, 0]]
