"""The policy: megatron-core's GPTModel with positions per row and logits at chosen positions only."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

from megatron_sip.model.attention import RolloutCache
from megatron_sip.model.last_layer import WantedPositions
from megatron_sip.model.rotary import RowRotary


def mask_padded_vocabulary(logits: torch.Tensor, vocab_size: int, tp_rank: int) -> torch.Tensor:
    """Put -inf into the columns that only pad the vocabulary, out of place.

    logits  [n, padded_vocab / tp], the slice of TP rank `tp_rank`

    The padded size depends on TP; unmasked, the columns' logits of 0 would enter every softmax.
    """
    columns = logits.shape[-1]
    real = min(max(vocab_size - tp_rank * columns, 0), columns)
    if real == columns:
        return logits
    padded = torch.arange(columns, device=logits.device) >= real
    return logits.masked_fill(padded, float("-inf"))


def head_weight(policy: PolicyModel) -> torch.Tensor:
    """The LM head's part of a last stage, `[padded_vocab / tp, hidden]`, tied to the embeddings or its own."""
    if policy.share_embeddings_and_output_weights:
        return policy.shared_embedding_or_output_weight()
    return policy.output_layer.weight


class PolicyModel(GPTModel):
    """One pipeline stage of the policy.

    `real_vocab_size` is the vocabulary without padding; `frequencies` are the rotary ones.
    """

    def __init__(self, *, real_vocab_size: int, frequencies: torch.Tensor, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.real_vocab_size = real_vocab_size
        self.rotary_pos_emb = RowRotary(frequencies)
        if self.post_process:
            # Positions are picked from the whole sequence before the LM head, so the gather of sequence
            # parallel moves in front of it and the head itself works like plain tensor parallel.
            self.output_layer.sequence_parallel = False
            self.output_layer.allreduce_dgrad = self.pg_collection.tp.size() > 1

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | RolloutCache,
        sources: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Run this stage.

        input_ids       [batch, seq] int64
        position_ids    [batch, seq] int64
        attention_mask  row layout [batch, 3], or a rollout cache
        sources         (row, position), each [n]: where logits are wanted; None wants none
        returns         last stage: logits [n, padded_vocab / tp], padding masked; other stages: hidden
                        states [seq (/ tp with sequence parallel), batch, hidden]
        """
        embedded = self.embedding(input_ids=input_ids, position_ids=position_ids) if self.pre_process else None
        angles = self.rotary_pos_emb(position_ids)
        wanted = self._wanted(attention_mask, sources)
        hidden = self.decoder(
            hidden_states=embedded, attention_mask=attention_mask if wanted is None else wanted, rotary_pos_emb=angles
        )
        if not self.post_process:
            return hidden
        if sources is None:
            raise ValueError("the last stage needs to know at which positions logits are wanted")
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        if wanted is None:
            row, position = sources
            hidden = hidden[position, row].unsqueeze(1)
        else:
            hidden = hidden[: len(wanted.row)]
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits, _ = self.output_layer(hidden, weight=weight)
        return mask_padded_vocabulary(logits.squeeze(1), self.real_vocab_size, self.pg_collection.tp.rank())

    def _wanted(
        self, rows: torch.Tensor | RolloutCache, sources: tuple[torch.Tensor, torch.Tensor] | None
    ) -> WantedPositions | None:
        """What the last layer may confine itself to; None on other stages, and where all positions are wanted."""
        # megatron-core's recomputation hands on nothing but tensors.
        recomputes = self.training and self.config.recompute_granularity is not None
        return WantedPositions.of(rows, sources) if self.post_process and not recomputes else None
