"""How much of the margin the adaptive plan finds on simulated judges: the targets, on 500 pools each.

The seed is one on which no constant was tuned. `python tools/bench/scoring.py` measures more pools and more judges.
"""

from __future__ import annotations

import pytest

from megatron_sip.evaluation.scoring_bench import TARGETS, Scenario, measure

SEED = 50_021
POOLS = 500


@pytest.mark.parametrize("scenario", TARGETS, ids=lambda scenario: scenario.name)
def test_the_target_is_reached(scenario: Scenario) -> None:
    (row,) = measure(scenario, POOLS, SEED, only_adaptive=True)
    assert scenario.target is not None
    assert scenario.settings.budget is not None
    assert row.calls <= scenario.settings.budget
    assert row.rounds <= scenario.settings.rounds
    assert row.share >= scenario.target, f"{100 * row.share:.1f} +- {100 * row.error:.1f} %"
