"""A second copy of a call that is slow, for the tail of the answer times: the first good answer wins.

The copies cost the servers work, so at most `HEDGED_SHARE` of the calls get one: on a server that is slow because it is
overloaded, everything is slow, and copies of everything would double its load.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

HEDGED_SHARE = 0.05

T = TypeVar("T")


def may_hedge(hedges: int, calls: int) -> bool:
    """Whether one more copy keeps the copies at `HEDGED_SHARE` of the calls, the first copy apart."""
    return hedges < HEDGED_SHARE * calls


async def race(
    first: Awaitable[T], second: Callable[[], Awaitable[T] | None], after: float, good: Callable[[T], bool]
) -> T:
    """The first good answer of `first` and of the copy that `second` starts if there is none within `after` seconds.

    The other one is cancelled. Where neither is good, the later answer. `second` may refuse to start a copy (None).
    """
    racers = {asyncio.ensure_future(first)}
    try:
        done, running = await asyncio.wait(racers, timeout=after)
        copy = None if done else second()
        if copy is not None:
            racers.add(asyncio.ensure_future(copy))
            running = set(racers)
        while running and not any(good(task.result()) for task in done):
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        return next((task for task in done if good(task.result())), next(iter(done))).result()
    finally:
        losers = [task for task in racers if not task.done()]
        for task in losers:
            task.cancel()
        # They close their connections before the winner's answer is used, so that counts of calls in flight are right.
        await asyncio.gather(*losers, return_exceptions=True)
