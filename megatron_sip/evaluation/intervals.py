"""Intervals for shares, ratios and rankings; that of a mean stands in `bootstrap`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from megatron_sip.evaluation.bootstrap import Estimate

RESAMPLES = 2_000
"""Draws of a ratio or a ranking: the ends of a 95 % interval move by a hundredth of its width or so."""


def wilson(successes: float, count: int, level: float = 0.95) -> Estimate | None:
    """A share with the Wilson score interval; None for no trial. `successes` may hold halves (ties).

    With p = successes / count and z the normal quantile, the interval is
    (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n).
    """
    if count < 0 or not 0 <= successes <= max(count, 0) or not 0 < level < 1:
        raise ValueError(f"{successes} of {count} at level {level} is no share")
    if count == 0:
        return None
    share, z = successes / count, NormalDist().inv_cdf((1 + level) / 2)
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return Estimate(share, max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale), count)


def area_under_curve(
    positive: Sequence[float], negative: Sequence[float], *, seed: int, resamples: int = RESAMPLES, level: float = 0.95
) -> Estimate | None:
    """Probability that a positive scores above a negative, ties counted half (the area under the ROC curve).

    The interval is the bootstrap's, each class drawn on its own. None where a class is empty. ValueError for a score
    that is not finite.
    """
    above, below = np.asarray(positive, dtype=np.float64), np.asarray(negative, dtype=np.float64)
    if not (np.isfinite(above).all() and np.isfinite(below).all()):
        raise ValueError("a score is not finite; take missing values out before")
    if above.size == 0 or below.size == 0:
        return None
    wins = (above[:, None] > below[None, :]) + 0.5 * (above[:, None] == below[None, :])
    mean, count = float(wins.mean()), above.size + below.size
    if above.size == 1 or below.size == 1:
        return Estimate(mean, None, None, count)
    generator = np.random.default_rng(seed)
    rows = generator.multinomial(above.size, np.full(above.size, 1 / above.size), size=resamples)
    columns = generator.multinomial(below.size, np.full(below.size, 1 / below.size), size=resamples)
    drawn = np.einsum("bi,bi->b", rows @ wins, columns) / (above.size * below.size)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(mean, float(low), float(high), count)


def bootstrap_ratio(
    numerators: Sequence[float],
    denominators: Sequence[float],
    *,
    seed: int,
    resamples: int = RESAMPLES,
    level: float = 0.95,
) -> Estimate | None:
    """sum(numerators) / sum(denominators), both `[groups]`, with groups resampled; None where the latter sum is 0.

    Denominators must not be negative. A draw of groups whose denominators are all 0 has no ratio and is left out.
    """
    tops, bottoms = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    if tops.shape != bottoms.shape or tops.ndim != 1:
        raise ValueError(f"one numerator and one denominator per group: {tops.shape} against {bottoms.shape}")
    if (bottoms < 0).any():
        raise ValueError("a denominator is negative")
    if bottoms.sum() == 0:
        return None
    mean = float(tops.sum() / bottoms.sum())
    if tops.size == 1:
        return Estimate(mean, None, None, 1)
    drawn = np.random.default_rng(seed).integers(0, tops.size, size=(resamples, tops.size))
    weights = bottoms[drawn].sum(axis=1)
    ratios = tops[drawn].sum(axis=1)[weights > 0] / weights[weights > 0]
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(mean, float(low), float(high), int(tops.size))
