"""Which samples come next when some were jumped over: pure arithmetic on ranges of global sample indices.

A run that never rolled back jumps over nothing; then the sample behind `consumed` samples has the index `consumed`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeAlias

Ranges: TypeAlias = tuple[tuple[int, int], ...]
"""Half-open ranges `[start, stop)`, ascending, apart from each other and none empty."""


def merged(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """The union of `ranges`, which may overlap, touch and stand in any order.

    Raises:
        ValueError: a range ends before it begins or begins below 0.
    """
    result: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if not 0 <= start <= stop:
            raise ValueError(f"[{start}, {stop}) is no range of sample indices")
        if start == stop:
            continue
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(stop, result[-1][1]))
        else:
            result.append((start, stop))
    return tuple(result)


def ranges_of(indices: Iterable[int]) -> Ranges:
    """The ranges that hold exactly `indices`."""
    return merged((index, index + 1) for index in indices)


def count(ranges: Ranges) -> int:
    """How many samples the ranges hold."""
    return sum(stop - start for start, stop in ranges)


def indices_in(ranges: Ranges) -> list[int]:
    """The samples of the ranges, one by one."""
    return [index for start, stop in ranges for index in range(start, stop)]


def sample_indices(consumed: int, number: int, jumped: Ranges) -> list[int]:
    """The next `number` samples behind `consumed` that were taken and `jumped` that never will be, ascending.

    A batch steps over a range in its midst, so that no sample is lost whatever the batch size was when the range
    was made. `jumped` is as `merged` returns it.
    """
    if consumed < 0 or number < 0:
        raise ValueError(f"{consumed} consumed and {number} wanted samples must be at least 0")
    result: list[int] = []
    for gap in _gaps(jumped):
        result.extend(gap[consumed : consumed + number - len(result)])
        consumed = max(0, consumed - len(gap))
    return result


def _gaps(jumped: Ranges) -> Iterator[range]:
    """What lies between the ranges, the endless rest included."""
    at = 0
    for start, stop in jumped:
        yield range(at, start)
        at = stop
    yield range(at, sys.maxsize)


def next_sample(consumed: int, jumped: Ranges) -> int:
    """The index of the sample behind `consumed` samples."""
    return sample_indices(consumed, 1, jumped)[0]
