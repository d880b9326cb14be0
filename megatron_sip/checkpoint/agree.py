"""Ranks that read or write one checkpoint fail together or not at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from megatron_sip.errors import CheckpointError
from megatron_sip.parallel.world import World

T = TypeVar("T")


def raise_first(world: World, error: Exception | None) -> None:
    """Raise the first error, by rank, on all ranks alike; every rank says what it met, None for nothing."""
    errors: list[Exception | None] = [None] * world.size
    dist.all_gather_object(errors, error, group=world.control_group)
    first = next((item for item in errors if item is not None), None)
    if first is not None:
        raise first


def attempt(world: World, action: Callable[[], T]) -> T:
    """Run `action` on every rank; a CheckpointError of one is raised on all."""
    error, result = None, None
    try:
        result = action()
    except CheckpointError as caught:
        error = caught
    raise_first(world, error)
    return result  # type: ignore[return-value]


def on_main(world: World, value: T) -> list[T] | None:
    """The values of all ranks in their order, on the main rank; None elsewhere. All ranks call it together."""
    values = [value] * world.size if world.is_main else None
    dist.gather_object(value, values, dst=0, group=world.control_group)
    return values


def from_main(world: World, action: Callable[[], T]) -> T:
    """Run `action` on the main rank; every rank gets its result, or its CheckpointError."""
    result = attempt(world, lambda: action() if world.is_main else None)
    box = [result]
    dist.broadcast_object_list(box, src=0, group=world.control_group)
    return box[0]  # type: ignore[return-value]
