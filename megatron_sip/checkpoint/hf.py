"""Hugging Face Llama folders in and out of a policy that is spread over tensor and pipeline parallel ranks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_sip.checkpoint.hf_config import hf_config_from_model, model_config_from_hf, require_same_model
from megatron_sip.checkpoint.hf_gather import (
    WRITER,
    Inventory,
    agree,
    gather_inventories,
    joined_tensors,
    own_rank,
    raise_together,
)
from megatron_sip.checkpoint.hf_names import EMBEDDING, OUTPUT, LlamaShape, Slot, llama_shape
from megatron_sip.checkpoint.hf_stage import policy_shape, stage_slots
from megatron_sip.checkpoint.hf_tensors import all_hf_shapes, hf_shapes, pack, unpack
from megatron_sip.checkpoint.safetensors_io import (
    DEFAULT_SHARD_BYTES,
    SafetensorsFolder,
    SafetensorsWriter,
    new_folder,
    require_absent,
)
from megatron_sip.config.groups import ModelConfig
from megatron_sip.errors import CheckpointError

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)


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
    with SafetensorsFolder(folder) as source:
        source.require_shapes(all_hf_shapes(shape))
        _refuse_surplus(source, shape)
        with torch.no_grad():
            for name, parameter in named_parameters.items():
                slot = stage[name]
                views = [source.lazy(hf_name) for hf_name in slot.hf(shape.tied)]
                parameter.copy_(pack(slot.entry.kind, views, shape, tp_rank, tp_size))


def _refuse_surplus(source: SafetensorsFolder, shape: LlamaShape) -> None:
    """Refuse tensors that nothing would read; the first Llama exports also stored rotary frequencies."""
    surplus = {name for name in source.names - set(all_hf_shapes(shape)) if not name.endswith("rotary_emb.inv_freq")}
    head = OUTPUT.hf[0]
    if shape.tied and head in surplus:
        surplus.remove(head)
        (size,) = hf_shapes(Slot(EMBEDDING), shape)
        source.require_shapes({head: size})
        if not torch.equal(source.lazy(head)[:], source.lazy(EMBEDDING.hf[0])[:]):
            raise CheckpointError(
                f"{source.folder}: tie_word_embeddings is true, but {head} differs from the embedding"
            )
    if surplus:
        raise CheckpointError(f"{source.folder} has the tensor {min(surplus)}, which is no part of a Llama")


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
) -> None:
    """Write the policy as a Hugging Face folder that appears only when it is whole.

    group             the model parallel group (TP x PP) of one data parallel replica, all of whose ranks call
                      this; its first rank writes, the others send it one tensor at a time. None: one process
    model             the resolved architecture, unpadded
    tokenizer_folder  its tokenizer files are copied and its special ids stand in config.json
    dtype             of the written weights; default that of the parameters

    Raises:
        CheckpointError: on all ranks of the group alike, with nothing changed in `folder`.
    """
    mine: dict[Slot, torch.Tensor] = {}
    special_ids: dict[str, int | None] = {}
    error = None
    try:
        stage = stage_slots(named_parameters, llama_shape(model), first_layer)
        mine = {stage[name]: parameter for name, parameter in named_parameters.items()}
        if own_rank(group) == WRITER:
            require_absent(folder)
            special_ids = _special_ids(tokenizer_folder, model)
    except CheckpointError as problem:
        error = str(problem)
    own = Inventory(tp_rank, {slot: (tuple(p.shape), p.dtype) for slot, p in mine.items()}, error)
    inventories = gather_inventories(own, group)
    shape, dtype = agree(inventories, model, dtype)
    tensors = joined_tensors(mine, inventories, shape, group)
    failure = None
    if own_rank(group) == WRITER:
        config = hf_config_from_model(model, dtype, special_ids)
        try:
            with new_folder(folder) as temporary:
                (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
                _copy_tokenizer(tokenizer_folder, temporary)
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


def _special_ids(tokenizer_folder: str | Path | None, model: ModelConfig) -> dict[str, int | None]:
    """Ids of the tokenizer's special tokens; none without a tokenizer.

    Raises:
        CheckpointError: no tokenizer there, or one with more tokens than the model has rows.
    """
    if tokenizer_folder is None:
        return {}
    from transformers import AutoTokenizer

    path = Path(tokenizer_folder)
    if not (path / "tokenizer.json").is_file():
        raise CheckpointError(f"--tokenizer-model {path} has no tokenizer.json to put beside the exported weights")
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception for a broken file
        raise CheckpointError(f"--tokenizer-model {path} cannot be read: {error}") from error
    if len(tokenizer) > (model.vocab_size or 0):
        raise CheckpointError(
            f"--tokenizer-model {path} has {len(tokenizer)} tokens, the model's --vocab-size is {model.vocab_size}"
        )
    return {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}


def _copy_tokenizer(tokenizer_folder: str | Path | None, target: Path) -> None:
    if tokenizer_folder is None:
        return
    for name in _TOKENIZER_FILES:
        source = Path(tokenizer_folder) / name
        if source.is_file():
            shutil.copyfile(source, target / name)
