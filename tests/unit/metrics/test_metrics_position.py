"""Position bias and order consistency, from verdicts."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_sip.metrics.names import metric_specs
from megatron_sip.metrics.position import BIAS, CONSISTENCY, fitted_bias, position_metrics
from megatron_sip.preference.scoring import JudgeSpec, all_pairs
from megatron_sip.types import Answers, Missing, MissingReason, Question

LOST = Missing(MissingReason.TIMEOUT)


def test_bias_is_the_belief_in_the_first_option_less_a_half() -> None:
    answers: Answers = {
        Question("q", 0, 1): 0.75,
        Question("q", 1, 2): 1.0,
        Question("q", 0, 2): LOST,
        Question("safety", 0): 1.0,
        Question("other", 2, 0): 0.25,
    }
    found = position_metrics([answers, {Question("q", 0, 1): 0.0}])
    assert found[BIAS] == (pytest.approx(0.25 + 0.5 - 0.5 - 0.25), 4)
    assert found[f"{BIAS}/q"] == (pytest.approx(0.25), 3)
    assert found[f"{BIAS}/other"] == (-0.25, 1)
    assert found[CONSISTENCY] == (0.0, 0.0), "no pair has both orders"
    assert f"{BIAS}/safety" not in found


def test_consistent_is_the_same_winner_in_both_orders() -> None:
    answers: Answers = {
        **{Question("q", 0, 1): 0.9, Question("q", 1, 0): 0.4},  # 0 wins twice
        **{Question("q", 0, 2): 0.9, Question("q", 2, 0): 0.6},  # whoever stands first
        **{Question("q", 1, 2): 0.5, Question("q", 2, 1): 0.5},  # a tie twice
        **{Question("q", 0, 3): 0.5, Question("q", 3, 0): 0.1},  # a tie, then 0
        **{Question("q", 1, 3): 0.9, Question("q", 3, 1): LOST},  # one order only
        # Votes: 2/3 for 2, then 1/3 for 3: 2 wins twice.
        **{Question("q", 2, 3, vote): value for vote, value in enumerate((1.0, 1.0, 0.0))},
        **{Question("q", 3, 2, vote): value for vote, value in enumerate((1.0, 0.0, 0.0))},
    }
    assert position_metrics([answers])[CONSISTENCY] == (3.0, 5.0)


def test_drawn_orders_show_the_bias_and_nothing_else() -> None:
    """A judge whose verdict is utility alone has a bias near 0; one that adds 0.2 to the first option shows 0.2."""
    judge = JudgeSpec("q", pairwise=True, weight=1.0)
    utility = [0.3 * index / 5 for index in range(6)]
    for shift in (0.0, 0.2):
        pools: list[Answers] = []
        for sample in range(400):
            questions = all_pairs(6, judge, seed=3, sample_index=sample)
            pools.append({q: 0.5 + utility[q.first] - utility[q.second or 0] + shift for q in questions})
        total, count = position_metrics(pools)[BIAS]
        assert count == 400 * 15
        # The verdicts scatter by 0.14, so the mean of 6000 by 0.002.
        assert total / count == pytest.approx(shift, abs=0.01)


def test_names_are_declared_for_every_judge_that_compares() -> None:
    declared = {spec.name for spec in metric_specs(["q", "safety"], ["q"])}
    answers: Answers = {Question("q", 0, 1): 1.0, Question("q", 1, 0): 0.0, Question("safety", 0): 1.0}
    assert set(position_metrics([answers])) <= declared
    assert set(position_metrics([])) <= {spec.name for spec in metric_specs()}


def test_the_fitted_bias_is_that_of_the_judge_whatever_orders_were_asked() -> None:
    """Every pair in the order that shows the better one first: beliefs alone would tell of a bias that is not there."""
    judge = JudgeSpec("q", pairwise=True, weight=1.0, answers="probabilities", repeats=1)
    spread = [1.5 - 0.5 * index for index in range(6)]
    for bias in (0.0, 0.8):
        answers: Answers = {}
        for first in range(6):
            for second in range(6):
                # Two orders of a few pairs are enough to tell bias from merit.
                if first < second or (first - second == 1):
                    answers[Question("q", first, second)] = float(
                        1 / (1 + np.exp(spread[second] - spread[first] - bias))
                    )
        total, count = position_metrics([answers])[BIAS]
        assert total / count > 0.05
        total, count = fitted_bias([6], [answers], [judge])["judge/position_bias_logits"]
        assert total / count == pytest.approx(bias, abs=0.1)


def test_without_an_answer_no_bias_is_told() -> None:
    judge = JudgeSpec("q", pairwise=True, weight=1.0)
    assert fitted_bias([], [], [judge]) == {"judge/position_bias_logits": (0.0, 0.0)}
    assert fitted_bias([3], [{}], [judge]) == {"judge/position_bias_logits": (0.0, 0.0)}
