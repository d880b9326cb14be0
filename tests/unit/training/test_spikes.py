"""When a loss is a spike, for losses that fall to 0 and for losses that hardly move."""

from __future__ import annotations

import math
import random

import pytest

from megatron_sip.config.groups import TrainingConfig
from megatron_sip.training.spikes import SpikeRule


def spikes(rule: SpikeRule, losses: list[float]) -> list[int]:
    """Places of `losses` that the rule refuses when only accepted ones are remembered."""
    recent: tuple[float, ...] = ()
    found = []
    for place, loss in enumerate(losses):
        if rule.is_spike(recent, loss):
            found.append(place)
        else:
            recent = rule.remember(recent, loss)
    return found


def test_the_default_refuses_nothing() -> None:
    rule = SpikeRule.from_config(TrainingConfig())
    assert rule.limit([1.0] * 100) == math.inf
    assert not rule.is_spike([1.0] * 100, 1e30)


def test_limit_by_hand() -> None:
    # Median 3, deviations 2 1 0 1 2 with median 1.
    assert SpikeRule(10.0, 5).limit([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(3 + 10 * 1.4826)
    # Constant losses scatter by a twentieth of their size.
    assert SpikeRule(10.0, 5).limit([2.0] * 5) == pytest.approx(2 + 10 * 0.1)
    # Only the window counts.
    assert SpikeRule(10.0, 5).limit([90.0] * 5 + [2.0] * 5) == pytest.approx(3.0)


def test_nothing_is_judged_before_half_a_window() -> None:
    rule = SpikeRule(3.0, 8)
    assert spikes(rule, [1.0, 1.0, 1.0, 50.0, 1.0]) == []
    assert spikes(rule, [1.0, 1.0, 1.0, 1.0, 50.0]) == [4]


def test_the_window_is_remembered_and_no_more() -> None:
    rule = SpikeRule(3.0, 3)
    recent: tuple[float, ...] = ()
    for loss in (1.0, 2.0, 3.0, 4.0):
        recent = rule.remember(recent, loss)
    assert recent == (2.0, 3.0, 4.0)


def dpo_run(pairs: int, seed: int) -> list[float]:
    """Batch means of -log sigmoid(margin) while the mean margin grows from 0 to 4: from 0.69 towards 0."""
    draw = random.Random(seed)
    losses = []
    for step in range(600):
        growth = step / 600
        margins = [draw.gauss(4 * growth, 3 * growth) for _ in range(pairs)]
        losses.append(sum(math.log1p(math.exp(-margin)) for margin in margins) / pairs)
    return losses


def nll_run(seed: int) -> list[float]:
    """An NLL that falls from 4 to 3 and scatters by a hundredth of itself."""
    draw = random.Random(seed)
    return [3 + math.exp(-step / 200) + draw.gauss(0, 0.03) for step in range(600)]


@pytest.mark.parametrize("pairs", [8, 64, 256])
def test_an_ordinary_dpo_run_has_no_spike(pairs: int) -> None:
    for seed in range(5):
        assert spikes(SpikeRule(10.0, 64), dpo_run(pairs, seed)) == []


def test_an_ordinary_nll_run_has_no_spike() -> None:
    for seed in range(5):
        assert spikes(SpikeRule(5.0, 64), nll_run(seed)) == []


@pytest.mark.parametrize("at", [100, 300, 590])
def test_an_exploding_step_is_found_and_only_that(at: int) -> None:
    dpo, nll = dpo_run(64, 1), nll_run(1)
    dpo[at] += 3.0  # a few margins of -50
    nll[at] *= 1.4
    assert spikes(SpikeRule(10.0, 64), dpo) == [at]
    assert spikes(SpikeRule(5.0, 64), nll) == [at]


def test_a_plain_multiple_of_the_median_would_not_serve_both() -> None:
    """Why the scatter decides: late in a DPO run an ordinary step is over 3 medians, an NLL explosion is below 1.5."""
    late = dpo_run(8, 1)[450:]
    assert max(late) > 3 * sorted(late)[len(late) // 2]
    assert 1.4 * nll_run(1)[300] < 1.5 * 3.3
