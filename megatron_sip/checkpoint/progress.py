"""Where a run stands, and how a checkpoint spells it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Progress:
    """Where a run stands. `stream` is the data stream's own description of corpus and position."""

    iteration: int
    consumed_samples: int
    stream: dict[str, Any]


def to_state(progress: Progress) -> dict[str, Any]:
    """The entries of a checkpoint's common state that tell where the run stands: plain values only."""
    return {
        "iteration": progress.iteration,
        "consumed_samples": progress.consumed_samples,
        "stream": progress.stream,
    }


def from_state(state: dict[str, Any]) -> Progress:
    """The inverse of `to_state`; other entries of the common state are left alone.

    Raises:
        KeyError: an entry is missing.
    """
    return Progress(state["iteration"], state["consumed_samples"], state["stream"])
