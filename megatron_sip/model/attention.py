"""Attention over rows `[prefix | chosen | rejected | padding]`, in parts.

Prefix and chosen together are one causal sequence; rejected sees the prefix and itself, never chosen. So
two calls of `scaled_dot_product_attention` without a full mask are exact (architecture: shared prefix).

What megatron-core passes through all layers as `attention_mask` carries the row layout here: three lengths
a row, or the cache of a rollout. No module holds state, which 1F1B and recomputation forbid.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import groupby
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.attention.bias import causal_lower_right


@runtime_checkable
class RolloutCache(Protocol):
    """The keys and values of a rollout, which attends in the layer's place."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Store `key`, `value` `[seq, batch, kv_heads, dim]` of `layer`; returns `[seq, batch, heads * dim]`."""
        ...


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, mask: torch.Tensor | None
) -> torch.Tensor:
    """`[batch, heads, q, dim]` over `[batch, kv_heads, k, dim]`; causal where no mask is given."""
    times = query.shape[1] // key.shape[1]
    if times > 1 and query.is_cuda and query.dtype == torch.float32:
        # No fused kernel takes fewer key heads in fp32, and without one all scores lie in memory.
        key, value, times = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1), 1
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=times > 1
    )


def _attend_at_end(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal where the last query stands at the last key: a suffix sees what is before it, and itself so far."""
    suffix, width = query.shape[2], key.shape[2]
    if query.is_cuda and query.dtype != torch.float32:
        # Flash attention knows this mask by its name; given as a tensor, no fused kernel takes it with fewer key heads.
        mask: torch.Tensor = causal_lower_right(suffix, width)
    else:
        mask = torch.ones(suffix, width, dtype=torch.bool, device=query.device).tril(diagonal=width - suffix)
    return _attend(query, key, value, scale, mask)


def _attend_rows(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: tuple[int, ...], scale: float
) -> torch.Tensor:
    """Rows that share one layout: `[batch, heads, width, dim]` in and out; padding gets zeros."""
    prefix, chosen, rejected = lengths
    front, stop = prefix + chosen, prefix + chosen + rejected
    parts = []
    if front:
        parts.append(_attend(query[:, :, :front], key[:, :, :front], value[:, :, :front], scale, None))
    if rejected:
        keys = torch.cat([key[:, :, :prefix], key[:, :, front:stop]], dim=2)
        values = torch.cat([value[:, :, :prefix], value[:, :, front:stop]], dim=2)
        parts.append(_attend_at_end(query[:, :, front:stop], keys, values, scale))
    if stop < query.shape[2]:
        parts.append(torch.zeros_like(query[:, :, stop:]))
    return torch.cat(parts, dim=2)


def _attend_scored(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: tuple[int, ...], scale: float
) -> torch.Tensor:
    """As `_attend_rows`, but `[batch, heads, chosen + rejected, dim]`: only what predicts a suffix token."""
    prefix, chosen, rejected = lengths
    parts, start = [], prefix
    for suffix in (chosen, rejected):
        if suffix == 0:
            continue
        # The last prefix position predicts the first token of the suffix, and the suffix's last one predicts nothing.
        ends = [slice(prefix - 1, prefix), slice(start, start + suffix - 1)]
        keys, values = (
            torch.cat([tensor[:, :, :prefix], tensor[:, :, ends[1]]], dim=2)
            if start > prefix
            else tensor[:, :, : prefix + suffix - 1]
            for tensor in (key, value)
        )
        queries = torch.cat([query[:, :, end] for end in ends], dim=2)
        parts.append(_attend_at_end(queries, keys, values, scale))
        start += suffix
    return torch.cat(parts, dim=2) if parts else query[:, :, :0]


def scored_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: torch.Tensor, scale: float
) -> torch.Tensor:
    """`shared_prefix_attention` at the positions alone that predict a suffix token.

    returns [n, 1, heads * dim] in the order of `preference.layout.scored_tokens` without prefixes
    """
    outputs = [
        part.transpose(1, 2).flatten(0, 1).flatten(1)[:, None]
        for part in _by_layout(query, key, value, layout, scale, _attend_scored)
    ]
    return torch.cat(outputs)


def _by_layout(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: torch.Tensor,
    scale: float,
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, tuple[int, ...], float], torch.Tensor],
) -> list[torch.Tensor]:
    """`attend` over each run of rows with one layout, `[batch, heads, seq, dim]`; see `shared_prefix_attention`."""
    rows = [tuple(row) for row in layout.tolist()]
    width = query.shape[0]
    if any(sum(row) > width for row in rows):
        raise ValueError(f"a row layout of {max(rows, key=sum)} does not fit a sequence of {width}")
    q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
    outputs, start = [], 0
    for lengths, run in groupby(rows):
        stop = start + len(list(run))
        outputs.append(attend(q[start:stop], k[start:stop], v[start:stop], lengths, scale))
        start = stop
    return outputs


def shared_prefix_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention of packed preference rows.

    query   [seq, batch, heads, dim], rotary applied
    key     [seq, batch, kv_heads, dim]
    value   [seq, batch, kv_heads, dim]
    layout  [batch, 3] int64 on the host: prefix, chosen and rejected length
    returns [seq, batch, heads * dim]; padding rows are zero

    Raises:
        ValueError: a row is longer than the sequence.
    """
    outputs = _by_layout(query, key, value, layout, scale, _attend_rows)
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=0)
    return joined.permute(2, 0, 1, 3).reshape(query.shape[0], len(layout), -1)


class SharedPrefixAttention(MegatronModule):
    """megatron-core's `core_attention` slot, filled with the attention above."""

    def __init__(
        self, config: TransformerConfig, layer_number: int, softmax_scale: float | None = None, **_unused: Any
    ) -> None:
        """`_unused` takes what megatron-core hands to any core attention and this one has no use for."""
        super().__init__(config=config)
        self.layer_number = layer_number
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | RolloutCache,
        **_unused: Any,
    ) -> torch.Tensor:
        """`attention_mask` is the row layout `[batch, 3]`, or the cache of a rollout."""
        if isinstance(attention_mask, torch.Tensor):
            return shared_prefix_attention(query, key, value, attention_mask, self.scale)
        return attention_mask.attend(self.layer_number, query, key, value, self.scale)
