"""How weights come to a rollout server: through a folder that both see, or over a connection."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar
from urllib.parse import urlsplit

import torch

from megatron_sip.checkpoint.safetensors_io import SafetensorsFolder
from megatron_sip.errors import CheckpointError, ConfigError
from megatron_sip.rollout.calls import Reach, UnusableError, answered, is_away
from megatron_sip.rollout.proof import Weights
from megatron_sip.rollout.receiver import Tensors, own_address
from megatron_sip.rollout.transfer import Meeting, TransferError, send
from megatron_sip.types import Missing

T = TypeVar("T")

_HOW_TO_RECEIVE = (
    "start it by tools/serve_vllm.py --rollouts, or with --worker-extension-cls "
    "megatron_sip.rollout.receiver.WeightReceiver and the checkout on its PYTHONPATH"
)
OTHER_END_SECONDS = 10.0
"""Between the end of a transfer at one of its ends, and at the other."""


class Delivery(Protocol):
    """Brings exported weights to a server.

    `by_any_leader`: whether every leader can, or only that of the process that exported them.
    """

    by_any_leader: bool

    async def check(self, to: Reach) -> None:
        """Whether the server can take weights in this way. Raises UnusableError where it cannot."""

    async def bring(self, to: Reach, weights: Weights) -> None:
        """Let the server load them.

        Raises:
            UnusableError: it does not have them whole.
        """


class ByFolder:
    """The server reads the folder itself, which it must see under the same path."""

    by_any_leader = True

    async def check(self, to: Reach) -> None:
        """Nothing: whether it sees the folder shows with the first weights."""

    async def bring(self, to: Reach, weights: Weights) -> None:
        """See `Delivery.bring`."""
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(weights.folder)}}
        answer = await to.client.post("/collective_rpc", body, at_root=True)
        if isinstance(answer, Missing):
            if is_away(answer):
                raise UnusableError(f"the weights could not be sent ({answer.detail})", passing=True)
            raise UnusableError(
                f"it could not load the weights in {weights.folder} ({answer.detail}); it must see that folder under "
                "the same path (--rollout-weights-dir). Its log has the reason; it is without whole weights until a "
                "reload succeeds or it is started anew"
            )


class ByConnection:
    """The weights are broadcast to all ranks of a server by gloo or nccl; see `receiver.py`.

    Each server has a group of its own, so that one that dies takes nobody else's weights with it.
    """

    by_any_leader = False

    def __init__(self, backend: Literal["gloo", "nccl"], device: torch.device) -> None:
        if backend == "nccl" and device.type != "cuda":
            raise ConfigError("--rollout-transfer nccl needs a GPU, and this rank has none; say gloo")
        self._backend, self._device = backend, device if backend == "nccl" else torch.device("cpu")

    async def check(self, to: Reach) -> None:
        """See `Delivery.check`."""
        try:
            await self._ranks(to)
        except UnusableError as error:
            raise UnusableError(f"it has no receiver of weights, it seems: {error}; {_HOW_TO_RECEIVE}") from error

    async def _ranks(self, to: Reach) -> int:
        """How many ranks the server has."""
        answer = await answered(to.single.post("/collective_rpc", {"method": "weight_receiver"}, at_root=True))
        places = answer.get("results")
        if not isinstance(places, list) or not all(isinstance(place, dict) and "size" in place for place in places):
            raise UnusableError(f"its ranks do not say who they are: {str(answer)[:200]}", passing=True)
        if not places or int(places[0]["size"]) != len(places):
            raise UnusableError(
                f"{len(places)} of its ranks answer, and they say that there are others ({places}); give each replica "
                "of a data parallel server a --rollout-url of its own"
            )
        return len(places)

    async def bring(self, to: Reach, weights: Weights) -> None:
        """See `Delivery.bring`."""
        ranks = await self._ranks(to)
        try:
            tensors = await asyncio.to_thread(described, weights.folder)
            meeting = await asyncio.to_thread(meeting_for, to.url, 1 + ranks)
        except (CheckpointError, OSError, RuntimeError) as error:
            raise UnusableError(f"the weights could not be sent ({error})", passing=True) from error
        unwanted = threading.Event()
        sending = asyncio.wrap_future(
            _in_thread(lambda: send(meeting, weights.folder, tensors, self._backend, self._device, unwanted.is_set))
        )
        sending.add_done_callback(lambda done: done.cancelled() or done.exception())  # also where nobody asks any more
        where = {"host": meeting.address, "port": meeting.port, "token": meeting.token}
        body = {"method": "receive_policy_weights", "kwargs": {**where, "backend": self._backend, "tensors": tensors}}
        taking = asyncio.ensure_future(to.single.post("/collective_rpc", body, at_root=True))
        ends: set[asyncio.Future[Any]] = {taking, sending}
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if not taking.done() and sending.exception() is None:
                await asyncio.wait({taking})  # it has all of them, and works on
            await asyncio.wait(ends, timeout=OTHER_END_SECONDS)
        finally:
            unwanted.set()
            taking.cancel()
        # A call of torch may not come back; then its thread is left behind.
        await asyncio.wait(ends, timeout=OTHER_END_SECONDS)
        faults = [*_sender_faults(sending), *_taker_faults(taking, ranks)]
        if faults:
            raise UnusableError(
                f"the weights did not come through ({'; '.join(faults)}); its log may tell more. Look for a firewall "
                "between it and the trainer, or say --rollout-transfer folder",
                passing=True,
            )


def _sender_faults(sending: asyncio.Future[None]) -> Iterator[str]:
    if not sending.done():
        yield "the sender's call does not end"
    elif error := sending.exception():
        if not isinstance(error, TransferError):
            raise error
        yield str(error)


def _taker_faults(taking: asyncio.Future[dict[str, Any] | Missing], ranks: int) -> Iterator[str]:
    if not taking.done() or taking.cancelled():
        yield "the server does not say that it has them"
        return
    answer = taking.result()
    if isinstance(answer, Missing):
        yield answer.detail
        return
    told = answer.get("results")
    if not isinstance(told, list) or len(told) != ranks or not all(isinstance(one, dict) for one in told):
        yield f"its ranks answer something else: {str(answer)[:200]}"
        return
    for rank, one in enumerate(told):
        if one.get("fault") is not None:
            yield f"rank {rank}: {one['fault']}"
        elif one.get("left") != 0:
            yield f"rank {rank} left {one.get('left')} tensors aside"


def meeting_for(url: str, size: int) -> Meeting:
    """Where this process meets the ranks of the server at `url`.

    Raises:
        OSError, RuntimeError: there is no way to it, or it cannot listen there.
    """
    parts = urlsplit(url)
    return Meeting(own_address(parts.hostname or "", parts.port or 80), size)


def described(folder: Path) -> Tensors:
    """Name, type and shape of the tensors of a folder, in the order in which they are sent.

    Raises:
        CheckpointError: the folder cannot be read.
    """
    with SafetensorsFolder(folder) as source:
        return [
            (name, str(source.dtype(name)).removeprefix("torch."), list(source.lazy(name).get_shape()))
            for name in sorted(source.names)
        ]


def _in_thread(action: Callable[[], T]) -> Future[T]:
    """Run it in a thread that the end of the process does not wait for: a call of torch may not come back."""
    future: Future[T] = Future()
    threading.Thread(target=_run, args=(action, future), name="sip-transfer", daemon=True).start()
    return future


def _run(action: Callable[[], T], future: Future[T]) -> None:
    try:
        future.set_result(action())
    except BaseException as error:
        future.set_exception(error)
    finally:
        del future  # its error holds this frame
