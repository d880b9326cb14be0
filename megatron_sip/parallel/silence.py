"""How long a rank of another machine has told nothing: its process cannot be looked at from here, its counter can."""

from __future__ import annotations

SILENCE_SECONDS = 20.0
"""A rank that told nothing for so long is gone: with the end of the others well within 30 s, and far longer than a busy
machine keeps a thread from its work."""
_LONGEST_STEP = 1.0


class Silence:
    """Adds up the time in which a counter stood still while this rank could have seen it move.

    A look that comes late counts for `_LONGEST_STEP` seconds at most: whatever kept this rank from looking (a store
    that did not answer, a process that was stopped) may have kept the other one from telling.
    """

    def __init__(self) -> None:
        self._beat: int | None = None
        self._looked_at: float | None = None
        self.seconds = 0.0

    def look(self, beat: int | None, now: float) -> float:
        """The seconds of silence after a look that found this count at `now`; None: nothing was ever told."""
        step = 0.0 if self._looked_at is None else min(now - self._looked_at, _LONGEST_STEP)
        self._looked_at = now
        self.seconds = self.seconds + step if beat == self._beat else 0.0
        self._beat = beat
        return self.seconds
