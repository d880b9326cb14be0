"""Which rows of a step go through the layers together: rows of similar length, so that little is padded.

Sorted by length and cut into micro-batches of one size, each padded to its own longest row, the rows of a data parallel
rank have at most `(size - 1) * (longest - shortest)` positions of padding in the whole step, however many they are
(and what rounding to the width's multiple adds). The loss sums over rows, so that their order does not change it. Pure
functions of the lengths: a resume makes the same micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class MicroRows:
    """Pairs of one micro-batch, by their place in the batch, and the width that their rows are padded to."""

    pairs: tuple[int, ...]
    width: int


def by_length(layout: torch.Tensor, size: int, width_multiple: int = 1) -> tuple[MicroRows, ...]:
    """Micro-batches of `size` pairs, the longest first; pairs with the same lengths are neighbours.

    Longest first, because under pipeline parallel the last thing that all stages but the first wait for is the backward
    pass of the last micro-batch; and the memory that the longest need is taken before the others have parted it.

    layout          [pairs, each, 3] int64: prefix, chosen and rejected length of the rows of each pair, one or two
    width_multiple  the tensor parallel size with sequence parallel

    Raises:
        ValueError: no pairs, or not a multiple of `size`.
    """
    lengths = layout.sum(dim=2).amax(dim=1).tolist()
    if size < 1 or not lengths or len(lengths) % size:
        raise ValueError(f"{len(lengths)} rows do not split into micro-batches of {size}")
    parts = layout.flatten(1).tolist()
    order = sorted(range(len(lengths)), key=lambda pair: (-lengths[pair], parts[pair]))
    micros = []
    for start in range(0, len(order), size):
        pairs = tuple(order[start : start + size])
        longest = max(lengths[pair] for pair in pairs)
        micros.append(MicroRows(pairs, -(-longest // width_multiple) * width_multiple))
    return tuple(micros)


def places(micros: Sequence[MicroRows]) -> torch.Tensor:
    """`[pairs]` int64: where the pair at each place of the batch stands in the order of the micro-batches."""
    return torch.argsort(torch.tensor([pair for micro in micros for pair in micro.pairs]))


def padding(layout: torch.Tensor, micros: Sequence[MicroRows]) -> tuple[int, int]:
    """Positions without a token, and all positions, of the rows `[pairs, each, 3]` in these micro-batches."""
    each = layout.shape[1]
    positions = sum(len(micro.pairs) * each * micro.width for micro in micros)
    return positions - int(layout.sum()), positions
