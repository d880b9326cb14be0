"""The side of a conversion that writes a folder as `--save` of a run does."""

from __future__ import annotations

import io
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_sip.checkpoint.convert_pieces import model_pieces
from megatron_sip.checkpoint.convert_source import Source
from megatron_sip.checkpoint.convert_state import TrainingState
from megatron_sip.checkpoint.hf_names import TABLE, Kind, LlamaShape
from megatron_sip.checkpoint.hf_tokenizer import require_own_file
from megatron_sip.checkpoint.latest import LATEST, checkpoint_folder
from megatron_sip.checkpoint.manifest import (
    BACKENDS,
    COMMON,
    FORMAT_VERSION,
    MANIFEST,
    RUN_CONFIG,
    Manifest,
    file_entry,
    write_manifest,
)
from megatron_sip.checkpoint.progress import Progress, to_state
from megatron_sip.checkpoint.restricted import METADATA
from megatron_sip.checkpoint.safetensors_io import new_folder
from megatron_sip.checkpoint.stream_write import write_distributed
from megatron_sip.config.groups import Config
from megatron_sip.config.run_config import save_run_config

# What megatron-core 0.16.1 writes (dist_checkpointing.core.CheckpointingConfig).
_BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
# The linear layers of both specs have a state of their own beside the weight, which is None without FP8.
_WITH_EXTRA_STATE = (Kind.QKV, Kind.PROJ, Kind.GATE_UP, Kind.DOWN)
# Files of a checkpoint that are made anew.
_OWN_FILES = (METADATA, BACKENDS, COMMON, RUN_CONFIG, MANIFEST)


def write_mcore(
    target: Path,
    source: Source,
    shape: LlamaShape,
    config: Config,
    dtype: torch.dtype,
    progress: Callable[[int, int], None],
    state: TrainingState | None = None,
) -> None:
    """Write a checkpoint into a new folder and name it in the latest file.

    shape   what is written, with its padding
    config  becomes run_config.yaml; its parallel sizes are the target's
    state   what goes along; None makes a checkpoint of iteration 0 that holds the policy alone

    Raises:
        CheckpointError: `target` exists, the disk refuses, or the source is damaged; `target` is not there then.
    """
    tp_size = config.parallel.tensor_model_parallel_size
    pieces = [*model_pieces(source, shape, tp_size, dtype), *(state.pieces if state else ())]
    objects = state.objects if state else extra_states(shape.num_layers)
    iteration = state.iteration if state else 0
    total, done = sum(piece.nbytes for piece in pieces), 0

    def written(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    with new_folder(target) as temporary:
        folder = checkpoint_folder(temporary, iteration)
        folder.mkdir()
        write_distributed(folder, pieces, objects, written)
        (folder / BACKENDS).write_text(json.dumps(_BACKENDS))
        if state:
            _copy_rest(state.folder, folder)
        else:
            # Python's own write tells what the disk says; torch's writer makes a RuntimeError of it.
            (folder / COMMON).write_bytes(_saved(policy_alone()).getbuffer())
        save_run_config(config, folder / RUN_CONFIG)
        files = {path.name: file_entry(path) for path in sorted(folder.iterdir())}
        write_manifest(folder, Manifest(FORMAT_VERSION, iteration, files, time.time()))
        (temporary / LATEST).write_text(f"{iteration}\n")


def policy_alone() -> dict[str, Any]:
    """The common state of a checkpoint from which a run starts at its first iteration."""
    return {"format_version": FORMAT_VERSION, **to_state(Progress(0, 0, {}))}


def extra_states(num_layers: int) -> dict[str, Callable[[], io.BytesIO]]:
    """The objects that megatron-core stores beside the weights of linear layers, by name: one None a layer."""
    return {
        f"{entry.stored.removesuffix('weight')}_extra_state/shard_{layer}_{num_layers}": _saved_none
        for entry in TABLE
        if entry.kind in _WITH_EXTRA_STATE
        for layer in range(num_layers)
    }


def _saved_none() -> io.BytesIO:
    return _saved([None])


def _saved(content: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(content, file)
    return file


def _copy_rest(source: Path, target: Path) -> None:
    """Copy common.pt and whatever else a save put beside the tensors."""
    for path in sorted(source.iterdir()):
        if path.suffix == ".distcp" or (path.name in _OWN_FILES and path.name != COMMON) or not path.is_file():
            continue
        require_own_file(path)
        shutil.copyfile(path, target / path.name)
