"""Keys and values of a rollout: each prefix once, each continuation its own tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megatron_sip.model.attention import shared_prefix_attention
from megatron_sip.rollout.parts import BIAS_MULTIPLE, Part, attention_beside, attention_part, joined


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
        self._keep(layer, key, value)
        return shared_prefix_attention(query, key, value, self.layout, scale)

    def attend_at(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        position: torch.Tensor,
    ) -> torch.Tensor:
        """The same at one `position` of each prefix alone, `[prefixes]`; `[prefixes, 1, heads * dim]`."""
        keys, values = self._keep(layer, key, value)
        prefixes = torch.arange(len(position), device=position.device)
        own = query[position, prefixes][:, :, None]
        seen = torch.arange(keys.shape[2], device=position.device) <= position[:, None]
        out = F.scaled_dot_product_attention(
            own, keys, values, attn_mask=seen[:, None, None], scale=scale, enable_gqa=own.shape[1] != keys.shape[1]
        )
        return out.flatten(1)[:, None]

    def _keep(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.layers[layer] = (key.permute(1, 2, 0, 3).contiguous(), value.permute(1, 2, 0, 3).contiguous())
        return self.layers[layer]


class DecodeCache:
    """One decoding step of all rows at once.

    The rows of a step stand along the *sequence* axis (`[rows, 1, heads, dim]`), which is what lets sequence
    parallel split a step of single tokens. Row `b * num_rollouts + k` continues prefix `b`; rows behind
    `prefixes * num_rollouts` only pad to a multiple of the TP size.

    The keys of a prefix are kept once: the queries of its K rows meet them together, and their own suffix keys
    apart. What they find in the prefix is one more key to the softmax over the suffix, so that no score of a prefix is
    copied. Key and value heads are never repeated.
    """

    def __init__(self, prefill: PrefillCache, num_rollouts: int, max_new_tokens: int) -> None:
        self.num_rollouts = num_rollouts
        self.step = 0
        lengths = prefill.layout[:, 0]
        self.prefix = prefill.layers
        self.suffix: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for layer, (key, value) in prefill.layers.items():
            prefixes, kv_heads, _, dim = key.shape
            shape = (prefixes * num_rollouts, kv_heads, max_new_tokens, dim)
            self.suffix[layer] = (key.new_empty(shape), value.new_empty(shape))
        self.bias = _bias_of(lengths, key)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """One token a row over its prefix and its own suffix so far; `[rows, 1, heads * dim]`."""
        prefix_key, prefix_value = self.prefix[layer]
        prefixes, kv_heads, _, dim = prefix_key.shape
        rollouts, rows = self.num_rollouts, prefixes * self.num_rollouts
        group = query.shape[2] // kv_heads
        own = query[:rows, 0].reshape(rows, kv_heads, group, dim)
        # [prefixes, kv_heads, rollouts * group, dim]: all rows of a prefix meet its keys together.
        shared = own.view(prefixes, rollouts, kv_heads, group, dim).transpose(1, 2)
        shared = shared.reshape(prefixes, kv_heads, rollouts * group, dim)
        on_prefix = attention_part(shared, prefix_key, prefix_value, scale, self.bias)
        # In the order of the rows: [rows, kv_heads, group, ...]
        by_row = (item.view(prefixes, kv_heads, rollouts, group, -1).transpose(1, 2) for item in on_prefix)
        beside = Part(*(item.reshape(rows, kv_heads, group, -1) for item in by_row))
        out = self._with_suffix(layer, beside, own, key[:rows, 0], value[:rows, 0], scale)
        out = out.to(query.dtype).reshape(rows, 1, -1)
        padding = query.shape[0] - rows
        return out if padding == 0 else torch.cat([out, out.new_zeros(padding, 1, out.shape[-1])])

    def _with_suffix(
        self, layer: int, on_prefix: Part, own: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Keep key and value `[rows, kv_heads, dim]` of this step, and let `own` attend to prefix and suffix so far.

        own      [rows, kv_heads, group, dim], the queries by key and value head
        returns  [rows, kv_heads, group, dim] fp32
        """
        keys, values = self.suffix[layer]
        keys[:, :, self.step], values[:, :, self.step] = key, value
        keys, values = keys[:, :, : self.step + 1], values[:, :, : self.step + 1]
        if own.is_cuda:
            # Fewer kernels than one softmax, of which each takes longer to start than to run.
            return joined(on_prefix, attention_part(own, keys, values, scale))
        return attention_beside(on_prefix, (own @ keys.transpose(-1, -2)).mul_(scale), values)


class StaticDecodeCache(DecodeCache):
    """The same with shapes and addresses that no step changes, which is what a CUDA graph can record.

    The step is a number on the device, and every step attends over the whole room of the suffix, with the places that
    are not written yet at -inf.
    """

    def __init__(self, prefill: PrefillCache, num_rollouts: int, max_new_tokens: int) -> None:
        super().__init__(prefill, num_rollouts, max_new_tokens)
        for keys, values in self.suffix.values():
            for tensor in (keys, values):
                tensor.zero_()  # a weight of 0 does not silence a NaN
        self.place = torch.zeros(1, dtype=torch.int64, device=keys.device)
        written = torch.arange(1, max_new_tokens + 1)
        self._biases = _bias_behind(written, max_new_tokens, keys)

    def _with_suffix(
        self, layer: int, on_prefix: Part, own: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        keys, values = self.suffix[layer]
        keys.index_copy_(2, self.place, key[:, :, None])
        values.index_copy_(2, self.place, value[:, :, None])
        bias = self._biases.index_select(0, self.place)[..., : keys.shape[2]]
        return joined(on_prefix, attention_part(own, keys, values, scale, bias))


def _bias_of(lengths: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    """`[prefixes, 1, 1, width]`, -inf behind the end of each prefix; None where all are as long as `key` is wide."""
    width = key.shape[2]
    return None if bool((lengths == width).all()) else _bias_behind(lengths, width, key)[..., :width]


def _bias_behind(lengths: torch.Tensor, width: int, like: torch.Tensor) -> torch.Tensor:
    """`[n, 1, 1, width or more]` as `like`, -inf from the place `lengths` `[n]` on."""
    beyond = torch.arange(width + -width % BIAS_MULTIPLE)[None, :] >= lengths[:, None]
    return torch.zeros(beyond.shape).masked_fill(beyond, float("-inf"))[:, None, None].to(like)
