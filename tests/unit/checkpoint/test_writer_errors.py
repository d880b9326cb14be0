"""What a save that failed is told to be: a disk is at fault only where one is."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_sip.checkpoint.writer import _written
from megatron_sip.errors import CheckpointError

PARTIAL = Path("save/iter_0000004.incomplete")


def no_space() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def full_for_torch() -> None:
    torch.save(torch.zeros(1 << 16), "/dev/full")


def lost_gpu() -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with ...")


def no_memory() -> None:
    raise MemoryError("Unable to allocate 3 GiB")


@pytest.mark.parametrize("failing", [no_space, full_for_torch])
def test_a_full_disk_is_named(failing: Callable[[], None]) -> None:
    with pytest.raises(CheckpointError, match=rf"cannot write {PARTIAL}: .*; free space or choose another --save"):
        _written(PARTIAL, failing)


@pytest.mark.parametrize(
    ("failing", "says"),
    [
        (lost_gpu, "RuntimeError: CUDA error: an illegal memory access was encountered;"),
        (no_memory, "MemoryError: Unable to allocate 3 GiB;"),
    ],
)
def test_what_is_no_matter_of_a_disk_is_not_told_as_one(failing: Callable[[], None], says: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        _written(PARTIAL, failing)
    assert says in str(caught.value)
    assert "free space" not in str(caught.value)
    assert caught.value.__cause__ is not None
