"""A rollout server's end of weights that come over a connection: an extension of vLLM's worker.

    PYTHONPATH=CHECKOUT vllm serve MODEL --worker-extension-cls megatron_sip.rollout.receiver.WeightReceiver

as `tools/serve_vllm.py --rollouts` does. It runs in the server's environment and imports torch alone; what both ends of
the connection share stands here. A group is made for each push and is gone behind it, so that none can be stale.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

HERE = "here"
"""Key under which the meeting counts those that have come."""
MEET_SECONDS = 10.0
"""In which a rank of a server must reach the sender's meeting place."""
STALL_SECONDS = 60.0
"""In which one tensor must have come; a rank that needs longer is taken for dead."""
_NAP_SECONDS = 0.0005

Tensors = Sequence[tuple[str, str, Sequence[int]]]
"""Name, type (`bfloat16`) and shape of each tensor, in the order in which they come."""


class StalledError(Exception):
    """A tensor did not come through in time, or is not wanted any more."""


class WeightReceiver:
    """Methods that vLLM adds to its worker; `/collective_rpc` calls them on all ranks of a server."""

    def weight_receiver(self) -> dict[str, int]:
        """This rank's place: `rank` from 0, and the `size` of the server over all kinds of parallelism."""
        parallel = self.vllm_config.parallel_config  # type: ignore[attr-defined]
        rank = parallel.data_parallel_index * parallel.world_size + self.rank  # type: ignore[attr-defined]
        return {"rank": rank, "size": parallel.world_size_across_dp}

    def receive_policy_weights(self, host: str, port: int, backend: str, tensors: Tensors) -> dict[str, int]:
        """Load a model of Hugging Face names from the sender who waits at this address.

        Raises:
            Exception: of torch or vLLM; the server has then a part of the weights.
        """
        place = self.weight_receiver()
        device = self.device if backend == "nccl" else torch.device("cpu")  # type: ignore[attr-defined]
        with joined(host, port, 1 + place["rank"], 1 + place["size"], backend) as group:
            arriving = received(group, tensors, device)
            self.reload_weights(weights_iterator=arriving)  # type: ignore[attr-defined]
            # vLLM may leave some aside, which the sender still sends to all.
            left = sum(1 for _ in arriving)
        return {"loaded": len(tensors) - left}


@contextmanager
def joined(host: str, port: int, rank: int, size: int, backend: str) -> Iterator[Any]:
    """A group with the sender at this address, as its rank `rank` of `size`; aborted if what follows fails."""
    seconds = timedelta(seconds=MEET_SECONDS)
    store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=seconds)
    store.add(HERE, 1)
    group = open_group(store, rank, size, backend, own_address(host, port))
    try:
        yield group
    except BaseException:
        group.abort()
        raise


def open_group(store: dist.Store, rank: int, size: int, backend: str, address: str) -> Any:
    """A process group of its own beside all others of this process; gloo listens on `address` alone.

    Raises:
        RuntimeError: another rank does not come in time.
    """
    if backend == "gloo":
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
        options._timeout = timedelta(seconds=STALL_SECONDS)
        return dist.ProcessGroupGloo(store, rank, size, options)
    options = dist.ProcessGroupNCCL.Options()
    # Longer than our own watch, which ends a call; torch's would end the process.
    options._timeout = timedelta(seconds=10 * STALL_SECONDS)
    with _only_abort():
        return dist.ProcessGroupNCCL(store, rank, size, options)


@contextmanager
def _only_abort() -> Iterator[None]:
    """Let a group that is made here end its own calls on an error, and not the process, as torch does by default."""
    name = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    before = os.environ.get(name)
    os.environ[name] = "2"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def received(group: Any, tensors: Tensors, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors as they come from rank 0, each in memory of its own; the next one comes while one is used.

    Raises:
        StalledError: one does not come in time.
    """
    waiting: tuple[str, torch.Tensor, Any] | None = None
    for name, dtype, shape in tensors:
        tensor = torch.empty(tuple(shape), dtype=getattr(torch, dtype), device=device)
        coming = name, tensor, group.broadcast(tensor, 0)
        if waiting is not None:
            yield _arrived(*waiting)
        waiting = coming
    if waiting is not None:
        yield _arrived(*waiting)


def _arrived(name: str, tensor: torch.Tensor, work: Any) -> tuple[str, torch.Tensor]:
    finish(work, name)
    return name, tensor


def finish(work: Any, name: str, unwanted: Callable[[], bool] = lambda: False) -> None:
    """Wait until a tensor is through; neither a dead peer nor one that hangs holds this up for ever.

    Raises:
        StalledError: it is not through in time, or `unwanted` says that nobody waits for it any more.
        RuntimeError: the connection broke.
    """
    deadline = time.monotonic() + STALL_SECONDS
    while not work.is_completed():
        if unwanted():
            raise StalledError(f"{name} is not wanted any more")
        if time.monotonic() > deadline:
            raise StalledError(f"{name} did not come through in {STALL_SECONDS:.0f} s")
        time.sleep(_NAP_SECONDS)
    work.wait()  # raises what went wrong


def own_address(host: str, port: int) -> str:
    """The address of this machine from which packets to that one leave; none is sent.

    Raises:
        OSError: there is no way to it.
    """
    family, kind, protocol, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])
