"""One line in the log for what keeps the whole world waiting, whichever of many ranks knows it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch.distributed as dist

if TYPE_CHECKING:
    from megatron_sip.parallel.world import World

EVERY_SECONDS = 60.0


class PauseNotes:
    """Lines of the main rank at the beginning of a pause, each minute, and at its end."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._text = ""
        self._began: float | None = None
        self._minutes = 0

    def heard(self, paused: bool, own: str | None) -> None:
        """How things stand; every rank calls it with the same `paused`. `own` is what this rank knows of the cause."""
        if paused and self._began is None:
            self._begin(own)
        elif paused and self._began is not None:
            minutes = int((time.monotonic() - self._began) / EVERY_SECONDS)
            if minutes > self._minutes:
                self._minutes = minutes
                self._say(f"still paused after {time.monotonic() - self._began:.0f} s: {self._text}")
        elif self._began is not None:
            self._say(f"going on after a pause of {time.monotonic() - self._began:.0f} s")
            self._began = None

    def _begin(self, own: str | None) -> None:
        known: list[str | None] = [None] * self._world.size
        dist.all_gather_object(known, own, group=self._world.control_group)
        self._text = next((text for text in known if text is not None), "")
        self._began, self._minutes = time.monotonic(), 0
        self._say(f"paused: {self._text}; the run goes on by itself when one does")

    def _say(self, text: str) -> None:
        if self._world.is_main:
            print(f"> {text}", flush=True)
