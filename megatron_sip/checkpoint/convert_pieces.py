"""Into which pieces a written checkpoint cuts the model: what each tensor parallel rank of the target layout reads.

All layers of one kind are one tensor with a leading layer axis, and each layer is written by its offset. Any other
layout can load the pieces too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from megatron_sip.checkpoint.convert_source import POLICY, Source
from megatron_sip.checkpoint.hf_names import Kind, LlamaShape, Slot, slots
from megatron_sip.checkpoint.hf_tensors import pack, rank_shape
from megatron_sip.checkpoint.stream_write import Piece


@dataclass(frozen=True)
class _Cut:
    """What a rank holds of a tensor. Of gate and up, which it holds from two places, one `half` (0 or 1)."""

    tp_rank: int
    tp_size: int
    offset: tuple[int, ...]
    size: tuple[int, ...]
    half: int | None = None


def model_pieces(
    source: Source, target: LlamaShape, tp_size: int, dtype: torch.dtype, prefix: str = POLICY
) -> Iterator[Piece]:
    """Every tensor of the model, in the order of the forward pass.

    target  the shape that is written; its padding may differ from the source's
    prefix  before each name
    """
    for slot in slots(target):
        whole = rank_shape(slot.entry.kind, target, 1)
        for cut in _cuts(slot.entry.kind, target, tp_size):
            offset, size = cut.offset, cut.size
            if slot.layer is not None:
                offset, size = (slot.layer, *offset), (1, *size)
            yield Piece(
                prefix + slot.entry.stored,
                whole if slot.layer is None else (target.num_layers, *whole),
                offset,
                size,
                dtype,
                partial(_make, source, slot, cut, target, dtype),
            )


def _cuts(kind: Kind, shape: LlamaShape, tp_size: int) -> Iterator[_Cut]:
    size = rank_shape(kind, shape, tp_size)
    if kind is Kind.NORM:
        yield _Cut(0, 1, (0,), size)
        return
    for rank in range(tp_size):
        if kind in (Kind.PROJ, Kind.DOWN):
            yield _Cut(rank, tp_size, (0, rank * size[1]), size)
        elif kind is Kind.GATE_UP:
            rows = size[0] // 2
            for half in range(2):
                start = half * shape.ffn_hidden_size + rank * rows
                yield _Cut(rank, tp_size, (start, 0), (rows, size[1]), half)
        else:
            yield _Cut(rank, tp_size, (rank * size[0], 0), size)


def _make(source: Source, slot: Slot, cut: _Cut, shape: LlamaShape, dtype: torch.dtype) -> torch.Tensor:
    """The data of a piece, with the axis of the layers where it has one."""
    parts = source.parts(slot, dtype)
    if cut.half is None:
        made = pack(slot.entry.kind, parts, shape, cut.tp_rank, cut.tp_size)
    else:
        start = cut.tp_rank * cut.size[0]
        made = parts[cut.half][start : start + cut.size[0]]
    made = made.contiguous()
    return made if slot.layer is None else made[None]
