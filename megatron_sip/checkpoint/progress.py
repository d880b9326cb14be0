"""Where a run stands, and how a checkpoint spells it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_sip.data.cursor import Ranges, merged


@dataclass(frozen=True)
class Progress:
    """Where a run stands between two iterations.

    iteration         iterations done; skipped ones count, those that a rollback took back do not
    consumed_samples  samples that these iterations took from the stream
    stream            the data stream's own description of corpus and position
    jumped            samples that rollbacks left out for good; what comes next depends on both
                      (`data.cursor.sample_indices`)
    recent_losses     losses of the last accepted steps, by which the next one is judged, oldest first

    What else could differ between a run and its resumption is a function of the iteration (curriculum, intervals
    of judges and rewrites) or of the sample index (cuts, orders, rollouts, ties). The counts of bad steps in a row
    are not kept: a checkpoint is from before the first of them (`training.rollback`). Nor is the count of
    iterations without a verdict, which decides when a run gives up and nothing that is trained.
    """

    iteration: int
    consumed_samples: int
    stream: dict[str, Any]
    jumped: Ranges = ()
    recent_losses: tuple[float, ...] = ()


def to_state(progress: Progress) -> dict[str, Any]:
    """The entries of a checkpoint's common state that tell where the run stands: plain values only."""
    return {
        "iteration": progress.iteration,
        "consumed_samples": progress.consumed_samples,
        "stream": progress.stream,
        "jumped": [list(part) for part in progress.jumped],
        "recent_losses": list(progress.recent_losses),
    }


def from_state(state: dict[str, Any]) -> Progress:
    """The inverse of `to_state`; other entries of the common state are left alone.

    A checkpoint from before there were rollbacks has jumped over nothing and remembers no losses.

    Raises:
        KeyError: an entry is missing.
        ValueError: the jumped samples are no ranges.
    """
    return Progress(
        iteration=state["iteration"],
        consumed_samples=state["consumed_samples"],
        stream=state["stream"],
        jumped=merged((start, stop) for start, stop in state.get("jumped", [])),
        recent_losses=tuple(state.get("recent_losses", ())),
    )
