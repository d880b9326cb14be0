"""Rounds of questions, put to the judges in the background until nothing is left to ask."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from typing import Protocol, TypeAlias, TypeVar

from megatron_sip.types import Answers, Missing, Pool, Question

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

Rewrites: TypeAlias = list[str | Missing]
Ask: TypeAlias = Callable[[list[Pool], list[list[Question]]], Awaitable[list[Answers]]]


class Rounds(Protocol[T_co]):
    """What is asked about some pools, round after round, and what comes of it. Called from one thread at a time."""

    @property
    def pools(self) -> Sequence[Pool]:
        """The pools that questions and answers speak of, in their order."""
        ...

    def next(self, answers: Sequence[Answers]) -> list[list[Question]]:
        """The next questions about each pool, given all answers so far; none about any: there is no more to ask."""
        ...

    def result(self, answers: list[Answers]) -> T_co:
        """What all answers together mean."""
        ...


async def run_rounds(begin: Callable[[Rewrites | None], Rounds[T]], rewrites: Future[Rewrites] | None, ask: Ask) -> T:
    """Wait for `rewrites`, if any, begin the rounds that they belong to, and put them to the judges one by one.

    What is worked out between two rounds is worked out in a thread, so that calls under way are answered meanwhile.
    """
    # Others may wait for the same rewrites: one who is cancelled takes nothing from them.
    texts: Rewrites | None = None
    if rewrites is not None:
        there: asyncio.Future[Rewrites] = asyncio.wrap_future(rewrites)
        texts = await asyncio.shield(there)
    rounds = await asyncio.to_thread(begin, texts)
    pools = list(rounds.pools)
    answers: list[Answers] = [{} for _ in pools]
    while any(questions := await asyncio.to_thread(rounds.next, answers)):
        for given, fresh in zip(answers, await ask(pools, questions), strict=True):
            given.update(fresh)
    return await asyncio.to_thread(rounds.result, answers)


async def gathered(futures: Sequence[Future[T]]) -> list[T]:
    """The results of all, in their order, whichever comes first; the first error ends the wait."""
    return list(await asyncio.gather(*map(asyncio.wrap_future, futures)))
