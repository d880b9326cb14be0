"""Log-probabilities of chosen tokens from vocabulary-parallel logits."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy


def token_logprobs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """`log p(target)` at each position, in fp32, without gathering the vocabulary.

    logits   [n, padded_vocab / tp], padded columns at -inf; overwritten
    targets  [n] int64, ids of the whole vocabulary
    returns  [n] float32, the same on all TP ranks
    """
    return -vocab_parallel_cross_entropy(logits.unsqueeze(1), targets.unsqueeze(1)).squeeze(1)
