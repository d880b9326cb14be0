"""Index arithmetic of rows `[prefix | chosen | rejected | padding]`: pure torch, on whatever device the lengths are.

A layout is `[rows, 3]` int64: prefix, chosen and rejected length of each row (see `PreferenceBatch`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_sip.types import PreferenceBatch

CHOSEN, REJECTED, PREFIX = 0, 1, 2
"""Segments of scored tokens."""


@dataclass(frozen=True)
class ScoredTokens:
    """The tokens whose log-probability is wanted, each `[n]` int64, sorted by (row, segment, position).

    row      row of the batch
    source   position in the row whose logits predict the token
    target   the token id
    segment  CHOSEN, REJECTED or PREFIX
    """

    row: torch.Tensor
    source: torch.Tensor
    target: torch.Tensor
    segment: torch.Tensor

    def to(self, device: torch.device) -> ScoredTokens:
        """The same indices on `device`."""
        return ScoredTokens(
            self.row.to(device), self.source.to(device), self.target.to(device), self.segment.to(device)
        )


def position_ids(layout: torch.Tensor, width: int) -> torch.Tensor:
    """`[rows, width]` int64 rotary positions: both suffixes start at the prefix length; padding has position 0."""
    prefix, chosen, rejected = layout.unbind(dim=1)
    front, stop = (prefix + chosen)[:, None], (prefix + chosen + rejected)[:, None]
    index = torch.arange(width, device=layout.device).expand(layout.shape[0], width)
    shifted = torch.where(index >= front, index - chosen[:, None], index)
    return torch.where(index < stop, shifted, torch.zeros_like(shifted))


def scored_tokens(batch: PreferenceBatch, *, with_prefix: bool) -> ScoredTokens:
    """Every suffix token of every row, and with `with_prefix` every prefix token but the first.

    The first token of both suffixes is predicted by the last position of the prefix; any other by the
    position before it in its own block. Rows with `valid = 0` are there too: all ranks and stages must
    do the same work; the loss gives them weight 0.

    Raises:
        ValueError: a row has a suffix but no prefix, so that nothing predicts its first token.
    """
    layout = batch.layout()
    prefix, chosen, rejected = (lengths[:, None] for lengths in layout.unbind(dim=1))
    if bool(((prefix == 0) & (chosen + rejected > 0)).any()):
        raise ValueError("a row without a prefix has a suffix that nothing predicts")
    position = torch.arange(batch.width, device=layout.device)[None, :]
    front = prefix + chosen
    in_segment = {
        CHOSEN: (position >= prefix) & (position < front),
        REJECTED: (position >= front) & (position < front + rejected),
        PREFIX: (position >= 1) & (position < prefix) & with_prefix,
    }
    rows, targets, sources, segments = [], [], [], []
    for segment, mask in in_segment.items():
        row, target = mask.nonzero(as_tuple=True)
        source = target - 1
        if segment == REJECTED:
            source = torch.where(target == front[row, 0], prefix[row, 0] - 1, source)
        rows.append(row)
        targets.append(target)
        sources.append(source)
        segments.append(torch.full_like(row, segment))
    row, target, source, segment = (torch.cat(parts) for parts in (rows, targets, sources, segments))
    order = torch.argsort(row * 3 + segment, stable=True)
    row, target = row[order], target[order]
    return ScoredTokens(row=row, source=source[order], target=batch.tokens[row, target], segment=segment[order])
