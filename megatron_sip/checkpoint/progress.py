"""Where a run stands, and how a checkpoint spells it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from megatron_sip.data.cursor import Ranges, merged
from megatron_sip.rollout.engine import Rollouts
from megatron_sip.rollout.pending import PendingBatch


@dataclass(frozen=True)
class Progress:
    """Where a run stands between two iterations.

    iteration         iterations done; skipped ones count, those that a rollback took back do not
    consumed_samples  samples that these iterations took from the stream
    stream            the data stream's own description of corpus and position
    jumped            samples that rollbacks left out for good; what comes next depends on both
                      (`data.cursor.sample_indices`)
    recent_losses     losses of the last accepted steps, by which the next one is judged, oldest first
    pending           the rollouts of the next iteration, if they were written before the last update
                      (`training.overlap`); in a checkpoint those of the global batch, on a rank at least its own

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
    pending: PendingBatch | None = None


def to_state(progress: Progress) -> dict[str, Any]:
    """The entries of a checkpoint's common state that all ranks know: plain values that tell where the run stands."""
    return {
        "iteration": progress.iteration,
        "consumed_samples": progress.consumed_samples,
        "stream": progress.stream,
        "jumped": [list(part) for part in progress.jumped],
        "recent_losses": list(progress.recent_losses),
    }


def pending_state(whole: PendingBatch) -> dict[str, Any]:
    """The entry with the rollouts that the global batch waits with: plain tensors.

    samples [n] int64, tokens [n, rollouts, length] int32, lengths [n, rollouts] int32.
    """
    tensors = {
        "samples": torch.tensor(whole.samples, dtype=torch.int64),
        "tokens": whole.rollouts.tokens.int(),
        "lengths": whole.rollouts.lengths.int(),
    }
    return {"pending": tensors}


def from_state(state: dict[str, Any]) -> Progress:
    """The inverse of `to_state` and `pending_state`; other entries of the common state are left alone.

    A checkpoint from before there were rollbacks has jumped over nothing and remembers no losses.

    Raises:
        KeyError: an entry is missing.
        TypeError, ValueError: the jumped samples are no ranges, or the pending rollouts are none.
    """
    pending = state.get("pending")
    return Progress(
        iteration=state["iteration"],
        consumed_samples=state["consumed_samples"],
        stream=state["stream"],
        jumped=merged((start, stop) for start, stop in state.get("jumped", [])),
        recent_losses=tuple(state.get("recent_losses", ())),
        pending=None if pending is None else _pending_from(pending),
    )


def _pending_from(state: dict[str, torch.Tensor]) -> PendingBatch:
    samples, tokens, lengths = (state[name].long() for name in ("samples", "tokens", "lengths"))
    sound = samples.dim() == 1 and tokens.dim() == 3 and lengths.shape == tokens.shape[:2] and bool((tokens >= 0).all())
    if not sound or not bool(((lengths >= 0) & (lengths <= tokens.shape[2])).all()):
        raise ValueError("the rollouts of the next batch are damaged")
    return PendingBatch(tuple(samples.tolist()), Rollouts(tokens, lengths))
