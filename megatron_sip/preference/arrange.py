"""A batch of pairs as the model reads it: one row a pair or two, and which of them go through the layers together.

It is worked out once a step, for the reference and the policy alike. Pure functions of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_sip.preference.micro_batches import MicroRows, by_length, padding, places
from megatron_sip.preference.unshared import two_rows
from megatron_sip.types import PreferenceBatch


@dataclass(frozen=True)
class ArrangedBatch:
    """Pairs, the rows that the model reads of them, and their micro-batches; tensors are where the batch is.

    `rows` are the pairs themselves, or two rows for each (`--no-shared-prefix`), which stand side by side.
    """

    pairs: PreferenceBatch
    rows: PreferenceBatch
    micros: tuple[MicroRows, ...]

    @property
    def each(self) -> int:
        """Rows of a pair."""
        return self.rows.rows // self.pairs.rows

    @property
    def widths(self) -> set[int]:
        """Those of the micro-batches."""
        return {micro.width for micro in self.micros}

    def split(self) -> Iterator[tuple[MicroRows, PreferenceBatch]]:
        """Each micro-batch with the rows that are read, as wide as it is."""
        each = self.each
        for micro in self.micros:
            yield micro, self.rows.take([each * pair + row for pair in micro.pairs for row in range(each)], micro.width)

    def places(self) -> torch.Tensor:
        """`[pairs]` int64: where the pair at each place of the batch stands in the order of the micro-batches."""
        return places(self.micros)

    def padding(self) -> tuple[int, int]:
        """Positions without a token, and all positions."""
        return padding(_by_pair(self.rows, self.pairs), self.micros)


def arrange(batch: PreferenceBatch, size: int, width_multiple: int = 1, *, shares_prefix: bool) -> ArrangedBatch:
    """Micro-batches of `size` pairs of similar length; without `shares_prefix` a pair is two rows.

    `width_multiple` is the tensor parallel size with sequence parallel.

    Raises:
        ValueError: the pairs are no multiple of `size`.
    """
    rows = batch if shares_prefix else two_rows(batch, width_multiple)
    return ArrangedBatch(batch, rows, by_length(_by_pair(rows, batch), size, width_multiple))


def _by_pair(rows: PreferenceBatch, batch: PreferenceBatch) -> torch.Tensor:
    """`[pairs, each, 3]`: the lengths of the rows that the model reads of each pair of `batch`."""
    return rows.layout().view(batch.rows, -1, 3)
