"""The side of a conversion that writes a Hugging Face folder."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_sip.checkpoint.convert_source import Source
from megatron_sip.checkpoint.hf_names import Slot, slots
from megatron_sip.checkpoint.hf_tensors import all_hf_shapes
from megatron_sip.checkpoint.hf_tokenizer import copy_files
from megatron_sip.checkpoint.safetensors_io import SafetensorsWriter, new_folder


@dataclass(frozen=True)
class Beside:
    """What stands beside the weights: the content of config.json, and the `names` that are copied from `folder`."""

    config: dict[str, Any]
    folder: Path | None
    names: tuple[str, ...]


def write_hf(
    target: Path,
    source: Source,
    beside: Beside,
    dtype: torch.dtype,
    progress: Callable[[int, int], None],
    max_shard_bytes: int,
) -> None:
    """Write a Hugging Face folder, tensor by tensor.

    Raises:
        CheckpointError: `target` exists, the disk refuses, or the source is damaged; `target` is not there then.
    """
    shapes = all_hf_shapes(source.shape)
    total, done = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize, 0
    with new_folder(target) as temporary:
        (temporary / "config.json").write_text(json.dumps(beside.config, indent=2) + "\n", encoding="utf-8")
        copy_files(beside.folder, temporary, beside.names)
        with SafetensorsWriter(temporary, shapes, dtype, max_shard_bytes) as writer:
            for slot in slots(source.shape):
                done += _write_slot(writer, source, slot, dtype)
                progress(done, total)
            writer.finish()


def _write_slot(writer: SafetensorsWriter, source: Source, slot: Slot, dtype: torch.dtype) -> int:
    """Write one slot's tensors; the bytes written. What was read is let go when this returns, not before the next."""
    count = 0
    for name, part in zip(slot.hf(source.shape.tied), source.parts(slot, dtype), strict=True):
        tensor = part[:]
        writer.write(name, tensor)
        count += tensor.nbytes
    return count
