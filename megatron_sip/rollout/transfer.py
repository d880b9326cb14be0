"""The sender's end of weights that go to a server over a connection; the other one is `receiver.py`."""

from __future__ import annotations

import socket
import time
import uuid
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from megatron_sip.checkpoint.safetensors_io import SafetensorsFolder
from megatron_sip.errors import CheckpointError
from megatron_sip.rollout.receiver import (
    HERE,
    MEET_SECONDS,
    STALL_SECONDS,
    StalledError,
    Tensors,
    Window,
    opened,
    patience,
    size_of,
)

_NAP_SECONDS = 0.01


class TransferError(Exception):
    """Why the weights did not reach all ranks of a server."""


class Meeting:
    """Where the `size` ranks of one transfer meet: a store that listens on one address of this machine alone.

    `token` is the name of the transfer, which those who come must know.

    Raises:
        OSError: the address is not of this machine.
        RuntimeError: torch cannot listen there.
    """

    def __init__(self, address: str, size: int) -> None:
        self.address, self.size, self.token = address, size, uuid.uuid4().hex
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        # torch's own socket would listen on all addresses.
        with socket.create_server((address, 0), family=family, backlog=size) as listener:
            self.port = int(listener.getsockname()[1])
            place = dist.TCPStore(
                address,
                self.port,
                is_master=True,
                wait_for_workers=False,
                timeout=timedelta(seconds=MEET_SECONDS),
                master_listen_fd=listener.detach(),
            )
        self.store = dist.PrefixStore(self.token, place)

    def wait(self, unwanted: Callable[[], bool]) -> None:
        """Wait for all others.

        Raises:
            TransferError: they do not come in time, or are not wanted any more.
        """
        deadline = time.monotonic() + STALL_SECONDS
        while self.store.add(HERE, 0) < self.size - 1:
            if unwanted():
                raise TransferError("the server did not take them")
            if time.monotonic() > deadline:
                raise TransferError(f"its ranks did not come to {self.address} within {STALL_SECONDS:.0f} s")
            time.sleep(_NAP_SECONDS)


def send(
    meeting: Meeting,
    folder: Path,
    tensors: Tensors,
    backend: str,
    device: torch.device,
    unwanted: Callable[[], bool],
) -> None:
    """Broadcast these tensors of a folder to the ranks that come to the meeting; blocks until all have them.

    Raises:
        TransferError: they do not reach all ranks, or `unwanted` says that nobody waits for them any more.
    """
    meeting.wait(unwanted)
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # it is a setting of the thread
        with (
            opened(meeting.store, 0, meeting.size, backend, meeting.address, device, tensors) as group,
            SafetensorsFolder(folder) as source,
        ):
            window = Window(patience(tensors), unwanted)
            for name, dtype, shape in tensors:
                tensor = source.lazy(name)[:]
                deque(window.ended(size_of(dtype, shape)), maxlen=0)
                tensor = tensor.to(device)
                window.add(name, tensor, group.broadcast(tensor, 0))
            deque(window.ended(), maxlen=0)
    except (StalledError, CheckpointError, SafetensorError, OSError, RuntimeError) as error:
        raise TransferError(str(error).partition("\n")[0]) from error
