"""A softmax over keys that lie in several places: the attention to each, and what joins them.

Exact, because a softmax over all keys is the mean of the parts' values weighted by their sums of exponentials.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

_FLASH_ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
"""What scaled_dot_product_attention calls on a CPU; it also returns the logarithms of the sums, which that drops."""


class Part(NamedTuple):
    """Attention to some of the keys.

    values  [..., q, dim], of the keys, weighted by exp(score - peak)
    sums    [..., q, 1] of these weights, fp32
    peaks   [..., q, 1], fp32
    """

    values: torch.Tensor
    sums: torch.Tensor
    peaks: torch.Tensor


def attention_part(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, bias: torch.Tensor | None = None
) -> Part:
    """Attention of many queries to the same keys.

    query  [batch, heads, q, dim]
    key    [batch, heads, n, dim], as value
    bias   [batch, 1, 1, n] in the dtype of the query, added to the scores
    """
    if query.device.type == "cpu":
        out, sums = _FLASH_ON_CPU(query, key, value, attn_mask=bias, scale=scale)
        return Part(out, torch.ones_like(sums)[..., None], sums[..., None])
    scores = query @ key.transpose(-1, -2) * scale
    return weighted(scores if bias is None else scores + bias, value)


def weighted(scores: torch.Tensor, value: torch.Tensor) -> Part:
    """The part of the keys of `scores` `[..., q, n]`, which may be overwritten."""
    scores = scores.float()
    peaks = scores.amax(-1, keepdim=True)
    weights = scores.sub_(peaks).exp_()
    return Part(weights.to(value.dtype) @ value, weights.sum(-1, keepdim=True), peaks)


def joined(first: Part, second: Part) -> torch.Tensor:
    """The attention to the keys of both, in fp32."""
    peaks = torch.maximum(first.peaks, second.peaks)
    a, b = (first.peaks - peaks).exp_(), (second.peaks - peaks).exp_()
    return (first.values * a + second.values * b) / (first.sums * a + second.sums * b)
