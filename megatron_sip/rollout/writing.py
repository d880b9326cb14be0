"""One round of requests to servers that hold the weights of the step.

An answer counts when its servers were seen to hold the same weights before the request and behind the answer, by
labels that no other attempt has. They are looked at while others still write, so that what is whole can be used.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from megatron_sip.errors import ServiceError
from megatron_sip.rollout.engine import Sampling
from megatron_sip.rollout.requests import Ask, halves_of, request_body, rows_of
from megatron_sip.services.client import ServiceClient
from megatron_sip.services.transport import TOO_LARGE
from megatron_sip.types import Missing, MissingReason

LOOK_SECONDS = 1.0
"""Between two looks at what the servers hold, while some requests are under way."""

Rows = list[tuple[int, ...]]


@dataclass(frozen=True)
class Writers:
    """Servers that hold the same weights: a common client with retries and failover, and the names to ask with.

    `hold_still` asks all of them whether they hold the weights as they did when the round began.
    """

    client: ServiceClient
    model: str
    version: str
    vocab_size: int
    hold_still: Callable[[], Awaitable[bool]]


@dataclass
class Round:
    """What came of the requests of one round, each under its number.

    `fault` says of the last answer that was of no use why; `lost` that the servers did not hold the weights to the end.
    """

    rows: dict[int, Rows] = field(default_factory=dict)
    fault: str = ""
    lost: bool = False


async def write(
    writers: Writers, asks: Mapping[int, Ask], sampling: Sampling, hear: Callable[[Mapping[int, Rows]], None]
) -> Round:
    """Ask for all at once; `hear` gets the rows of requests as soon as they count, each once.

    Raises:
        ServiceError: a request that a server refuses, and will refuse again.
    """
    done, doubtful, looked = Round(), dict[int, Rows](), -LOOK_SECONDS
    tasks = {asyncio.create_task(_rows(writers, ask, sampling)): number for number, ask in asks.items()}
    try:
        while tasks or doubtful:
            # What came in between is looked at together, and the last at once.
            pause = max(0.0, looked + LOOK_SECONDS - time.monotonic()) if doubtful else None
            if tasks:
                ended, _ = await asyncio.wait(tasks, timeout=pause, return_when=asyncio.FIRST_COMPLETED)
                for task in ended:
                    number, found = tasks.pop(task), task.result()
                    if isinstance(found, str):
                        done.fault = found
                    else:
                        doubtful[number] = found
            if doubtful and (not tasks or time.monotonic() >= looked + LOOK_SECONDS):
                if not await writers.hold_still():
                    done.fault, done.lost = "a server lost its weights while it wrote", True
                    break
                looked = time.monotonic()
                hear(doubtful)
                done.rows |= doubtful
                doubtful = {}
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return done


async def _rows(writers: Writers, ask: Ask, sampling: Sampling) -> Rows | str:
    """The rows of one request; or, in words, why there are none.

    Raises:
        ServiceError: a server refuses it.
    """
    answer = await writers.client.post("/completions", request_body(ask, sampling, writers.model, writers.version))
    if not isinstance(answer, Missing):
        found = rows_of(answer, ask, sampling, writers.vocab_size)
        return f"an answer is of no use: {found}" if isinstance(found, str) else found
    if answer.detail.startswith(TOO_LARGE) and ask.count > 1:
        return await _in_halves(writers, ask, sampling)
    if _is_refused(answer):
        raise ServiceError(f"the server of --rollout-url refuses to write rollouts: {answer.detail}")
    return answer.detail


async def _in_halves(writers: Writers, ask: Ask, sampling: Sampling) -> Rows | str:
    """The rows of a request whose answer was longer than is read: its tokens have long texts, which come along."""
    rows: Rows = []
    for half in halves_of(ask):
        found = await _rows(writers, half, sampling)
        if isinstance(found, str):
            return found
        rows += found
    return rows


def _is_refused(missing: Missing) -> bool:
    """Whether the same question will be turned away again."""
    speaks = missing.reason in (MissingReason.HTTP_STATUS, MissingReason.TOO_LONG) and missing.detail.startswith("4")
    return speaks and not missing.detail.startswith(("408", "409", "425", "429"))
