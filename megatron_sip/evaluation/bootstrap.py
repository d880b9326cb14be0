"""Paired bootstrap over prefixes: a mean, or a difference of two arms on the same prefixes, with an interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

DEFAULT_RESAMPLES = 10_000
_CHUNK_VALUES = 4_000_000

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean over `count` prefixes with its bootstrap interval.

    `low` and `high` are None where fewer than two prefixes were measured. The interval speaks of the
    draw of prefixes alone: not of another seed of the training, nor of another judge. Where all values
    are equal it has no width, which is no certainty.
    """

    mean: float
    low: float | None
    high: float | None
    count: int


def bootstrap_mean(
    values: Sequence[float] | FloatArray, *, seed: int, resamples: int = DEFAULT_RESAMPLES, level: float = 0.95
) -> Estimate | None:
    """Mean of `values` `[prefixes]` with the percentile interval; None for no values.

    Missing values must be taken out before. ValueError for a value that is not finite.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1:
        raise ValueError(f"expected one value per prefix, got an array of shape {data.shape}")
    if not np.isfinite(data).all():
        raise ValueError("a value is not finite; take missing values out before")
    if not 0 < level < 1 or resamples < 1:
        raise ValueError("the level must lie between 0 and 1 and there must be at least one resample")
    if data.size == 0:
        return None
    mean = float(data.mean())
    if data.size == 1:
        return Estimate(mean, None, None, 1)
    low, high = np.quantile(_resampled_means(data, seed, resamples), [(1 - level) / 2, (1 + level) / 2])
    return Estimate(mean, float(low), float(high), int(data.size))


def bootstrap_difference(
    first: Sequence[float] | FloatArray,
    second: Sequence[float] | FloatArray,
    *,
    seed: int,
    resamples: int = DEFAULT_RESAMPLES,
    level: float = 0.95,
) -> Estimate | None:
    """Mean of `first - second`, both `[prefixes]` in the same order, prefixes resampled as pairs."""
    one, other = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if one.shape != other.shape:
        raise ValueError(f"paired values must match: {one.shape} against {other.shape}")
    return bootstrap_mean(one - other, seed=seed, resamples=resamples, level=level)


def _resampled_means(data: FloatArray, seed: int, resamples: int) -> FloatArray:
    """`[resamples]` means of draws with replacement, made in pieces of bounded memory."""
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    piece = max(1, _CHUNK_VALUES // data.size)
    for start in range(0, resamples, piece):
        stop = min(start + piece, resamples)
        drawn = generator.integers(0, data.size, size=(stop - start, data.size))
        means[start:stop] = data[drawn].mean(axis=1)
    return means
