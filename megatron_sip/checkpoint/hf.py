"""Hugging Face Llama folders in and out of a policy that is spread over tensor and pipeline parallel ranks.

`convert` goes between folders, in one process and without a policy.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_sip.checkpoint.convert_run import Conversion, convert
from megatron_sip.checkpoint.hf_config import hf_config_from_model, model_config_from_hf, require_same_model
from megatron_sip.checkpoint.hf_folder import open_llama
from megatron_sip.checkpoint.hf_gather import (
    WRITER,
    Inventory,
    agree,
    gather_inventories,
    joined_tensors,
    own_rank,
    raise_together,
)
from megatron_sip.checkpoint.hf_names import LlamaShape, Slot, llama_shape
from megatron_sip.checkpoint.hf_stage import policy_shape, stage_slots
from megatron_sip.checkpoint.hf_tensors import all_hf_shapes, pack, unpack
from megatron_sip.checkpoint.hf_tokenizer import copy_files, special_ids
from megatron_sip.checkpoint.safetensors_io import (
    DEFAULT_SHARD_BYTES,
    SafetensorsWriter,
    new_folder,
    require_absent,
)
from megatron_sip.config.groups import ModelConfig
from megatron_sip.errors import CheckpointError

__all__ = ["Conversion", "convert", "export_hf", "load_hf_weights"]


def load_hf_weights(
    folder: str | Path,
    named_parameters: Mapping[str, torch.Tensor],
    model: ModelConfig,
    *,
    tp_rank: int = 0,
    tp_size: int = 1,
    first_layer: int = 0,
) -> None:
    """Fill one rank's stage, in place, from a Hugging Face Llama; only this rank's part is read.

    named_parameters  the stage's parameters (megatron-core names, layers counted from 0 in the stage)
    model             the resolved architecture, unpadded: how far the policy pads groups and vocabulary is read
                      from the parameters
    first_layer       global number of the stage's layer 0

    Raises:
        CheckpointError: another model, a missing, surplus or misshapen tensor, or a parameter that the folder
            cannot fill; nothing is filled then.
    """
    require_same_model(model_config_from_hf(folder), model, folder)
    stage = stage_slots(named_parameters, llama_shape(model), first_layer)
    shape = policy_shape({stage[name]: tuple(p.shape) for name, p in named_parameters.items()}, model, tp_size)
    with open_llama(folder, shape) as source, torch.no_grad():
        for name, parameter in named_parameters.items():
            slot = stage[name]
            views = [source.lazy(hf_name) for hf_name in slot.hf(shape.tied)]
            parameter.copy_(pack(slot.entry.kind, views, shape, tp_rank, tp_size))


def export_hf(
    folder: str | Path,
    named_parameters: Mapping[str, torch.Tensor],
    model: ModelConfig,
    *,
    group: dist.ProcessGroup | None = None,
    tp_rank: int = 0,
    first_layer: int = 0,
    tokenizer_folder: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    durable: bool = True,
) -> None:
    """Write the policy as a Hugging Face folder that appears only when it is whole.

    group             the model parallel group (TP x PP) of one data parallel replica, all of whose ranks call
                      this; its first rank writes, the others send it one tensor at a time. None: one process
    model             the resolved architecture, unpadded
    tokenizer_folder  its tokenizer files are copied and its special ids stand in config.json
    dtype             of the written weights; default that of the parameters
    durable           it is on the disk when this returns; without, it only appears whole

    Raises:
        CheckpointError: on all ranks of the group alike, with nothing changed in `folder`.
    """
    mine: dict[Slot, torch.Tensor] = {}
    ids: dict[str, int | None] = {}
    error = None
    try:
        stage = stage_slots(named_parameters, llama_shape(model), first_layer)
        mine = {stage[name]: parameter for name, parameter in named_parameters.items()}
        if own_rank(group) == WRITER:
            require_absent(folder)
            ids = special_ids(tokenizer_folder, model)
    except CheckpointError as problem:
        error = str(problem)
    own = Inventory(tp_rank, {slot: (tuple(p.shape), p.dtype) for slot, p in mine.items()}, error)
    inventories = gather_inventories(own, group)
    shape, dtype = agree(inventories, model, dtype)
    tensors = joined_tensors(mine, inventories, shape, group)
    failure = None
    if own_rank(group) == WRITER:
        config = hf_config_from_model(model, dtype, ids)
        try:
            with new_folder(folder, durable) as temporary:
                (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
                copy_files(tokenizer_folder, temporary)
                _write_weights(
                    SafetensorsWriter(temporary, all_hf_shapes(shape), dtype, max_shard_bytes), tensors, shape
                )
        except CheckpointError as problem:
            failure = str(problem)
    for _ in tensors:  # the others send; a writer that failed takes what they send, so that all reach the verdict
        pass
    raise_together(failure, group)


def _write_weights(
    writer: SafetensorsWriter, tensors: Iterable[tuple[Slot, torch.Tensor | None]], shape: LlamaShape
) -> None:
    with writer:
        for slot, full in tensors:
            assert full is not None, "only the writer writes"
            for name, tensor in zip(slot.hf(shape.tied), unpack(slot, full, shape), strict=True):
                writer.write(name, tensor)
        writer.finish()
