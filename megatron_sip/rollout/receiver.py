"""A rollout server's end of weights that come over a connection: an extension of vLLM's worker.

    PYTHONPATH=CHECKOUT vllm serve MODEL --worker-extension-cls megatron_sip.rollout.receiver.WeightReceiver

as `tools/serve_vllm.py --rollouts` does. It runs in the server's environment and imports torch alone; what both ends of
the connection share stands here. A group is made for each push and is gone behind it, so that none can be stale.
"""

from __future__ import annotations

import math
import os
import socket
import threading
import time
from collections import deque
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
"""In which one tensor must have come, besides the time of its bytes; a rank that needs longer is taken for dead."""
SLOWEST_BYTES = 5e7
"""A second; a connection of so little is still waited for."""
WINDOW_BYTES = 1 << 28
"""Under way at once, besides one tensor that is larger."""
_NAP_SECONDS = 0.0005
_ENVIRONMENT = threading.Lock()

Tensors = Sequence[tuple[str, str, Sequence[int]]]
"""Name, type (`bfloat16`) and shape of each tensor, in the order in which they come."""


class StalledError(Exception):
    """A tensor did not come through in time, or is not wanted any more."""


class WeightReceiver:
    """Methods that vLLM adds to its worker; `/collective_rpc` calls them on all ranks of a server.

    They raise nothing: vLLM takes the first failure for the answer of all ranks, and those of the others for answers to
    the next calls.
    """

    def weight_receiver(self) -> dict[str, int]:
        """This rank's place: `rank` from 0, and the `size` of the server over all kinds of parallelism."""
        parallel = self.vllm_config.parallel_config  # type: ignore[attr-defined]
        rank = parallel.data_parallel_index * parallel.world_size + self.rank  # type: ignore[attr-defined]
        return {"rank": rank, "size": parallel.world_size_across_dp}

    def receive_policy_weights(
        self, host: str, port: int, token: str, backend: str, tensors: Tensors
    ) -> dict[str, Any]:
        """Load a model of Hugging Face names from the sender who waits at this address.

        Returns:
            `fault`: in words, why this rank has not all of them; None if it has. `left`: how many vLLM did not load.
        """
        try:
            return {"fault": None, "left": self._receive(host, port, token, backend, tensors)}
        except Exception as error:
            return {"fault": f"{type(error).__name__}: {error}".partition("\n")[0], "left": len(tensors)}

    def _receive(self, host: str, port: int, token: str, backend: str, tensors: Tensors) -> int:
        place = self.weight_receiver()
        device = self.device if backend == "nccl" else torch.device("cpu")  # type: ignore[attr-defined]
        faults: list[Exception] = []
        with joined(host, port, token, 1 + place["rank"], 1 + place["size"], backend, device, tensors) as group:
            arriving = _quietly(received(group, tensors, device), faults)
            self.reload_weights(weights_iterator=arriving)  # type: ignore[attr-defined]
            # vLLM may leave some aside, which the sender still sends to all.
            left = sum(1 for _ in arriving)
            if faults:
                raise faults[0]
        return left


def _quietly(
    arriving: Iterator[tuple[str, torch.Tensor]], faults: list[Exception]
) -> Iterator[tuple[str, torch.Tensor]]:
    """End where a tensor does not come, and keep why: vLLM must come to the end of a load that it has begun.

    It takes its parameters apart before, and whoever uses or loads them in that state ends its engine.
    """
    try:
        yield from arriving
    except Exception as error:
        faults.append(error)


@contextmanager
def joined(
    host: str, port: int, token: str, rank: int, size: int, backend: str, device: torch.device, tensors: Tensors
) -> Iterator[Any]:
    """A group with the sender at this address, as its rank `rank` of `size`, for these tensors.

    token  what the sender calls this transfer; a late call of another one at the same port meets nobody
    """
    seconds = timedelta(seconds=MEET_SECONDS)
    place = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=seconds)
    store = dist.PrefixStore(token, place)
    store.add(HERE, 1)
    with opened(store, rank, size, backend, own_address(host, port), device, tensors) as group:
        yield group


@contextmanager
def opened(
    store: dist.Store, rank: int, size: int, backend: str, address: str, device: torch.device, tensors: Tensors
) -> Iterator[Any]:
    """A process group of its own beside all others of this process; gloo listens on `address` alone.

    It is shut down behind its use, and aborted if that fails.

    Raises:
        StalledError, RuntimeError: another rank does not come in time.
    """
    seconds = timedelta(seconds=patience(tensors))
    if backend == "gloo":
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
        options._timeout = seconds
        group = dist.ProcessGroupGloo(store, rank, size, options)
    else:
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = seconds
        with _without_watchdog():
            group = dist.ProcessGroupNCCL(store, rank, size, options)
    try:
        if backend == "nccl":
            _connect(group, device)
        yield group
    except BaseException:
        group.abort()
        raise
    group.shutdown()


@contextmanager
def _without_watchdog() -> Iterator[None]:
    """Let torch make no watchdog for a group that is made here: on an error it would end the process.

    `finish` watches instead. The environment is that of all threads, so one group is made at a time.
    """
    name = "TORCH_NCCL_BLOCKING_WAIT"
    with _ENVIRONMENT:
        before = os.environ.get(name)
        os.environ[name] = "1"
        try:
            yield
        finally:
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before


def _connect(group: Any, device: torch.device) -> None:
    """Make nccl's connections, for which it knows no deadline: in a thread that may stay behind.

    Raises:
        StalledError: they are not made in time.
    """
    faults: list[BaseException] = []

    def first_call() -> None:
        try:
            torch.cuda.set_device(device)
            group.broadcast(torch.zeros(1, device=device), 0).wait()
        except BaseException as error:
            faults.append(error)

    thread = threading.Thread(target=first_call, name="sip-transfer-connect", daemon=True)
    thread.start()
    thread.join(STALL_SECONDS)
    if thread.is_alive():
        raise StalledError(f"nccl made no connection in {STALL_SECONDS:.0f} s")
    if faults:
        raise faults[0]


def size_of(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor."""
    item: torch.dtype = getattr(torch, dtype)
    return math.prod(shape) * item.itemsize


def patience(tensors: Tensors) -> float:
    """Seconds in which any of these must have come through once it is sent."""
    return STALL_SECONDS + max((size_of(dtype, shape) for _, dtype, shape in tensors), default=0) / SLOWEST_BYTES


class Window:
    """Broadcasts that are under way, the oldest first, within `WINDOW_BYTES`."""

    def __init__(self, seconds: float, unwanted: Callable[[], bool] = lambda: False) -> None:
        self._seconds, self._unwanted = seconds, unwanted
        self._open: deque[tuple[str, torch.Tensor, Any]] = deque()

    def add(self, name: str, tensor: torch.Tensor, work: Any) -> None:
        """One that has begun."""
        self._open.append((name, tensor, work))

    def ended(self, room: float = math.inf) -> Iterator[tuple[str, torch.Tensor]]:
        """Wait for the oldest ones until `room` bytes more may be under way; all of them by default.

        Raises:
            StalledError: one is not through in time, or nobody wants it any more.
            RuntimeError: the connection broke.
        """
        while self._open and sum(tensor.nbytes for _, tensor, _ in self._open) + room > WINDOW_BYTES:
            name, tensor, work = self._open.popleft()
            finish(work, name, self._seconds, self._unwanted)
            yield name, tensor


def received(group: Any, tensors: Tensors, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors as they come from rank 0, each in memory of its own; the next ones come while one is used.

    Raises:
        StalledError, RuntimeError: as `Window.ended`.
    """
    window = Window(patience(tensors))
    for name, dtype, shape in tensors:
        yield from window.ended(size_of(dtype, shape))
        tensor = torch.empty(tuple(shape), dtype=getattr(torch, dtype), device=device)
        window.add(name, tensor, group.broadcast(tensor, 0))
    yield from window.ended()


def finish(work: Any, name: str, seconds: float, unwanted: Callable[[], bool] = lambda: False) -> None:
    """Wait until a tensor is through; neither a dead peer nor one that hangs holds this up for ever.

    Raises:
        StalledError: it is not through in time, or `unwanted` says that nobody waits for it any more.
        RuntimeError: the connection broke.
    """
    deadline = time.monotonic() + seconds
    while not work.is_completed():
        if unwanted():
            raise StalledError(f"{name} is not wanted any more")
        if time.monotonic() > deadline:
            raise StalledError(f"{name} did not come through in {seconds:.0f} s")
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
