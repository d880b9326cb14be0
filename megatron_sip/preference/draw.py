"""Random numbers as a function of (seed, purpose, place): the same on every rank, at every layout, after a resume."""

from __future__ import annotations

from enum import IntEnum

import numpy as np

_WORD = (1 << 64) - 1


class Purpose(IntEnum):
    """What a draw is for: each purpose has a stream of its own."""

    OPTION_ORDER = 0x5_0001
    PIVOT = 0x5_0002
    BEST_TIE = 0x5_0003
    WORST_TIE = 0x5_0004
    ADAPTIVE_DRAWS = 0x5_0005
    ADAPTIVE_TIES = 0x5_0006
    SIMULATED_JUDGE = 0x5_0007


def generator(seed: int, purpose: Purpose, *place: int) -> np.random.Generator:
    """Random numbers keyed by seed, purpose and up to three numbers that name the place.

    Raises:
        ValueError: more than three numbers.
    """
    if len(place) > 3:
        raise ValueError(f"a draw is keyed by at most three numbers, not {len(place)}")
    # Counter word 0 is the one Philox counts up itself, so the place goes into the other three.
    counter = [0, *place, *([0] * (3 - len(place)))]
    return np.random.Generator(
        np.random.Philox(key=[seed & _WORD, int(purpose)], counter=[word & _WORD for word in counter])
    )


def draw_index(size: int, seed: int, purpose: Purpose, *place: int) -> int:
    """A uniform index in `range(size)`, keyed by seed, purpose and up to three numbers that name the place.

    Raises:
        ValueError: nothing to draw from, or more than three numbers.
    """
    if size < 1:
        raise ValueError("cannot draw from nothing")
    return int(generator(seed, purpose, *place).integers(size))
