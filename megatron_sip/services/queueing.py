"""Many jobs, few at a time: within a round of questions, and over rounds that are under way together."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator
from contextlib import asynccontextmanager
from typing import Any, TypeVar

T = TypeVar("T")


async def run_bounded(jobs: Iterable[Coroutine[Any, Any, T]], limit: int) -> list[T]:
    """One round alone: results of all jobs in their order, at most `limit` at a time. The first exception ends all."""
    return await InTurn(limit).place().run(jobs)


class InTurn:
    """At most `limit` jobs of all places together; whoever came first has the first claim to what is free.

    What is needed first is so asked first, in its later rounds too, and the last slow jobs of a round do not hold up
    the next one. A job that has begun is not interrupted. Used within one event loop; `place` from anywhere.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._free = limit
        self._numbers, self._arrivals = itertools.count(), itertools.count()
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []

    def place(self) -> Place:
        """A place at the end of the queue; it may run several rounds."""
        return Place(self, next(self._numbers))

    @asynccontextmanager
    async def room(self, number: int) -> AsyncIterator[None]:
        """Wait for room for one job of the place with this number, and hold it."""
        if self._free:
            self._free -= 1  # then nobody waits
        else:
            await self._hand_over(number)
        try:
            yield
        finally:
            self._leave()

    def elder_waits(self, number: int) -> bool:
        """Whether a place that came before this one waits for room."""
        while self._waiting and self._waiting[0][2].done():
            heapq.heappop(self._waiting)
        return bool(self._waiting) and self._waiting[0][0] < number

    async def _hand_over(self, number: int) -> None:
        given = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (number, next(self._arrivals), given))
        try:
            await given
        except asyncio.CancelledError:
            if not given.cancelled():  # the room came together with the end
                self._leave()
            raise

    def _leave(self) -> None:
        while self._waiting:
            *_, given = heapq.heappop(self._waiting)
            if not given.done():
                given.set_result(None)
                return
        self._free += 1


class Place:
    """A place in the queue of `InTurn`."""

    def __init__(self, queue: InTurn, number: int) -> None:
        self._queue, self._number = queue, number

    async def run(self, jobs: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
        """Results of all jobs of a round in their order; a job is made when its turn comes.

        The first exception ends the round.
        """
        results: dict[int, T] = {}
        numbered = enumerate(jobs)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._queue.limit):
                    group.create_task(self._work(numbered, results))
        except ExceptionGroup as several:
            raise several.exceptions[0] from several
        return [results[index] for index in range(len(results))]

    async def _work(self, numbered: Iterator[tuple[int, Coroutine[Any, Any, T]]], results: dict[int, T]) -> None:
        while True:
            async with self._queue.room(self._number):
                for index, job in numbered:  # shared: one event loop, and no await between taking and starting
                    results[index] = await job
                    if self._queue.elder_waits(self._number):
                        break
                else:
                    return
