"""A pair as two rows, `[prefix | chosen]` and `[prefix | rejected]`: the form without a shared prefix.

It computes the prefix twice and gives the same loss and gradients, so it is what the shared row is compared with
(`--no-shared-prefix`). Pure torch, on whatever device the batch is.
"""

from __future__ import annotations

import torch

from megatron_sip.preference.layout import PREFIX, ScoredTokens, scored_tokens
from megatron_sip.types import PreferenceBatch


def two_rows(batch: PreferenceBatch, width_multiple: int = 1) -> PreferenceBatch:
    """The pairs of `batch` as `[2 * rows, width]`: rows 2i and 2i + 1 are pair i with its chosen and its rejected.

    Each suffix stands where a chosen one does, and no row has a rejected one: attention is causal over the whole row.
    The rows of a pair are neighbours, so that they stay in one micro-batch. `width` is a multiple of `width_multiple`,
    and never above that of a `batch` whose own width is one.
    """
    prefix = batch.prefix_length.repeat_interleave(2)
    suffix = torch.stack([batch.chosen_length, batch.rejected_length], dim=1).flatten()
    before = torch.stack([torch.zeros_like(batch.chosen_length), batch.chosen_length], dim=1).flatten()
    longest = int((prefix + suffix).max())
    width = -(-longest // width_multiple) * width_multiple
    place = torch.arange(width, device=prefix.device).expand(2 * batch.rows, width)
    behind_prefix = place >= prefix[:, None]
    # Where the token stands in the shared row; what lies behind the row is masked below.
    source = torch.where(behind_prefix, place + before[:, None], place).clamp(max=batch.width - 1)
    tokens = batch.tokens.repeat_interleave(2, dim=0).gather(1, source)
    return PreferenceBatch(
        tokens=tokens.masked_fill(place >= (prefix + suffix)[:, None], 0),
        prefix_length=prefix,
        chosen_length=suffix,
        rejected_length=torch.zeros_like(suffix),
        valid=batch.valid.repeat_interleave(2),
        sample_index=batch.sample_index.repeat_interleave(2),
    )


def scored_in_two_rows(rows: PreferenceBatch, *, with_prefix: bool) -> ScoredTokens:
    """`scored_tokens` of the rows of `two_rows`; a prefix counts once, in the row of its chosen suffix."""
    scored = scored_tokens(rows, with_prefix=with_prefix)
    kept = (scored.segment != PREFIX) | (scored.row % 2 == 0)
    return ScoredTokens(scored.row[kept], scored.source[kept], scored.target[kept], scored.segment[kept])
