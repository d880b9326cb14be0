"""Pairs to the rows that are trained: `[prefix | chosen | rejected | padding]`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_sip.types import Cut, NoPair, Pair, PreferenceBatch

_EMPTY_ROW_PREFIX = 2
"""Prefix tokens of a row that trains nothing: just enough for every segment to exist."""

_Row = tuple[Sequence[int], Sequence[int], Sequence[int], float, int]


def _rows_to_batch(rows: Sequence[_Row], width_multiple: int) -> PreferenceBatch:
    """Rows of (prefix, chosen, rejected, valid, sample index) at one width, a multiple of `width_multiple`."""
    if not rows:
        raise ValueError("a batch needs at least one row")
    if width_multiple < 1:
        raise ValueError(f"width_multiple must be at least 1, not {width_multiple}")
    longest = max(len(prefix) + len(chosen) + len(rejected) for prefix, chosen, rejected, _, _ in rows)
    width = -(-longest // width_multiple) * width_multiple
    tokens = torch.zeros(len(rows), width, dtype=torch.int64)
    for index, (prefix, chosen, rejected, _, _) in enumerate(rows):
        row = [*prefix, *chosen, *rejected]
        tokens[index, : len(row)] = torch.tensor(row, dtype=torch.int64)
    lengths = torch.tensor([[len(p), len(c), len(r)] for p, c, r, _, _ in rows], dtype=torch.int64)
    return PreferenceBatch(
        tokens=tokens,
        prefix_length=lengths[:, 0].contiguous(),
        chosen_length=lengths[:, 1].contiguous(),
        rejected_length=lengths[:, 2].contiguous(),
        valid=torch.tensor([valid for *_, valid, _ in rows], dtype=torch.float32),
        sample_index=torch.tensor([sample for *_, sample in rows], dtype=torch.int64),
    )


def _pair_row(cut: Cut, pair: Pair, max_prefix: int | None) -> _Row:
    prefix = cut.prefix.tolist()
    if max_prefix is not None:
        prefix = prefix[-max_prefix:]
    rejected = () if pair.rejected is None else pair.rejected.tokens
    if not prefix or not pair.chosen.tokens or (pair.rejected is not None and not rejected):
        raise ValueError(f"sample {cut.sample_index}: prefix, chosen and rejected each need at least one token")
    return prefix, pair.chosen.tokens, rejected, 1.0, cut.sample_index


def _empty_row(cut: Cut, with_rejected: bool) -> _Row:
    """The shortest row that still has every segment of its batch; its tokens are real ones of the cut."""
    prefix = cut.prefix[-_EMPTY_ROW_PREFIX:].tolist()
    suffix = cut.suffix[:1].tolist()
    if not prefix or not suffix:
        raise ValueError(f"sample {cut.sample_index}: prefix and suffix each need at least one token")
    return prefix, suffix, suffix if with_rejected else (), 0.0, cut.sample_index


def collate(
    items: Sequence[tuple[Cut, Pair | NoPair]], *, width_multiple: int = 1, max_prefix: int | None = None
) -> PreferenceBatch:
    """One row an item, in order; a `NoPair` is a row of a few tokens with `valid = 0`.

    `width_multiple` is the tensor parallel size with sequence parallel. `max_prefix` keeps the last so
    many prefix tokens.

    Raises:
        ValueError: no items, items of different objectives, an empty prefix or suffix, or a limit below 1.
    """
    if max_prefix is not None and max_prefix < 1:
        raise ValueError(f"max_prefix must be at least 1, not {max_prefix}")
    halves = {pair.rejected is not None for _, pair in items if isinstance(pair, Pair)}
    if len(halves) == 2:
        raise ValueError("pairs with and without a rejected suffix belong to different objectives")
    with_rejected = True in halves
    rows = [
        _empty_row(cut, with_rejected) if isinstance(pair, NoPair) else _pair_row(cut, pair, max_prefix)
        for cut, pair in items
    ]
    return _rows_to_batch(rows, width_multiple)


def ntp_batch(cuts: Sequence[Cut], width_multiple: int = 1) -> PreferenceBatch:
    """Plain next-token rows: prefix and suffix as one prefix, nothing chosen or rejected.

    Raises:
        ValueError: no cuts.
    """
    rows = [([*cut.prefix.tolist(), *cut.suffix.tolist()], (), (), 1.0, cut.sample_index) for cut in cuts]
    return _rows_to_batch(rows, width_multiple)
