"""What each rank writes of a checkpoint: megatron-core's plan, a copy of it, and the bytes of this rank's file.

megatron-core would write with processes that it forks and with a helper process that it keeps. Here only its plan
is used: the bytes are those that torch's writer makes of each item, and who writes them is the caller's affair.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import torch as torch_dist
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from torch.distributed.checkpoint.filesystem import SerializationFormat, _write_item
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan as TorchPlan
from torch.distributed.checkpoint.planner import SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from megatron_sip.parallel.world import World


class _Writer(FileSystemWriterAsync):
    """megatron-core's writer up to the plan; it writes `.metadata` and no data."""

    items: tuple[WriteItem, ...] = ()

    def prepare_write_data(self, plan: TorchPlan, planner: SavePlanner) -> None:
        """Keep the plan instead of copying tensors for other processes."""
        self.items, self.planner = tuple(plan.items), planner


Item: TypeAlias = tuple[WriteItem, torch.Tensor | io.BytesIO]
"""What is written, and its value."""


@dataclass(frozen=True)
class Piece:
    """One item of a data file, as it stands there."""

    content: io.BytesIO
    result: WriteResult


@dataclass(frozen=True)
class SavePlan:
    """One rank's part of a checkpoint."""

    writer: _Writer
    metadata: Metadata | None
    """What `.metadata` will hold but for the places of the items; on the main rank alone."""
    common: dict[str, Any]
    """What is not sharded, for common.pt."""
    file_name: str

    def items(self) -> Iterator[Item]:
        """The items of this rank's file in order; their values are the trainer's own tensors."""
        for item in self.writer.items:
            yield item, self.writer.planner.resolve_data(item)

    def pieces(self, items: Iterable[Item]) -> Iterator[Piece]:
        """The bytes of `items`, each made when its turn comes."""
        at = 0
        for item, value in items:
            content = io.BytesIO()
            written = _write_item(
                self.writer.transforms,
                content,
                _on_host(value),
                item,
                self.file_name,
                SerializationFormat.TORCH_SAVE,
            )
            yield Piece(content, replace(written, storage_data=replace(written.storage_data, offset=at)))
            at += written.size_in_bytes


class HostCopies:
    """Copies of a rank's items in host memory that is kept from save to save: fresh pages cost more than the copy."""

    def __init__(self) -> None:
        self._tensors: dict[MetadataIndex, torch.Tensor] = {}

    def take(self, items: Iterable[Item]) -> list[Item]:
        """The items with their values as they are now. What was taken before is overwritten."""
        return [(item, value if isinstance(value, io.BytesIO) else self._copy(item, value)) for item, value in items]

    def _copy(self, item: WriteItem, value: torch.Tensor) -> torch.Tensor:
        value = value.detach()
        copy = self._tensors.get(item.index)
        if copy is None or copy.shape != value.shape or copy.dtype != value.dtype:
            # Page-locked with CUDA, for the copy's speed.
            copy = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
            self._tensors[item.index] = copy
        return copy.copy_(value)


def _on_host(value: torch.Tensor | io.BytesIO) -> torch.Tensor | io.BytesIO:
    """A value for torch.save, which would write the whole storage that a view looks into."""
    if isinstance(value, io.BytesIO):
        return value
    tensor = value.detach().cpu()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize
    return tensor if whole else tensor.clone()


def plan_save(state: dict[str, Any], folder: str, world: World) -> SavePlan:
    """Agree with all ranks on who writes which shard of `state`; all ranks call it together."""
    sharded, common = save_preprocess(state, validate_access_integrity=True)
    by_key, _, _ = torch_dist._replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
    writer = _Writer(folder)
    planner = torch_dist.MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    (_, metadata, _), *_ = save_state_dict_async_plan(
        torch_dist.mcore_to_pyt_state_dict(by_key, False), writer, None, 0, planner=planner
    )
    return SavePlan(writer, metadata, common, f"__{world.rank}_0.distcp")


def common_bytes(plan: SavePlan, more: dict[str, Any]) -> bytes:
    """What common.pt will hold: what all ranks know alike, and `more`, which the main rank alone knows."""
    content = io.BytesIO()
    torch.save(plan.common | more, content)
    return content.getvalue()
