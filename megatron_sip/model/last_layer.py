"""The last layer of the policy, computed only where logits are wanted.

Behind the last layer nothing attends any more, so that a position whose logits nobody reads needs a key and a value
there and nothing else: no scores, no output projection, no MLP. With one layer in n this is nearly 1 / n of the work
on a long prefix. What is left out changes no value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_sip.model.attention import RolloutCache, scored_attention, shared_prefix_attention


@runtime_checkable
class PrefixCache(RolloutCache, Protocol):
    """A rollout's cache that can also attend at one position of each prefix."""

    def attend_at(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        position: torch.Tensor,
    ) -> torch.Tensor:
        """Store key and value as `attend` does; attention of `position` `[prefixes]`, `[prefixes, 1, heads * dim]`."""
        ...


Rows: TypeAlias = torch.Tensor | PrefixCache


@dataclass(frozen=True)
class WantedPositions:
    """Rows, and where logits of them are wanted: `position` `[n]` of `row` `[n]`. Attends as the rows do.

    This travels through the layers as `attention_mask`. For a layout `[batch, 3]` the positions are those of
    `preference.layout.scored_tokens` without prefixes; for a cache one of each prefix in order.
    """

    rows: Rows
    row: torch.Tensor
    position: torch.Tensor

    @staticmethod
    def of(rows: object, sources: tuple[torch.Tensor, torch.Tensor] | None) -> WantedPositions | None:
        """None where logits are wanted at other positions than these, or nowhere."""
        if sources is None or not isinstance(rows, torch.Tensor | PrefixCache):
            return None
        wanted = len(sources[0])
        if isinstance(rows, torch.Tensor) and wanted != int(rows[:, 1:].sum()):
            return None
        return WantedPositions(rows, *sources) if wanted else None

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """In a layer that is not the last: at all positions, `[seq, batch, heads * dim]`."""
        if isinstance(self.rows, torch.Tensor):
            return shared_prefix_attention(query, key, value, self.rows, scale)
        return self.rows.attend(layer, query, key, value, scale)


@dataclass(frozen=True)
class _LastAttention:
    """The attention of the last layer, whose output has one row for each wanted position and `padding` more."""

    wanted: WantedPositions
    padding: int

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        rows = self.wanted.rows
        if isinstance(rows, torch.Tensor):
            out = scored_attention(query, key, value, rows, scale)
        else:
            out = rows.attend_at(layer, query, key, value, scale, self.wanted.position)
        return torch.nn.functional.pad(out, (0, 0, 0, 0, 0, self.padding))


class LastLayer(TransformerLayer):
    """megatron-core's layer; told of `WantedPositions` it returns `[n, 1, hidden]`, these positions alone.

    With sequence parallel n is rounded up to a multiple of TP and split, `[n / tp, 1, hidden]`.
    """

    def _forward_attention(
        self, hidden_states: torch.Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, Any]:
        """Up to the residual sum behind the attention."""
        if not isinstance(attention_mask, WantedPositions):
            return super()._forward_attention(hidden_states, attention_mask, *args, **kwargs)
        wanted, tp = attention_mask, self.pg_collection.tp
        split = self.config.sequence_parallel
        padding = -len(wanted.row) % tp.size() if split else 0
        out = self.self_attention(
            self.input_layernorm(hidden_states),
            attention_mask=_LastAttention(wanted, padding),
            rotary_pos_emb=kwargs["rotary_pos_emb"],
        )
        whole = hidden_states
        if split:
            whole = gather_from_sequence_parallel_region(whole, tensor_parallel_output_grad=False, group=tp)
        residual = torch.nn.functional.pad(whole[wanted.position, wanted.row].unsqueeze(1), (0, 0, 0, 0, 0, padding))
        if split:
            residual = scatter_to_sequence_parallel_region(residual, group=tp)
        add = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
        with self.bias_dropout_add_exec_handler():
            return add(out, residual, self.hidden_dropout), kwargs.get("context")
