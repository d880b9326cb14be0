"""Calls that wait because every server asked to be left alone (Retry-After), and what to say of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

NOTED_SECONDS = 10.0
"""Less is no news: a server that limits rates asks for a second now and then, and is a good server all the same."""


class Holds:
    """The waits of one service. `name` says in messages whose servers they are."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._long = 0
        self._answered_at = float("-inf")

    @property
    def note(self) -> str | None:
        """What calls wait for; None unless one waits for long while none is answered. Safe to read from any thread."""
        if not self._long or time.monotonic() - self._answered_at < NOTED_SECONDS:
            return None
        return f"no server of {self._name} takes calls: all asked to be left alone (Retry-After)"

    @contextmanager
    def of_call(self) -> Iterator[Hold]:
        """The waits of one call, which are over in the end in any case."""
        hold = Hold()
        try:
            yield hold
        finally:
            self.over(hold)

    async def sit_out(self, hold: Hold, seconds: float) -> None:
        """Let the time pass that the servers asked for."""
        hold.seconds += seconds
        if not hold.noted and hold.seconds >= NOTED_SECONDS:
            hold.noted = True
            self._long += 1
        await asyncio.sleep(seconds)

    def over(self, hold: Hold) -> None:
        """The call waits no more: a server is asked, which may turn it away again."""
        self._long -= hold.noted
        hold.noted = False

    def answered(self) -> None:
        """A server of the service has answered a call, whichever it was."""
        self._answered_at = time.monotonic()


class Hold:
    """How long one call has waited in all, and whether it waits for long now."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.noted = False
