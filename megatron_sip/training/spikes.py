"""When a loss is a spike: judged against the steps before it, in units of their own scatter."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sip.config.groups import TrainingConfig

_TO_DEVIATION = 1.4826
"""A normal distribution's standard deviation over its median absolute deviation."""
_SMALLEST_DEVIATION = 0.05
"""Of the median: where losses hardly differ (a DPO run begins at log 2 exactly), small changes are no spikes."""


@dataclass(frozen=True)
class SpikeRule:
    """A loss is a spike if it lies more than `threshold` robust standard deviations above the median.

    Median and deviation are those of the last `window` accepted steps. A plain multiple of the mean would not serve
    both objectives: a DPO loss falls from 0.69 towards 0, where one wrong pair doubles it, while an NLL near 3
    scatters by a hundredth of itself and explodes long before it doubles. Median and median absolute deviation,
    because one spike that got in must not widen the band for the next.

    `threshold` None: nothing is a spike. Nor is anything before half a window of steps was accepted.
    """

    threshold: float | None
    window: int

    @classmethod
    def from_config(cls, training: TrainingConfig) -> SpikeRule:
        """The rule of `--loss-spike-threshold` and `--loss-spike-window`."""
        return cls(training.loss_spike_threshold, training.loss_spike_window)

    def limit(self, recent: Sequence[float]) -> float:
        """The highest loss that is no spike behind the accepted losses `recent`; infinite where nothing is judged."""
        known = recent[-self.window :]
        if self.threshold is None or len(known) < max(1, self.window // 2):
            return math.inf
        median = statistics.median(known)
        scatter = statistics.median(abs(loss - median) for loss in known)
        deviation = max(_TO_DEVIATION * scatter, _SMALLEST_DEVIATION * abs(median))
        return median + self.threshold * deviation

    def is_spike(self, recent: Sequence[float], loss: float) -> bool:
        """Whether a finite loss behind `recent` is a spike."""
        return loss > self.limit(recent)

    def remember(self, recent: Sequence[float], loss: float) -> tuple[float, ...]:
        """`recent` with the loss of one more accepted step, as far as the rule looks back."""
        return (*recent, loss)[-self.window :]
