"""A softmax over keys that lie in several places: the attention to each, and what joins them.

Exact: to a softmax over further keys, those of a part are like one key, whose score is the logarithm of the sum of
exp(score) over them and whose value is the attention to them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

_FLASH_ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_EFFICIENT_ON_GPU = torch.ops.aten._scaled_dot_product_efficient_attention
"""What scaled_dot_product_attention calls; these also return the logarithms of the sums, which that drops."""
BIAS_MULTIPLE = 16
"""The memory-efficient kernel reads a bias whose rows begin at multiples of so many elements."""


class Part(NamedTuple):
    """Attention to some of the keys.

    values    [..., q, dim]
    log_sums  [..., q, 1] fp32, the logarithm of the sum of exp(score) over these keys
    """

    values: torch.Tensor
    log_sums: torch.Tensor


def attention_part(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, bias: torch.Tensor | None = None
) -> Part:
    """Attention of many queries to the same keys.

    query  [batch, heads, q, dim]
    key    [batch, heads, n, dim], as value
    bias   [batch, 1, 1, n] in the dtype of the query, added to the scores; on a GPU its rows begin at multiples of
           `BIAS_MULTIPLE`
    """
    if query.device.type == "cpu":
        out, log_sums = _FLASH_ON_CPU(query, key, value, attn_mask=bias, scale=scale)
        return Part(out, log_sums[..., None])
    if query.shape[-1] % 8 == 0:
        # No flash attention, which takes no bias.
        spread = None if bias is None else bias.expand(*query.shape[:3], key.shape[2])
        out, log_sums, *_ = _EFFICIENT_ON_GPU(query, key, value, spread, True, scale=scale)
        return Part(out, log_sums[:, :, : query.shape[2], None])  # it pads the queries
    scores = query @ key.transpose(-1, -2) * scale
    return part_of((scores if bias is None else scores + bias).float(), value)


def part_of(scores: torch.Tensor, value: torch.Tensor) -> Part:
    """The part of the keys whose scores `[..., q, n]`, fp32, are these; they may be overwritten."""
    log_sums = scores.logsumexp(-1, keepdim=True)
    return Part(scores.sub_(log_sums).exp_().to(value.dtype) @ value, log_sums)


def joined(first: Part, second: Part) -> torch.Tensor:
    """The attention to the keys of both; fp32."""
    share = (second.log_sums - first.log_sums).sigmoid()
    return first.values.float().lerp(second.values.float(), share)


def attention_beside(part: Part, scores: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The attention to the keys of `part` and those of `scores` `[..., q, n]`, which may be overwritten; fp32."""
    weights = torch.cat([scores.float(), part.log_sums], dim=-1).softmax(-1)
    on_own = weights[..., :-1].to(value.dtype) @ value
    return on_own.float().addcmul_(weights[..., -1:], part.values.float())
