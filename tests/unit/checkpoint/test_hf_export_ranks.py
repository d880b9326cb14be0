"""Import and export over real process groups: TP 2 x PP 2 on four gloo processes, one launch for all checks."""

from __future__ import annotations

import errno
import os
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hf_toys import KINDS, empty_stage, padded, toy_llama
from safetensors.torch import load_file

from megatron_sip.checkpoint.hf import export_hf, load_hf_weights
from megatron_sip.checkpoint.hf_config import model_config_from_hf
from megatron_sip.checkpoint.hf_names import llama_shape
from megatron_sip.checkpoint.safetensors_io import SafetensorsWriter
from megatron_sip.errors import CheckpointError


def load_stage(folder: Path, rank: int):
    """Rank = tp_rank + 2 * stage; stage 0 has layer 0, stage 1 has layers 1 and 2."""
    model = model_config_from_hf(folder)
    tp_rank, layers = rank % 2, (range(1), range(1, 3))[rank // 2]
    stage = empty_stage(padded(llama_shape(model), 2), 2, layers)
    load_hf_weights(folder, stage, model, tp_rank=tp_rank, tp_size=2, first_layer=layers.start)
    return model, stage, {"tp_rank": tp_rank, "first_layer": layers.start, "group": dist.group.WORLD}


def on_each_rank(rank: int, root: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(root, "store"), 4)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=4, timeout=timedelta(seconds=60))
    for kind in ("gqa", "odd_groups_tied"):
        model, stage, place = load_stage(Path(root, kind), rank)
        export_hf(Path(root, f"{kind}-out"), stage, model, **place, max_shard_bytes=30_000)
        with pytest.raises(CheckpointError, match="never overwritten"):
            export_hf(Path(root, f"{kind}-out"), stage, model, **place)
    full = OSError(errno.ENOSPC, "No space left on device")
    with patch.object(SafetensorsWriter, "write", side_effect=full), pytest.raises(CheckpointError, match="No space"):
        export_hf(Path(root, "full"), stage, model, **place)
    if rank == 3:
        del stage["decoder.final_layernorm.weight"]
    with pytest.raises(CheckpointError, match=r"final_layernorm\.weight is on the tensor parallel ranks \[0\]"):
        export_hf(Path(root, "lacking"), stage, model, **place)
    if rank == 2:
        stage["unknown.weight"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"unknown\.weight has no counterpart"):
        export_hf(Path(root, "unknown"), stage, model, **place)
    dist.barrier()
    dist.destroy_process_group()


def test_stages_and_ranks_make_the_same_folder_again(tmp_path):
    models = {kind: toy_llama(tmp_path / kind, **KINDS[kind]) for kind in ("gqa", "odd_groups_tied")}
    mp.spawn(on_each_rank, args=(str(tmp_path),), nprocs=4)
    for kind, model in models.items():
        written: dict[str, torch.Tensor] = {}
        for path in (tmp_path / f"{kind}-out").glob("model-*.safetensors"):
            written |= load_file(path)
        expected = load_file(tmp_path / kind / "model.safetensors")
        assert written.keys() == expected.keys()
        assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())
        assert model.config.vocab_size == 101
    left = {path.name for path in tmp_path.iterdir()} - {"store"}
    assert left == {"gqa", "gqa-out", "odd_groups_tied", "odd_groups_tied-out"}
