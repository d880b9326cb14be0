"""A checkpoint of ours to a Hugging Face folder, in one process and without megatron-core.

A distributed checkpoint holds every parameter whole, whatever layout wrote it, and all layers of one kind as
one tensor with a leading layer axis. Read that way it is the model at TP1 and PP1, which `export_hf` writes.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_sip.checkpoint.hf import export_hf
from megatron_sip.checkpoint.hf_names import EMBEDDING, TABLE
from megatron_sip.checkpoint.latest import checkpoint_folder, first_line, latest_iteration
from megatron_sip.config.groups import Config, ModelConfig
from megatron_sip.config.run_config import load_run_config
from megatron_sip.errors import CheckpointError

RUN_CONFIG = "run_config.yaml"
_LAYER = "decoder.layers."


def export_checkpoint(
    root: str | Path,
    target: str | Path,
    *,
    iteration: int | None = None,
    tokenizer_folder: str | Path | None = None,
    dtype: torch.dtype | None = None,
) -> int:
    """Write the newest checkpoint under `root` (or the one of `iteration`) as a Hugging Face Llama.

    tokenizer_folder  default the --tokenizer-model that the run was made with
    dtype             default that of the saved weights

    Returns:
        The iteration that was exported.

    Raises:
        CheckpointError: no complete checkpoint there, a tensor is missing, or `target` exists already.
        ConfigError: its run_config.yaml cannot be read.
    """
    folder, iteration = _find(Path(root), iteration)
    config = _run_config(folder)
    parameters = read_parameters(folder, config.model)
    export_hf(
        target,
        parameters,
        config.model,
        tokenizer_folder=tokenizer_folder or config.data.tokenizer_model,
        dtype=dtype,
    )
    return iteration


def _find(root: Path, iteration: int | None) -> tuple[Path, int]:
    """Folder and iteration of the wanted checkpoint."""
    wanted = latest_iteration(root) if iteration is None else iteration
    if wanted is None:
        raise CheckpointError(f"--load-dir {root} holds no checkpoint; name a folder that --save wrote")
    folder = checkpoint_folder(root, wanted)
    if not (folder / ".metadata").is_file():
        raise CheckpointError(f"{folder} is no complete checkpoint: .metadata is missing; choose another --iteration")
    return folder, wanted


def _run_config(folder: Path) -> Config:
    """The settings that the checkpoint was saved with."""
    file = folder / RUN_CONFIG
    if not file.is_file():
        raise CheckpointError(f"{file} is missing; without it the architecture is not known")
    return load_run_config(file)


def read_parameters(folder: Path, model: ModelConfig) -> dict[str, torch.Tensor]:
    """The policy's parameters at TP1 and PP1, by megatron-core name, from one checkpoint folder.

    Raises:
        CheckpointError: the folder cannot be read, or holds another number of layers.
    """
    reader = dcp.FileSystemReader(folder)
    try:
        stored = reader.read_metadata().state_dict_metadata
        whole = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in stored.items()
            if isinstance(entry, TensorStorageMetadata) and name in _stored_names()
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that one process loads is meant
            dcp.load(whole, storage_reader=reader, no_dist=True)
    except (OSError, EOFError, KeyError, ValueError, RuntimeError, CheckpointException) as error:
        raise CheckpointError(f"{folder} cannot be read: {first_line(error)}; choose another --iteration") from error
    if EMBEDDING.mcore not in whole:
        raise CheckpointError(f"{folder} holds no policy: {EMBEDDING.mcore} is not in it")
    return _by_layer(whole, model, folder)


def _stored_names() -> set[str]:
    """Names of the model's tensors as the checkpoint spells them: layers are an axis, not a part of the name."""
    names = {name for entry in TABLE for name in (entry.mcore, entry.fused) if name is not None}
    return {name.replace("{layer}.", "") for name in names}


def _by_layer(whole: dict[str, torch.Tensor], model: ModelConfig, folder: Path) -> dict[str, torch.Tensor]:
    """The tensors with a leading layer axis cut into one view a layer."""
    parameters: dict[str, torch.Tensor] = {}
    for name, tensor in whole.items():
        if not name.startswith(_LAYER):
            parameters[name] = tensor
            continue
        if len(tensor) != model.num_layers:
            raise CheckpointError(f"{folder}: {name} has {len(tensor)} layers, its run_config.yaml {model.num_layers}")
        rest = name.removeprefix(_LAYER)
        parameters |= {f"{_LAYER}{layer}.{rest}": part for layer, part in enumerate(tensor)}
    return parameters
