from __future__ import annotations

import numpy as np
import pytest

from megatron_sip.evaluation.intervals import area_under_curve, bootstrap_ratio, wilson


def test_wilson_by_hand() -> None:
    found = wilson(8, 10)
    assert (found.mean, found.count) == (0.8, 10)
    # z = 1.959964: centre 0.8 + z^2/20, spread z sqrt(0.016 + z^2/400), over 1 + z^2/10
    assert found.low == pytest.approx(0.490162, abs=1e-6)
    assert found.high == pytest.approx(0.943318, abs=1e-6)


def test_wilson_at_the_ends_keeps_a_width_and_stays_a_share() -> None:
    never, always = wilson(0, 20), wilson(20, 20)
    assert (never.low, always.high) == (pytest.approx(0.0, abs=1e-12), pytest.approx(1.0, abs=1e-12))
    assert never.low >= 0.0
    assert always.high <= 1.0
    assert never.high == pytest.approx(1 - always.low)
    assert 0.1 < never.high < 0.2
    assert wilson(0, 0) is None
    with pytest.raises(ValueError, match="no share"):
        wilson(3, 2)


def test_wilson_covers_the_true_share_about_as_often_as_it_says() -> None:
    draws = np.random.default_rng(1).binomial(60, 0.3, size=2000)
    inside = [wilson(int(k), 60).low <= 0.3 <= wilson(int(k), 60).high for k in draws]
    assert 0.93 < np.mean(inside) < 0.97


def test_area_under_curve_by_hand() -> None:
    # Nine comparisons: 0.9 wins 3, 0.5 wins 1 and ties 1, 0.2 ties 1 with 0.2.
    found = area_under_curve([0.9, 0.5, 0.2], [0.6, 0.5, 0.2], seed=0)
    assert found.mean == pytest.approx((3 + 1.5 + 0.5) / 9)
    assert found.low <= found.mean <= found.high
    assert found.count == 6
    assert area_under_curve([1.0, 1.0], [0.0, 0.0], seed=0).low == 1.0
    assert area_under_curve([], [0.1], seed=0) is None
    assert area_under_curve([0.4], [0.1, 0.2], seed=0).low is None
    with pytest.raises(ValueError, match="finite"):
        area_under_curve([float("nan")], [0.1], seed=0)


def test_the_interval_of_an_area_is_as_wide_as_its_standard_error() -> None:
    generator = np.random.default_rng(3)
    positive, negative = generator.normal(1, 1, 150), generator.normal(0, 1, 150)
    found = area_under_curve(positive, negative, seed=0)
    wins = positive[:, None] > negative[None, :]
    # DeLong's variance from the placements of each class.
    error = np.sqrt(wins.mean(axis=1).var(ddof=1) / 150 + wins.mean(axis=0).var(ddof=1) / 150)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_a_ratio_is_that_of_the_sums_and_knows_when_there_is_none() -> None:
    found = bootstrap_ratio([10.0, 30.0], [1.0, 4.0], seed=0)
    assert found.mean == 8.0
    assert (found.low, found.high) == (7.5, 10.0)
    assert bootstrap_ratio([3.0, 3.0], [0.0, 0.0], seed=0) is None
    assert bootstrap_ratio([3.0, 5.0], [0.0, 1.0], seed=0).mean == 8.0
    assert bootstrap_ratio([6.0], [2.0], seed=0).low is None
    with pytest.raises(ValueError, match="negative"):
        bootstrap_ratio([1.0, 1.0], [1.0, -1.0], seed=0)
