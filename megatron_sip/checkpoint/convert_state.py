"""What a checkpoint of ours holds beside the policy, on its way to another padding: moments, reference, position.

The optimizer's and the reference's tensors have the policy's names behind a prefix and the policy's shapes, so they are
cut and padded as the policy is. Padded query groups are zero in all of them (`hf_tensors`).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from megatron_sip.checkpoint.convert_pieces import model_pieces
from megatron_sip.checkpoint.convert_source import POLICY, McoreSource, one_type, prefixes
from megatron_sip.checkpoint.hf_names import LlamaShape
from megatron_sip.checkpoint.stream_read import StoredTensors
from megatron_sip.checkpoint.stream_write import Piece
from megatron_sip.config.groups import ModelConfig
from megatron_sip.errors import CheckpointError


@dataclass(frozen=True)
class TrainingState:
    """All of a checkpoint but the policy's tensors.

    folder  of the checkpoint, whose small files are copied
    """

    folder: Path
    iteration: int
    pieces: tuple[Piece, ...]
    objects: Mapping[str, Callable[[], io.BytesIO]]


def training_state(
    stored: StoredTensors, iteration: int, policy: McoreSource, model: ModelConfig, target: LlamaShape, tp_size: int
) -> TrainingState:
    """Everything beside the policy, padded as `target` is and cut for `tp_size` ranks.

    Raises:
        CheckpointError: a tensor is missing, or its form does not tell how it is padded.
    """
    found, others = prefixes(stored)
    same = (policy.shape.groups_padded, policy.shape.vocab_padded) == (target.groups_padded, target.vocab_padded)
    if others and not same:
        raise CheckpointError(
            f"{stored.folder} holds {others[0]}, which cannot be padded otherwise; "
            "say --weights-only to convert the policy alone"
        )
    pieces: list[Piece] = []
    for prefix in found:
        if prefix != POLICY:
            source = McoreSource(stored, model, prefix)
            pieces += model_pieces(source, target, tp_size, one_type(source, stored.folder), prefix)
    for name in others:
        pieces += _as_they_are(stored, name)
    objects = {name: partial(stored.read_object, name) for name in stored.objects}
    return TrainingState(stored.folder, iteration, tuple(pieces), objects)


def has_training_state(stored: StoredTensors) -> bool:
    """Whether there are tensors beside the policy's."""
    found, others = prefixes(stored)
    return bool(others) or found != [POLICY]


def _as_they_are(stored: StoredTensors, name: str) -> Iterator[Piece]:
    for offset, size in stored.chunks(name):
        read: Callable[[], torch.Tensor] = partial(stored.read, name, offset, size)
        yield Piece(name, stored.size(name), offset, size, stored.dtype(name), read)
