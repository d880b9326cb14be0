"""All ranks of this start, and none of an earlier one, at one store.

torchrun's agent keeps its store over `--max-restarts`. Ranks that start again would find what the ones before them
left there, such as the addresses of dead processes. So they agree on a name of their own first.
"""

from __future__ import annotations

import os
import time
import uuid
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from megatron_sip.errors import ConfigError, SipError

_NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_POLL = 0.05
_LAUNCH_SECONDS = 60.0


@dataclass(frozen=True)
class Meeting:
    """Where the ranks of one start find each other. `store` holds nothing of another start."""

    rank: int
    size: int
    name: str
    store: dist.Store

    def connect(self, seconds: float) -> dist.Store:
        """The same store over a connection of its own, whose calls fail after `seconds`.

        One connection serves one call at a time, and the first one may sit in a long wait of the main thread.
        """
        return dist.PrefixStore(self.name, _client(seconds, is_master=False))


def meet(seconds: float) -> Meeting:
    """Wait for all ranks of this start; MASTER_ADDR, MASTER_PORT, RANK and WORLD_SIZE say where and how many.

    Raises:
        ConfigError: a variable is missing.
        SipError: the others did not come in time.
    """
    missing = [name for name in _NAMES if name not in os.environ]
    if missing:
        raise ConfigError(f"{', '.join(missing)} is not set beside RANK in the environment; start with torchrun")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # Started without torchrun, rank 0 holds the store.
    ours = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = _client(seconds, is_master=ours and rank == 0)
    deadline = time.monotonic() + seconds
    name = _invite(store, size, deadline) if rank == 0 else _follow(store, rank, deadline)
    return Meeting(rank, size, name, dist.PrefixStore(name, store))


def launch_store() -> dist.Store | None:
    """What the starts of one launch share: the store of torchrun's agent. None where there is none.

    It is gone when the launch is over, or when the node that held it leaves an elastic one.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    name = f"sip/launch/{os.environ.get('TORCHELASTIC_RUN_ID', '')}"
    return dist.PrefixStore(name, _client(_LAUNCH_SECONDS, is_master=False))


def _client(seconds: float, *, is_master: bool) -> dist.Store:
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=is_master,
        timeout=timedelta(seconds=seconds),
        wait_for_workers=False,
        multi_tenant=True,
    )


def _invite(store: dist.Store, size: int, deadline: float) -> str:
    """Rank 0: offer a new name to whoever says hello, until all have taken it.

    A hello may be of a process that is gone. The offer goes to that process alone, so nobody takes it, and the one
    that lives now replaces the hello.
    """
    name = f"sip/{uuid.uuid4().hex}"
    offered: dict[int, bytes] = {}
    missing = set(range(1, size))
    while missing:
        for rank in sorted(missing):
            hello = store.get(f"sip/hello/{rank}") if store.check([f"sip/hello/{rank}"]) else None
            if hello is not None and offered.get(rank) != hello:
                store.set(f"sip/offer/{hello.decode()}", name)
                offered[rank] = hello
        missing = {rank for rank in missing if not store.check([f"{name}/came/{rank}"])}
        if missing:
            _require_time(deadline, f"ranks {', '.join(map(str, sorted(missing)))} did not come")
    return name


def _follow(store: dist.Store, rank: int, deadline: float) -> str:
    """Another rank: say hello and take the name that is offered to this process."""
    me = uuid.uuid4().hex
    store.set(f"sip/hello/{rank}", me)
    while not store.check([f"sip/offer/{me}"]):
        _require_time(deadline, "rank 0 did not come")
    name = store.get(f"sip/offer/{me}").decode()
    store.set(f"{name}/came/{rank}", "")
    return name


def _require_time(deadline: float, what: str) -> None:
    if time.monotonic() > deadline:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise SipError(
            f"{what} to the meeting at {where}; look at their logs, or raise --distributed-timeout-minutes if they "
            "only start slowly"
        )
    time.sleep(_POLL)
