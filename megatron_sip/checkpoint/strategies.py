"""megatron-core's loading of a checkpoint, with every pickle read by `restricted`.

megatron-core would open `.metadata` and items of bytes with the plain pickle module.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, StateDict
from megatron.core.dist_checkpointing.strategies import torch as torch_dist
from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy
from torch.distributed import checkpoint

from megatron_sip.checkpoint.restricted import RestrictedBytes, RestrictedReader


class _Planner(RestrictedBytes, torch_dist.MCoreLoadPlanner):
    """megatron-core's planner, which checks shapes, with items of bytes that run nothing."""


class _ShardedStrategy(torch_dist.TorchDistLoadShardedStrategy):
    """megatron-core's loading of tensors and sharded objects, from a reader that was checked."""

    def __init__(self, reader: RestrictedReader) -> None:
        super().__init__()
        self._reader = reader

    def load(self, sharded_state_dict: ShardedStateDict, _checkpoint_dir: Path) -> StateDict:
        """As in megatron-core 0.16.1, where reader and planner cannot be given."""
        tensors = [item for item in nested_values(sharded_state_dict) if isinstance(item, ShardedTensor)]
        by_key, flat_mapping, names = torch_dist._replace_state_dict_keys_with_sharded_keys(sharded_state_dict)
        state: dict[str, Any] = torch_dist.mcore_to_pyt_state_dict(by_key, True)
        planner = _Planner(
            shapes_validation_sharded_tensors=[item for item in tensors if not item.allow_shape_mismatch],
            allow_shape_mismatch_sharded_tensors={item.key: item for item in tensors if item.allow_shape_mismatch},
        )
        checkpoint.load_state_dict(state, self._reader, planner=planner)
        loaded = {key: torch_dist._unwrap_pyt_sharded_tensor(value) for key, value in state.items()}
        loaded = torch_dist._replace_sharded_keys_with_state_dict_keys(loaded, flat_mapping, names)
        torch_dist._restore_dict_types(loaded, sharded_state_dict)
        return loaded


class _CommonStrategy(TorchCommonLoadStrategy):
    """The common state that was read and checked before."""

    def __init__(self, state: StateDict) -> None:
        super().__init__()
        self._state = state

    def load_common(self, _checkpoint_dir: str | Path) -> StateDict:
        """What was given, whatever the folder holds by now."""
        return self._state


def load_sharded(state: ShardedStateDict, reader: RestrictedReader, common: StateDict) -> StateDict:
    """`dist_checkpointing.load` of the reader's folder; all ranks call it together.

    state   the wanted shards
    common  what common.pt holds; it goes into the result

    Raises:
        UnsafeFileError: an item of bytes names what no checkpoint needs (inside torch's CheckpointException).
        CheckpointException, CheckpointingException: shapes differ, or a file cannot be read.
    """
    return dist_checkpointing.load(
        state,
        str(reader.path),
        sharded_strategy=_ShardedStrategy(reader),
        common_strategy=_CommonStrategy(dict(common)),
    )
