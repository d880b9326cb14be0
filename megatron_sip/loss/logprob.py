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


def segment_sums(logprobs: torch.Tensor, row: torch.Tensor, segment: torch.Tensor, rows: int) -> torch.Tensor:
    """Sum log-probabilities by row and segment, in float64.

    logprobs  [n]
    row       [n] int64
    segment   [n] int64: 0 chosen, 1 rejected, 2 prefix
    returns   [rows, 3] float64; float64 because a margin is a small difference of large sums
    """
    sums = torch.zeros(rows * 3, dtype=torch.float64, device=logprobs.device)
    return sums.index_add(0, row * 3 + segment, logprobs.double()).view(rows, 3)
