"""The most memory that tensors hold at a time; weights that oneDNN has packed are not among them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Within it, `peak` is the most that the tensors which were made within it have held at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(out):
            if storage._cdata not in given:  # else it is a view, or the result of an operation in place
                self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._live = {key: item for key, item in self._live.items() if not item[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return out


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The most that a call of `work` holds at a time beyond what was there before: of the GPU, else of all tensors."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return int(torch.cuda.max_memory_allocated(device)) - before
    with LiveBytes() as seen:
        work()
    return seen.peak


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    tensors = [item for item in tree_iter(tree) if isinstance(item, torch.Tensor)]
    return [tensor.untyped_storage() for tensor in tensors if not tensor.is_mkldnn]
