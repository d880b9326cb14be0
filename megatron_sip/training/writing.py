"""What the rollouts of a step took, gathered until the step is reported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from megatron_sip.cost.done import DoneWork
from megatron_sip.metrics.aggregate import SumCount, added
from megatron_sip.rollout.engine import Rollouts


@dataclass(frozen=True)
class Writing:
    """Seconds of the rollouts that a step wrote, what their engine measured, as (sum, count) by name, and their work.

    They belong to the step that wrote, which with `--judge-lag 1` trains on the batch before. So they are parts of
    that step's time; and a resumed run reports what an unbroken one does, though it takes a batch from the checkpoint
    of which it can measure nothing: the step that wrote it has reported.
    """

    seconds: float = 0.0
    metrics: Mapping[str, SumCount] = field(default_factory=dict)
    work: DoneWork = DoneWork()  # noqa: RUF009  # it is frozen

    def and_then(self, seconds: float, rollouts: Rollouts | None) -> Writing:
        """With what was written after it, in so many seconds; None: nothing was."""
        together = self.seconds + seconds
        if rollouts is None:
            return replace(self, seconds=together)
        return Writing(together, added([self.metrics, rollouts.metrics]), self.work + rollouts.work)
