"""Bringing a policy's tensors, one at a time, to the rank that writes an export."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_sip.checkpoint.hf_names import Kind, LlamaShape, Slot, slots
from megatron_sip.checkpoint.hf_stage import policy_shape
from megatron_sip.checkpoint.hf_tensors import join
from megatron_sip.config.groups import ModelConfig
from megatron_sip.errors import CheckpointError

WRITER = 0
"""The rank within the group that writes."""


@dataclass(frozen=True)
class Inventory:
    """What one rank brings to an export, or why it cannot."""

    tp_rank: int
    tensors: dict[Slot, tuple[tuple[int, ...], torch.dtype]]
    error: str | None = None


def own_rank(group: dist.ProcessGroup | None) -> int:
    """Rank within the group; 0 without one."""
    return WRITER if group is None else dist.get_rank(group)


def gather_inventories(own: Inventory, group: dist.ProcessGroup | None) -> list[Inventory]:
    """Everyone's inventory, by rank within the group."""
    if group is None:
        return [own]
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, own, group=group)
    return gathered


def agree(
    inventories: list[Inventory], model: ModelConfig, dtype: torch.dtype | None
) -> tuple[LlamaShape, torch.dtype]:
    """Shape and dtype of the export. Every rank sees the same inventories and so comes to the same end.

    Raises:
        CheckpointError: a rank's own error, a tensor that is missing or there twice, or mixed types.
    """
    errors = [inventory.error for inventory in inventories if inventory.error is not None]
    if errors:
        raise CheckpointError(errors[0])
    tp_size = _tp_size(inventories)
    tensors = {slot: tensor for inventory in inventories for slot, tensor in inventory.tensors.items()}
    shape = policy_shape({slot: size for slot, (size, _) in tensors.items()}, model, tp_size)
    for inventory in inventories:
        for slot, tensor in inventory.tensors.items():
            if tensor[0] != tensors[slot][0]:
                raise CheckpointError(f"{slot.mcore} has shapes {tensor[0]} and {tensors[slot][0]} on two ranks")
    for slot in slots(shape):
        holders = sorted(inventory.tp_rank for inventory in inventories if slot in inventory.tensors)
        if holders != list(range(tp_size)):
            raise CheckpointError(f"{slot.mcore} is on the tensor parallel ranks {holders}, expected each of {tp_size}")
    dtypes = {kind for _, kind in tensors.values()}
    if dtype is None and len(dtypes) != 1:
        raise CheckpointError(
            f"the parameters have several types ({sorted(map(str, dtypes))}); name the export's dtype"
        )
    return shape, dtype if dtype is not None else dtypes.pop()


def _tp_size(inventories: list[Inventory]) -> int:
    return max(inventory.tp_rank for inventory in inventories) + 1


def joined_tensors(
    mine: Mapping[Slot, torch.Tensor],
    inventories: list[Inventory],
    shape: LlamaShape,
    group: dist.ProcessGroup | None,
) -> Iterator[tuple[Slot, torch.Tensor | None]]:
    """Every slot of the model in order; with its joined tensor on the writer, with None on the others, which send."""
    me, device = own_rank(group), next(iter(mine.values())).device
    for slot in slots(shape):
        holders = {inv.tp_rank: rank for rank, inv in enumerate(inventories) if slot in inv.tensors}
        senders = [holders[tp] for tp in range(1 if slot.entry.kind is Kind.NORM else len(holders))]
        if me != WRITER:
            if me in senders:
                dist.send(mine[slot].detach().contiguous(), group=group, group_dst=WRITER)
            yield slot, None
            continue
        shards = []
        for sender in senders:
            if sender == WRITER:
                shards.append(mine[slot].detach())
                continue
            size, kind = inventories[sender].tensors[slot]
            shard = torch.empty(size, dtype=kind, device=device)
            dist.recv(shard, group=group, group_src=sender)
            shards.append(shard)
        yield slot, join(slot.entry.kind, shards)


def raise_together(failure: str | None, group: dist.ProcessGroup | None) -> None:
    """Tell all ranks whether the writer failed.

    Raises:
        CheckpointError: with the writer's message, on every rank.
    """
    verdict = [failure]
    if group is not None:
        dist.broadcast_object_list(verdict, group=group, group_src=WRITER)
    if verdict[0] is not None:
        raise CheckpointError(verdict[0])
