"""The LM head over a vocabulary that is spread over tensor parallel ranks: log-probabilities without all logits.

Logits exist one chunk at a time, and a chunk is some columns of the vocabulary at all positions. So a row of the
weight has its whole gradient from one product, and the ranks meet as often as without chunks. Chunks of positions
would add to the gradient of the whole weight, and meet, once a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

_LOWEST = torch.finfo(torch.float32).min
"""Stands for -inf as a maximum: -inf minus itself is not a number, and a rank's columns may all be padding."""


def mask_padding_(logits: torch.Tensor, first: int, vocab_size: int) -> torch.Tensor:
    """Put -inf into the columns that only pad the vocabulary, in place.

    logits  [n, columns], those of the ids from `first` on

    The padded size depends on TP; unmasked, the columns' logits of 0 would enter every softmax.
    """
    logits[:, max(vocab_size - first, 0) :] = float("-inf")
    return logits


@dataclass(frozen=True)
class VocabularyPart:
    """The columns of one tensor parallel rank, and how many are worked on at a time.

    first        id of the first column
    vocab_size   of the whole vocabulary, without padding
    chunk_bytes  the most bytes of float32 logits that may exist at a time
    group        the tensor parallel ranks
    """

    first: int
    vocab_size: int
    chunk_bytes: int
    group: dist.ProcessGroup

    def chunks(self, positions: int, columns: int) -> list[tuple[int, int]]:
        """Start and stop of each chunk; a chunk has one column even where that alone is more than is allowed."""
        width = max(self.chunk_bytes // (4 * max(positions, 1)), 1)
        if 128 <= width < columns:
            width -= width % 128  # what matrix units like
        return [(start, min(start + width, columns)) for start in range(0, columns, width)]

    def logits(self, hidden: torch.Tensor, weight: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """`[n, stop - start]` float32, padding masked."""
        return mask_padding_(F.linear(hidden, weight[start:stop]).float(), self.first + start, self.vocab_size)


def token_logprobs(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, part: VocabularyPart
) -> torch.Tensor:
    """`log p(target)` at each position, in fp32, with gradients to `hidden` and `weight`.

    hidden   [n, hidden], equal on all TP ranks; so is its gradient
    weight   [padded_vocab / tp, hidden] of the LM head
    targets  [n] int64, ids of the whole vocabulary
    returns  [n] float32, equal on all TP ranks

    Where the logits are more than a chunk, they are computed once more in the backward pass; else that finds them.
    """
    logps: torch.Tensor = _TokenLogprobs.apply(hidden, weight, targets, part)
    return logps


class _TokenLogprobs(torch.autograd.Function):
    """With shift m and sum Z over the vocabulary, log p(t) = (l_t - m) - log Z; d log p(t) / d l = onehot(t) - p."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, part: VocabularyPart
    ) -> torch.Tensor:
        places = targets - part.first
        chunks = part.chunks(len(hidden), len(weight))
        found = torch.zeros(3, len(hidden), device=hidden.device)
        found[0] = _LOWEST
        kept: list[torch.Tensor] = []
        for start, stop in chunks:
            found, exponentials = _scan(part.logits(hidden, weight, start, stop), places - start, found)
            if len(chunks) == 1 and any(ctx.needs_input_grad):
                kept = [exponentials]
            del exponentials  # or it would live beside the next chunk
        own_shift, own_sum, target_logit = found
        shift = own_shift.clone()
        if part.group.size() > 1:
            dist.all_reduce(shift, op=dist.ReduceOp.MAX, group=part.group)
        share = (own_shift - shift).exp()
        sums = torch.stack([own_sum * share, target_logit])
        if part.group.size() > 1:
            dist.all_reduce(sums, group=part.group)
        ctx.part, ctx.chunks = part, chunks
        # The probability of a column is exp(logit - own_shift) * (share / sum).
        ctx.save_for_backward(hidden, weight, places, own_shift, share / sums[0], *kept)
        return sums[1] - shift - sums[0].log()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None, None]:
        hidden, weight, places, shift, scale, *kept = ctx.saved_tensors
        part: VocabularyPart = ctx.part
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        grad_hidden: torch.Tensor | None = None
        reduction: dist.Work | None = None
        for start, stop in ctx.chunks:
            exponentials = kept[0] if kept else part.logits(hidden, weight, start, stop).sub_(shift[:, None]).exp_()
            grad_logits = _gradient_(exponentials, places - start, grad, grad * scale).to(weight.dtype)
            del exponentials
            share = grad_logits @ weight[start:stop]
            grad_hidden = share if grad_hidden is None else grad_hidden.float().add_(share)
            if stop == len(weight):
                grad_hidden = grad_hidden.to(hidden.dtype)
                if part.group.size() > 1:  # beside the last product
                    reduction = dist.all_reduce(grad_hidden, group=part.group, async_op=True)
            if grad_weight is not None:
                torch.mm(grad_logits.t(), hidden, out=grad_weight[start:stop])
            del grad_logits
        if reduction is not None:
            reduction.wait()
        assert grad_hidden is not None
        return grad_hidden, grad_weight, None, None


def _at(places: torch.Tensor, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which positions have their target in a chunk, and a column `[n, 1]` of it to read or write at every position."""
    inside = (places >= 0) & (places < columns)
    return inside, places.clamp(0, columns - 1)[:, None]


def _scan(logits: torch.Tensor, places: torch.Tensor, found: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Take one more chunk into maximum, sum of exponentials less the maximum, and target logit, `found` [3, n].

    Returns:
        The new `found`, and the chunk's `exp(logits - maximum)` in the memory of its logits.
    """
    inside, column = _at(places, logits.shape[1])
    target_logit = torch.where(inside, logits.gather(1, column).squeeze(1), found[2])
    maximum = torch.maximum(found[0], logits.amax(dim=1))
    exponentials = logits.sub_(maximum[:, None]).exp_()
    total = found[1] * (found[0] - maximum).exp() + exponentials.sum(dim=1)
    return torch.stack([maximum, total, target_logit]), exponentials


def _gradient_(
    exponentials: torch.Tensor, places: torch.Tensor, grad: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """Gradient of a chunk's logits in the memory of its exponentials: `onehot * grad - exponentials * scale`."""
    inside, column = _at(places, exponentials.shape[1])
    exponentials.mul_(-scale[:, None])
    return exponentials.scatter_add_(1, column, torch.where(inside, grad, 0.0)[:, None])
