"""The policy: megatron-core's GPTModel with positions per row, and its LM head at chosen positions only."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

from megatron_sip.model.attention import RolloutCache
from megatron_sip.model.last_layer import WantedPositions
from megatron_sip.model.lm_head import VocabularyPart, mask_padding_, token_logprobs
from megatron_sip.model.rotary import RowRotary


class PolicyModel(GPTModel):
    """One pipeline stage of the policy.

    `real_vocab_size` is the vocabulary without padding; `frequencies` are the rotary ones; `logits_chunk_bytes` bounds
    the logits that exist at a time where log-probabilities are wanted.
    """

    def __init__(
        self, *, real_vocab_size: int, frequencies: torch.Tensor, logits_chunk_bytes: int, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.real_vocab_size = real_vocab_size
        self.logits_chunk_bytes = logits_chunk_bytes
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
        targets: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run this stage.

        input_ids       [batch, seq] int64
        position_ids    [batch, seq] int64
        attention_mask  row layout [batch, 3], or a rollout cache
        sources         (row, position), each [n]: where the LM head is wanted; None wants it nowhere
        targets         [n] int64: the tokens whose log-probabilities are wanted there; None: all logits
        returns         last stage: log-probabilities [n] float32, or logits [n, padded_vocab / tp], padding masked;
                        other stages: hidden states [seq (/ tp with sequence parallel), batch, hidden]
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
            raise ValueError("the last stage needs to know at which positions its head is wanted")
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        row, position = sources
        scored = hidden[position, row] if wanted is None else hidden[: len(row), 0]
        return self.logits(scored) if targets is None else self.logprobs(scored, targets)

    def _wanted(
        self, rows: torch.Tensor | RolloutCache, sources: tuple[torch.Tensor, torch.Tensor] | None
    ) -> WantedPositions | None:
        """What the last layer may confine itself to; None on other stages, and where all positions are wanted."""
        # megatron-core's recomputation hands on nothing but tensors.
        recomputes = self.training and self.config.recompute_granularity is not None
        return WantedPositions.of(rows, sources) if self.post_process and not recomputes else None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """This rank's columns `[n, padded_vocab / tp]` from hidden states `[n, hidden]`, padding masked."""
        logits, _ = self.output_layer(hidden.unsqueeze(1), weight=self.head_weight)
        return mask_padding_(logits.squeeze(1), self.first_column, self.real_vocab_size)

    def logprobs(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """`log p(target)` `[n]` float32 from hidden states `[n, hidden]`, by chunks of the vocabulary."""
        part = VocabularyPart(self.first_column, self.real_vocab_size, self.logits_chunk_bytes, self.pg_collection.tp)
        return token_logprobs(hidden, self.head_weight, targets, part)

    @property
    def head_weight(self) -> torch.Tensor:
        """`[padded_vocab / tp, hidden]` of the LM head, which may be the embedding's."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    @property
    def first_column(self) -> int:
        """Id of this rank's first column of the vocabulary."""
        return self.pg_collection.tp.rank() * len(self.head_weight)
