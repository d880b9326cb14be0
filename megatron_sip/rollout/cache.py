"""Keys and values of a rollout: each prefix once, each continuation its own tokens."""

from __future__ import annotations

import torch

from megatron_sip.model.attention import shared_prefix_attention


class PrefillCache:
    """Attends over the prefixes and keeps their keys and values.

    `layout` is `[prefixes, 3]` with zero suffix lengths; `layers[n]` holds copies of key and value
    `[prefixes, kv_heads, seq, dim]`: what comes from the layer is a view of the whole fused projection.
    """

    def __init__(self, layout: torch.Tensor) -> None:
        self.layout = layout
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Causal attention of each prefix over itself; `[seq, prefixes, heads * dim]`."""
        self.layers[layer] = (key.permute(1, 2, 0, 3).contiguous(), value.permute(1, 2, 0, 3).contiguous())
        return shared_prefix_attention(query, key, value, self.layout, scale)


class DecodeCache:
    """One decoding step of all rows at once.

    The rows of a step stand along the *sequence* axis (`[rows, 1, heads, dim]`), which is what lets sequence
    parallel split a step of single tokens. Row `b * num_rollouts + k` continues prefix `b`; rows behind
    `prefixes * num_rollouts` only pad to a multiple of the TP size.

    The keys of a prefix are kept once: the queries of its K rows meet them as one matmul, and their own
    suffix keys in a second one; one softmax runs over both. Key and value heads are never repeated.
    """

    def __init__(self, prefill: PrefillCache, num_rollouts: int, max_new_tokens: int) -> None:
        self.num_rollouts = num_rollouts
        self.step = 0
        lengths = prefill.layout[:, 0]
        self.prefix = prefill.layers
        self.suffix: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        device: torch.device | None = None
        for layer, (key, value) in prefill.layers.items():
            prefixes, kv_heads, width, dim = key.shape
            shape = (prefixes * num_rollouts, kv_heads, max_new_tokens, dim)
            self.suffix[layer] = (key.new_empty(shape), value.new_empty(shape))
            device = key.device
        beyond = torch.arange(width)[None, :] >= lengths[:, None]
        self.beyond_prefix = beyond.to(device)[:, None, None, :]

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """One token a row over its prefix and its own suffix so far; `[rows, 1, heads * dim]`."""
        prefix_key, prefix_value = self.prefix[layer]
        suffix_key, suffix_value = self.suffix[layer]
        prefixes, kv_heads, width, dim = prefix_key.shape
        rows = prefixes * self.num_rollouts
        group = query.shape[2] // kv_heads
        suffix_key[:, :, self.step], suffix_value[:, :, self.step] = key[:rows, 0], value[:rows, 0]
        length = self.step + 1
        own = query[:rows, 0].reshape(rows, kv_heads, group, dim)
        # [prefixes, kv_heads, num_rollouts * group, dim]: all rows of a prefix meet its keys together.
        shared = own.view(prefixes, self.num_rollouts, kv_heads, group, dim).transpose(1, 2)
        shared = shared.reshape(prefixes, kv_heads, self.num_rollouts * group, dim)
        to_prefix = (shared @ prefix_key.transpose(-1, -2)).float() * scale
        to_prefix = to_prefix.masked_fill(self.beyond_prefix, float("-inf"))
        to_prefix = to_prefix.view(prefixes, kv_heads, self.num_rollouts, group, width).transpose(1, 2)
        to_suffix = (own @ suffix_key[:, :, :length].transpose(-1, -2)).float() * scale
        scores = torch.cat([to_prefix.reshape(rows, kv_heads, group, width), to_suffix], dim=-1)
        weights = torch.softmax(scores, dim=-1).to(query.dtype)
        from_suffix = weights[..., width:] @ suffix_value[:, :, :length]
        on_prefix = weights[..., :width].view(prefixes, self.num_rollouts, kv_heads, group, width).transpose(1, 2)
        on_prefix = on_prefix.reshape(prefixes, kv_heads, self.num_rollouts * group, width)
        from_prefix = (on_prefix @ prefix_value).view(prefixes, kv_heads, self.num_rollouts, group, dim).transpose(1, 2)
        out = (from_prefix.reshape(rows, kv_heads, group, dim) + from_suffix).reshape(rows, 1, -1)
        padding = query.shape[0] - rows
        return out if padding == 0 else torch.cat([out, out.new_zeros(padding, 1, out.shape[-1])])
