"""Equal questions that are under way at the same time are asked once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from dataclasses import dataclass
from typing import Any


@dataclass
class _Flight:
    """A question under way, and how many wait for its answer."""

    task: asyncio.Task[Any]
    waiting: int = 0


class SingleFlight:
    """Runs one coroutine for each name at a time; whoever asks for the same name meanwhile gets the same result.

    Used within one event loop. `shared` counts those who asked for nothing of their own.
    """

    def __init__(self) -> None:
        self.shared = 0
        self._flights: dict[Hashable, _Flight] = {}

    async def run(self, name: Hashable, make: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        """The result of `make()`, or of the one under way of this name.

        It goes on while anybody waits for it: one who is cancelled takes nothing from the others.
        """
        flight = self._flights.get(name)
        if flight is None:
            flight = self._flights[name] = _Flight(asyncio.ensure_future(make()))
        else:
            self.shared += 1
        flight.waiting += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.waiting -= 1
            if (flight.task.done() or not flight.waiting) and self._flights.get(name) is flight:
                del self._flights[name]
            if not flight.waiting and not flight.task.done():
                flight.task.cancel()
