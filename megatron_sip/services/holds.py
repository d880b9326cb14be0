"""Calls that wait because every server asked to be left alone (Retry-After), and what to say of them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

NOTED_SECONDS = 10.0
"""A call that waits less in all is no news: a server that limits rates asks for a second now and then."""


class Holds:
    """The waits of one service. `name` says in messages whose servers they are."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._long = 0

    @property
    def note(self) -> str | None:
        """What calls wait for; None while none waits for long. Safe to read from any thread."""
        return (
            f"no server of {self._name} takes calls: all asked to be left alone (Retry-After)" if self._long else None
        )

    @contextmanager
    def of_call(self) -> Iterator[Hold]:
        """The waits of one call, which are over in the end in any case."""
        hold = Hold()
        try:
            yield hold
        finally:
            self._long -= hold.noted

    async def sit_out(self, hold: Hold, seconds: float) -> None:
        """Let the time pass that the servers asked for."""
        hold.seconds += seconds
        if not hold.noted and hold.seconds >= NOTED_SECONDS:
            hold.noted = True
            self._long += 1
        await asyncio.sleep(seconds)


class Hold:
    """How long one call has waited in all, and whether it counts as a long wait."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.noted = False
