"""Many jobs, few at a time: within a round of questions, and over rounds that are fetched ahead."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")


async def run_bounded(jobs: Iterable[Coroutine[Any, Any, T]], limit: int) -> list[T]:
    """Results of all jobs in their order, at most `limit` at a time; a job is made when its turn comes.

    The first exception ends all.
    """
    results: dict[int, T] = {}
    numbered = enumerate(jobs)

    async def work() -> None:
        for index, job in numbered:  # shared: one event loop, and no await between taking and starting
            results[index] = await job

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(limit):
                group.create_task(work())
    except ExceptionGroup as several:
        raise several.exceptions[0] from several
    return [results[index] for index in range(len(results))]


class InTurn:
    """Rounds that begin their jobs in the order in which they came, with at most `limit` jobs of all rounds together.

    What is needed first is so asked first, and the last slow jobs of a round do not hold up the next one. Used within
    one event loop.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._room = asyncio.Semaphore(limit)
        self._last: asyncio.Event | None = None

    @contextmanager
    def place(self) -> Iterator[Place]:
        """A place at the end of the queue, which is left in the end in any case."""
        place = Place(self._room, self._limit, self._last)
        self._last = place.begun
        try:
            yield place
        finally:
            place.begun.set()


class Place:
    """One round in the queue."""

    def __init__(self, room: asyncio.Semaphore, limit: int, before: asyncio.Event | None) -> None:
        self.begun = asyncio.Event()
        self._room, self._limit, self._before = room, limit, before

    async def run(self, jobs: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
        """Results of all jobs in their order, begun once all jobs of the round before have begun."""
        if self._before is not None:
            await self._before.wait()
        return await run_bounded(self._until_begun(jobs), self._limit)

    def _until_begun(self, jobs: Iterable[Coroutine[Any, Any, T]]) -> Iterator[Coroutine[Any, Any, T]]:
        for job in jobs:
            yield self._in_room(job)
        self.begun.set()

    async def _in_room(self, job: Coroutine[Any, Any, T]) -> T:
        try:
            async with self._room:
                return await job
        finally:
            job.close()  # where the round ended before there was room
