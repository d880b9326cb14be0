"""megatron-core's loading of a checkpoint, with every pickle read by `restricted`.

megatron-core would open `.metadata` and items of bytes with the plain pickle module. Its `dist_checkpointing.load`
takes other arguments in each version, and a newer one reads common.pt by itself: so what `load` is made of is called
here, step by step. `tests/unit/checkpoint/test_megatron_names.py` lists the names and the versions looked at.
"""

from __future__ import annotations

from typing import Any

from megatron.core.dist_checkpointing.dict_utils import merge, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, StateDict, apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.strategies import torch as torch_dist
from megatron.core.dist_checkpointing.utils import extract_sharded_base, force_all_tensors_to_non_fp8
from megatron.core.dist_checkpointing.validation import (
    StrictHandling,
    determine_global_metadata,
    validate_integrity_and_strict_load,
)
from torch.distributed import checkpoint

from megatron_sip.checkpoint.restricted import RestrictedBytes, RestrictedReader


class _Planner(RestrictedBytes, torch_dist.MCoreLoadPlanner):
    """megatron-core's planner, which checks shapes, with items of bytes that run nothing."""


def _read(sharded: ShardedStateDict, reader: RestrictedReader) -> StateDict:
    """Tensors and sharded objects, as megatron-core's strategy for torch's format reads them."""
    tensors = [item for item in nested_values(sharded) if isinstance(item, ShardedTensor)]
    by_key, flat_mapping, names = torch_dist._replace_state_dict_keys_with_sharded_keys(sharded)
    state: dict[str, Any] = torch_dist.mcore_to_pyt_state_dict(by_key, True)
    planner = _Planner(
        shapes_validation_sharded_tensors=[item for item in tensors if not item.allow_shape_mismatch],
        allow_shape_mismatch_sharded_tensors={item.key: item for item in tensors if item.allow_shape_mismatch},
    )
    checkpoint.load_state_dict(state, reader, planner=planner)
    loaded = {key: torch_dist._unwrap_pyt_sharded_tensor(value) for key, value in state.items()}
    loaded = torch_dist._replace_sharded_keys_with_state_dict_keys(loaded, flat_mapping, names)
    torch_dist._restore_dict_types(loaded, sharded)
    return loaded


def load_sharded(state: ShardedStateDict, reader: RestrictedReader, common: StateDict) -> StateDict:
    """What `dist_checkpointing.load` gives of the reader's folder; all ranks call it together.

    state   the wanted shards
    common  what common.pt holds; it goes into the result

    Raises:
        UnsafeFileError: an item of bytes names what no checkpoint needs (inside torch's CheckpointException).
        CheckpointException, CheckpointingException: shapes differ, or a file cannot be read.
    """
    force_all_tensors_to_non_fp8(state)
    result = dict(common)
    wanted, held, factories = load_preprocess(state)
    merge(result, held)
    sharded, _ = extract_sharded_base(wanted)
    of_rank, of_all = determine_global_metadata(sharded)
    sharded, _, _ = validate_integrity_and_strict_load(
        sharded, StrictHandling.ASSUME_OK_UNEXPECTED, True, of_rank, of_all, None
    )
    merge(result, _read(sharded, reader))
    return apply_factory_merges(result, factories)
