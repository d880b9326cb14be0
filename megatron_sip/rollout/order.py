"""The order in which the prefixes of a call are written, and the way back to that of the batch.

Waves and groups are runs of prefixes, each group padded to its own longest one. Sorted by length, the prefixes of a
call have at most `(size - 1) * (longest - shortest)` positions of padding in all, `size` being the prefixes of its
largest group (and what rounding for sequence parallel adds). The order hangs on the lengths alone, so that a resumed
run repeats it. Pure functions of lengths, as `preference/micro_batches.py` for training.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_sip.metrics.aggregate import SumCount, added
from megatron_sip.rollout.engine import OnWave, Rollouts, Sampling
from megatron_sip.rollout.waves import runs_of
from megatron_sip.types import TokenArray


def longest_first(prefixes: Sequence[TokenArray]) -> list[int]:
    """The places of the prefixes, the longest first and those of one length in their order.

    Longest first, because the memory that the longest need is taken before the others have parted it.
    """
    return sorted(range(len(prefixes)), key=lambda place: -len(prefixes[place]))


class InBatchOrder:
    """The rollouts of a batch, taken wave by wave in any order; `on_wave` hears of each run of neighbours in a wave."""

    def __init__(self, prefixes: int, sampling: Sampling, on_wave: OnWave) -> None:
        shape = (prefixes, sampling.num_rollouts)
        self._tokens = torch.zeros(*shape, sampling.max_new_tokens, dtype=torch.int64)
        self._lengths = torch.zeros(shape, dtype=torch.int64)
        self._metrics: dict[str, SumCount] = {}
        self._on_wave = on_wave

    def take(self, places: Sequence[int], wave: Rollouts) -> None:
        """The rollouts of the prefixes at these places of the batch, in the order of `places`."""
        self._tokens[places], self._lengths[places] = wave.tokens, wave.lengths
        self._metrics = added([self._metrics, wave.metrics])
        for first, end in runs_of(set(places)):
            self._on_wave(first, Rollouts(self._tokens[first:end], self._lengths[first:end]))

    def whole(self) -> Rollouts:
        """Those of all prefixes, once all were taken."""
        return Rollouts(self._tokens, self._lengths, self._metrics)
