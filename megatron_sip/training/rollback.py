"""Bad steps in a row, and the way back to the last checkpoint and past the samples at fault.

A bad step (non-finite, or a loss spike) makes no update: weights, optimizer, schedule and reference stay as they are.
So the state behind it is that of the step before, and a checkpoint that is wanted amid bad steps is written as of
the last step before the first of them. Every checkpoint of a run is therefore from before its trouble, a resume
repeats the bad steps, and nothing about them has to be saved.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_sip.checkpoint.progress import Progress
from megatron_sip.config.groups import TrainingConfig
from megatron_sip.data.cursor import Ranges, merged, next_sample
from megatron_sip.errors import SipError

BAD = {"non_finite": "a non-finite loss or gradient", "spike": "a loss spike"}
"""Why a step counts as bad, in words; by `StepResult.skipped`."""


@dataclass(frozen=True)
class BadStep:
    """An iteration (counted from 1) that made no update, and the samples that it took."""

    iteration: int
    reason: str
    samples: Ranges


@dataclass(frozen=True)
class Rollback:
    """What a rollback did: from the end of which iteration to that of which, why, and which samples are left out.

    `next_sample` is the first that is taken then.
    """

    from_iteration: int
    to_iteration: int
    reason: str
    jumped: Ranges
    next_sample: int


class Recovery:
    """Watches the steps of a run and takes it back. Every rank makes the same calls with the same values."""

    def __init__(self, training: TrainingConfig) -> None:
        self._limit, self._most = training.max_skipped_iterations, training.max_rollbacks
        self._bad: list[BadStep] = []
        self._checkpoint: tuple[Path, int] | None = None
        self._rollbacks = 0

    @property
    def calm(self) -> bool:
        """Whether no bad step stands behind the last accepted one: what is now may be saved as it is."""
        return not self._bad

    def checkpoint_at(self, root: Path, iteration: int) -> None:
        """`root` holds a checkpoint of this run from the end of `iteration`, its newest."""
        if self._checkpoint is None or self._checkpoint[1] != iteration:
            self._rollbacks = 0  # the run got beyond the one before
        self._checkpoint = (root, iteration)

    def observe(self, iteration: int, skipped: str, samples: Ranges) -> None:
        """Account for a finished iteration; `skipped` is that of its `StepResult`.

        A step that had nothing to train tells nothing: it neither adds to the bad ones nor ends their row.
        """
        if skipped in BAD:
            self._bad.append(BadStep(iteration, skipped, samples))
        elif not skipped:
            self._bad.clear()

    @property
    def stuck(self) -> bool:
        """Whether it is time to go back."""
        return len(self._bad) >= self._limit

    def _require_way_back(self) -> tuple[Path, int]:
        """The checkpoint to go back to."""
        trouble = f"{self._limit} iterations in a row had {self._reason()}"
        if self._checkpoint is None or self._most == 0:
            missing = "--max-rollbacks is 0" if self._checkpoint else "this run has no checkpoint yet to go back to"
            raise SipError(
                f"{trouble}, and {missing}; lower --lr, raise --adam-eps, save more often (--save-interval) or resume "
                "from an earlier checkpoint (the limit is --max-skipped-iterations)"
            )
        if self._rollbacks >= self._most:
            raise SipError(
                f"{trouble} again after {self._rollbacks} rollbacks to the checkpoint of iteration "
                f"{self._checkpoint[1]}; lower --lr, raise --adam-eps or --loss-spike-threshold, look at the samples "
                "in --audit-log, or resume from an earlier checkpoint (the limit is --max-rollbacks)"
            )
        return self._checkpoint

    def roll_back(self, now: Progress, load: Callable[[Path, int], Progress]) -> tuple[Progress, Rollback]:
        """Load the last checkpoint by `load(root, iteration)`; where the run then stands, and what was done.

        `load` may fall back to one before it.

        The first time at a checkpoint the samples of the bad steps are left out and those before them are trained
        again: weights that went wrong in memory are mended so. If the same comes back, repeating does not help, and
        all samples between the checkpoint and the last bad one are left out, as the authors of PaLM did
        (arXiv 2204.02311, section 5.1).

        Raises:
            SipError: there is no checkpoint to go back to, or going back there has not helped.
        """
        root, iteration = self._require_way_back()
        loaded = load(root, iteration)
        self._checkpoint = (root, loaded.iteration)
        faults = [part for step in self._bad for part in step.samples]
        if self._rollbacks:
            faults.append((next_sample(loaded.consumed_samples, loaded.jumped), max(stop for _, stop in faults)))
        fresh = merged(faults)
        jumped = merged([*loaded.jumped, *now.jumped, *fresh])
        first = next_sample(loaded.consumed_samples, jumped)
        done = Rollback(now.iteration, loaded.iteration, self._reason(), fresh, first)
        self._rollbacks += 1
        self._bad.clear()
        return replace(loaded, jumped=jumped), done

    def _reason(self) -> str:
        counts = Counter(step.reason for step in self._bad)
        return " or ".join(text for reason, text in BAD.items() if counts[reason])
