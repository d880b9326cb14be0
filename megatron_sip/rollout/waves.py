"""From the rows of requests to rollouts of prefixes: the whole batch, or what of it is there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from megatron_sip.rollout.engine import OnWave, Rollouts, Sampling
from megatron_sip.rollout.requests import Ask
from megatron_sip.rollout.writing import Rows


class Waves:
    """Names prefixes to `on_wave` as soon as the rows of all their requests have come."""

    def __init__(self, asks: Sequence[Ask], sampling: Sampling, on_wave: OnWave) -> None:
        self._asks, self._sampling, self._on_wave = asks, sampling, on_wave
        self._open = Counter(ask.place for ask in asks)
        self._rows: dict[int, Rows] = {}

    def hear(self, rows: Mapping[int, Rows]) -> None:
        """Take the rows of requests, by their place in the batch of requests."""
        self._rows |= rows
        self._open.subtract(self._asks[number].place for number in rows)
        whole = {self._asks[number].place for number in rows if not self._open[self._asks[number].place]}
        for first, end in runs_of(whole):
            mine = [number for number in self._rows if first <= self._asks[number].place < end]
            found = [self._rows.pop(number) for number in mine]
            packed = packed_rows([self._asks[number] for number in mine], found, first, end - first, self._sampling)
            self._on_wave(first, unpacked(packed))


def runs_of(places: set[int]) -> list[tuple[int, int]]:
    """The runs of neighbours among `places`, as (first, end)."""
    starts = sorted(place for place in places if place - 1 not in places)
    ends = sorted(place + 1 for place in places if place + 1 not in places)
    return list(zip(starts, ends, strict=True))


def packed_rows(
    asks: Sequence[Ask], rows: Sequence[Rows], first: int, prefixes: int, sampling: Sampling
) -> torch.Tensor:
    """`[prefixes, num_rollouts, max_new_tokens + 1]` int64 of the prefixes from `first` on: a row's tokens and, last,
    its length; 0 where there is no row."""
    count = sampling.max_new_tokens
    packed = torch.zeros(prefixes, sampling.num_rollouts, count + 1, dtype=torch.int64)
    for ask, own in zip(asks, rows, strict=True):
        for offset, row in enumerate(own):
            # A greedy row stands for all.
            place = slice(ask.first + offset, ask.first + offset + 1) if sampling.temperature > 0 else slice(None)
            packed[ask.place - first, place, : len(row)] = torch.tensor(row)
            packed[ask.place - first, place, count] = len(row)
    return packed


def unpacked(packed: torch.Tensor) -> Rollouts:
    """The rollouts of `packed_rows`."""
    return Rollouts(packed[..., :-1].contiguous(), packed[..., -1].contiguous())
