"""Second copies of slow calls: who wins, who is cancelled, and how many there are."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from megatron_sip.services.hedging import HEDGED_SHARE, may_hedge, race

Maker = Callable[[float, str], Awaitable[str]]


def raced(first: tuple[float, str], second: tuple[float, str] | None, after: float = 0.02) -> tuple[str, list[str]]:
    """The winner of two answers with their seconds (good ones in capitals), and what was cancelled."""
    cancelled: list[str] = []

    async def answer(seconds: float, text: str) -> str:
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            cancelled.append(text)
            raise
        return text

    async def run() -> str:
        winner = await race(answer(*first), lambda: answer(*second) if second else None, after, str.isupper)
        assert len(asyncio.all_tasks()) == 1, "nothing runs on"
        return winner

    return asyncio.run(run()), cancelled


@pytest.mark.parametrize(
    ("first", "second", "winner", "cancelled"),
    [
        ((0.0, "FIRST"), (0.0, "COPY"), "FIRST", []),  # quick: no copy is made
        ((5.0, "FIRST"), (0.0, "COPY"), "COPY", ["FIRST"]),
        ((0.05, "FIRST"), (5.0, "COPY"), "FIRST", ["COPY"]),
        ((0.05, "first"), (0.1, "COPY"), "COPY", []),  # a failure waits for the copy
        ((0.1, "FIRST"), (0.01, "copy"), "FIRST", []),
        ((0.05, "first"), (0.1, "copy"), "copy", []),
        ((0.0, "first"), (0.0, "COPY"), "first", []),  # a quick failure is retried, not copied
        ((0.05, "FIRST"), None, "FIRST", []),
    ],
)
def test_the_first_good_answer_wins(
    first: tuple[float, str], second: tuple[float, str] | None, winner: str, cancelled: list[str]
) -> None:
    assert raced(first, second) == (winner, cancelled)


def test_both_copies_end_with_their_call() -> None:
    async def run() -> None:
        task = asyncio.create_task(race(asyncio.sleep(9, "A"), lambda: asyncio.sleep(9, "B"), 0.01, str.isupper))
        await asyncio.sleep(0.05)
        assert len(asyncio.all_tasks()) == 4
        task.cancel()
        await asyncio.wait([task])
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(run())


def test_copies_are_a_small_share_of_the_calls() -> None:
    hedges = 0
    for calls in range(1, 10_001):
        hedges += may_hedge(hedges, calls)
    assert hedges == HEDGED_SHARE * 10_000
    assert may_hedge(0, 1), "the first call of a run may be copied"
