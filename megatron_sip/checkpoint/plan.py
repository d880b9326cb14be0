"""What each rank writes of a checkpoint: megatron-core's plan, and the bytes that go into this rank's file.

megatron-core would write with processes that it forks and with a helper process that it keeps. Here only its plan
is used: the bytes are those that torch's writer makes of each item, and who writes them is the caller's affair.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import torch as torch_dist
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from torch.distributed.checkpoint.filesystem import SerializationFormat, _write_item
from torch.distributed.checkpoint.metadata import Metadata
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


@dataclass(frozen=True)
class Piece:
    """One item of a data file, as it stands there."""

    content: io.BytesIO
    result: WriteResult


@dataclass(frozen=True)
class SavePlan:
    """One rank's part of a checkpoint. Items refer to the trainer's tensors until `pieces` has read them."""

    writer: _Writer
    metadata: Metadata | None
    """What `.metadata` will hold but for the places of the items; on the main rank alone."""
    common: dict[str, Any]
    """What is not sharded, for common.pt."""
    file_name: str

    def pieces(self) -> Iterator[Piece]:
        """The items of this rank's file in order, each read from the trainer when its turn comes."""
        at = 0
        for item in self.writer.items:
            content = io.BytesIO()
            written = _write_item(
                self.writer.transforms,
                content,
                _on_host(self.writer.planner.resolve_data(item)),
                item,
                self.file_name,
                SerializationFormat.TORCH_SAVE,
            )
            yield Piece(content, replace(written, storage_data=replace(written.storage_data, offset=at)))
            at += written.size_in_bytes


def _on_host(data: torch.Tensor | io.BytesIO) -> torch.Tensor | io.BytesIO:
    """An item for torch.save, which would write the whole storage that a view looks into."""
    if isinstance(data, io.BytesIO):
        return data
    tensor = data.detach().cpu()
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


def common_bytes(plan: SavePlan) -> bytes:
    """What common.pt will hold."""
    content = io.BytesIO()
    torch.save(plan.common, content)
    return content.getvalue()
