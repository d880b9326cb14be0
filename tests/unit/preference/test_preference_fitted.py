"""Fitted scores: what all pairs would say, with the rules for missing verdicts."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import numpy as np
import pytest

from megatron_sip.evaluation.simulated_judge import JudgeModel, SimulatedJudge
from megatron_sip.preference.bradley_terry import fit, sigmoid
from megatron_sip.preference.combine import combine, mean_scores
from megatron_sip.preference.fitted import (
    VOTE_PRIOR,
    FittedScores,
    position_bias,
    scores_for,
    tally_of,
)
from megatron_sip.preference.scoring import all_pairs
from megatron_sip.preference.spec import JudgeSpec
from megatron_sip.types import Answers, Missing, MissingReason, Question

LOST = Missing(MissingReason.TIMEOUT)
Q = JudgeSpec("q", pairwise=True, weight=1.0)
READ = JudgeSpec("q", pairwise=True, weight=1.0, answers="probabilities", repeats=1)
S = JudgeSpec("s", pairwise=False, weight=1.0)


def pairs(table: dict[tuple[int, int], float | None]) -> Answers:
    return {Question("q", i, j): LOST if value is None else value for (i, j), value in table.items()}


def points(*values: float | None) -> Answers:
    return {Question("s", i): LOST if value is None else value for i, value in enumerate(values)}


@dataclass(frozen=True)
class Case:
    """`gone` have no score; `order` lists the others from the best on, in groups of equal totals."""

    name: str
    size: int
    answers: Answers
    gone: tuple[int, ...]
    order: tuple[tuple[int, ...], ...]
    judges: tuple[JudgeSpec, ...] = (Q,)
    fraction: float = 0.5


CASES = [
    Case("clear order", 3, pairs({(0, 1): 1, (0, 2): 1, (1, 2): 1}), (), ((0,), (1,), (2,))),
    Case("swapped place", 2, pairs({(1, 0): 1}), (), ((1,), (0,))),
    Case("one tie", 2, pairs({(0, 1): 1, (1, 0): 1}), (), ((0, 1),)),
    # 0 against 1 is lost: half of theirs is answered, so both stay, and both beat 2 alike.
    Case("missing is not zero", 3, pairs({(0, 1): None, (0, 2): 1, (1, 2): 1}), (), ((0, 1), (2,))),
    Case("too few", 3, pairs({(0, 1): None, (0, 2): 1, (1, 2): 1}), (0, 1, 2), (), fraction=0.6),
    # 3 has one of three and leaves with its win over 0: 0 is the best of those that remain.
    Case(
        "a leaver takes its wins along",
        4,
        pairs({(0, 1): 1, (0, 2): 1, (1, 2): 1, (3, 0): 1, (1, 3): None, (2, 3): None}),
        (3,),
        ((0,), (1,), (2,)),
    ),
    # Asked twice, answered once: half is enough.
    Case(
        "asked again",
        2,
        {Question("q", 0, 1, 0): LOST, Question("q", 0, 1, 1): 1.0},
        (),
        ((0,), (1,)),
    ),
    # 2 met nobody: no score, and the others do not count it as an opponent.
    Case("never asked", 3, pairs({(0, 1): 1}), (2,), ((0,), (1,))),
    # 1 lacks safety and leaves; it was the only one that 2 met.
    Case(
        "the only opponent left",
        3,
        pairs({(0, 1): 1, (1, 2): 1}) | points(1, None, 1),
        (0, 1, 2),
        (),
        judges=(Q, S),
    ),
    # 0 is better and unsafe: 1/2 < P(0 beats 1) < 1, so that safety decides.
    Case("weights", 2, pairs({(0, 1): 1}) | points(0, 1), (), ((1,), (0,)), judges=(Q, S)),
    Case("nobody answers", 2, pairs({(0, 1): None}), (0, 1), ()),
    Case(
        "probabilities",
        3,
        pairs({(0, 1): 0.6, (1, 0): 0.4, (1, 2): 0.7, (2, 1): 0.3}),
        (),
        ((0,), (1,), (2,)),
        judges=(READ,),
    ),
    Case("nothing asked", 2, {}, (0, 1), ()),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_missing_verdicts(case: Case) -> None:
    total = combine(case.size, list(case.answers), case.answers, case.judges, case.fraction, FittedScores()).total
    assert tuple(index for index, score in enumerate(total) if isinstance(score, Missing)) == case.gone
    levels = [[float(total[index]) for index in group] for group in case.order]  # type: ignore[arg-type]
    for group in levels:
        assert group == pytest.approx([group[0]] * len(group), abs=1e-9)
    assert [group[0] for group in levels] == sorted((group[0] for group in levels), reverse=True)
    assert len({round(group[0], 6) for group in levels}) == len(levels)


def test_two_candidates_by_hand() -> None:
    """A pair has one unknown: its scores are the two sides of one probability."""
    answers = {Question("q", 0, 1, vote): 1.0 for vote in range(3)}
    scores = combine(2, list(answers), answers, [Q], 0.5, FittedScores()).total
    tally = tally_of(2, Q, [answers])
    expected = fit(tally, VOTE_PRIOR).beats()[0, 0, 1]
    assert scores == pytest.approx((expected, 1 - expected))
    assert 0.5 < expected < 1


@pytest.mark.parametrize("bias", [0.0, 1.5])
def test_without_noise_scores_are_the_means_over_all_pairs(bias: float) -> None:
    """Many exact answers on a part of the pairs: the score is the mean of P(i beats j) over all, without the bias."""
    utility = np.array([1.5, 0.7, 0.1, -0.4, -1.3])
    chance = sigmoid(utility[:, None] - utility[None, :])
    expected = (chance.sum(axis=1) - 0.5) / 4
    answers: Answers = {}
    for i, j in ((0, 1), (1, 2), (2, 3), (3, 4), (0, 3), (1, 4)):
        for first, second in ((i, j), (j, i)):
            verdict = float(sigmoid(np.float64(utility[first] - utility[second] + bias)))
            answers[Question("q", first, second)] = verdict
    judge = JudgeSpec("q", pairwise=True, weight=1.0, answers="probabilities")
    found = combine(5, list(answers), answers, [judge], 0.5, FittedScores()).total
    assert found == pytest.approx(expected, abs=0.015)


def test_raw_means_of_unequal_opponents_would_mislead() -> None:
    """1 beat only the worst, 0 lost only to the best: fitted scores see that, means do not."""
    table = {(3, 0): 1.0, (0, 1): 1.0, (0, 2): 1.0, (1, 2): 1.0, (3, 1): 1.0, (3, 2): 1.0}
    answers = {Question("q", i, j, vote): value for (i, j), value in table.items() for vote in range(2)}
    answers |= {Question("q", 1, 2, vote): 1.0 for vote in range(2, 12)}
    means = combine(4, list(answers), answers, [Q], 0.5).total
    fitted = combine(4, list(answers), answers, [Q], 0.5, FittedScores()).total
    assert means[1] > means[0]  # type: ignore[operator]
    assert fitted[1] < fitted[0]  # type: ignore[operator]


def test_scores_lie_in_the_unit_interval_and_share_one_sum() -> None:
    judge = SimulatedJudge(JudgeModel(), 1, 6, 4)
    spec = JudgeSpec("quality", pairwise=True, weight=1.0)
    answers = judge.answer(0, all_pairs(6, spec, seed=1, sample_index=0))
    scores = combine(6, list(answers), answers, [spec], 0.5, FittedScores()).total
    assert all(0 <= float(score) <= 1 for score in scores)  # type: ignore[arg-type]
    assert sum(scores) == pytest.approx(3.0)  # type: ignore[arg-type]


def test_only_an_adaptive_plan_has_fitted_scores() -> None:
    assert scores_for("all-pairs") is scores_for("pivot") is mean_scores
    assert scores_for("adaptive") == FittedScores()


def test_the_tally_sorts_answers_by_place_and_leaves_out_the_rest() -> None:
    answers = pairs({(0, 1): 0.75, (1, 0): None, (2, 1): 1}) | points(1, 1, 1)
    tally = tally_of(3, Q, [answers], frozenset((0, 1)))
    assert tally.answered.tolist() == [[[0, 1, 0], [0, 0, 0], [0, 0, 0]]]
    assert tally.total.tolist() == [[[0, 0.75, 0], [0, 0, 0], [0, 0, 0]]]
    read = tally_of(3, READ, [answers])
    assert read.total[0, 0, 1] == pytest.approx(np.log(3))
    assert read.answered.sum() == 2


@pytest.mark.parametrize("bias", [0.0, 1.5])
@pytest.mark.parametrize("judge", [Q, READ], ids=["votes", "probabilities"])
def test_the_position_bias_of_a_batch(bias: float, judge: JudgeSpec) -> None:
    """Pools of two sizes; the prior, which draws each single fit to 0, is taken out of the sum."""
    model = JudgeModel(bias=bias, probabilities=judge is READ)
    spec = JudgeSpec("quality", pairwise=True, weight=1.0, answers=judge.answers)
    sizes, answers = [], []
    for size in (12, 17):
        simulated = SimulatedJudge(model, 60, size, 31)
        for pool in range(60):
            sizes.append(size)
            answers.append(simulated.answer(pool, all_pairs(size, spec, seed=1, sample_index=pool)))
    total, count = position_bias(sizes, answers, spec)
    # Laplace's approximation draws the bias of votes to 0, by about an eighth at this size.
    expected, slack = (bias * 7 / 8, 3 * count**-0.5) if judge is Q else (bias, 0.05)
    assert total / count == pytest.approx(expected, abs=slack)
    halves = [position_bias(sizes[part], answers[part], spec) for part in (slice(0, 50), slice(50, None))]
    assert np.sum(halves, axis=0) == pytest.approx([total, count], rel=1e-6), "ranks and steps add up"


def test_without_an_answer_there_is_no_bias() -> None:
    assert position_bias([3], [pairs({(0, 1): None})], Q) == (0.0, 0.0)
    assert position_bias([], [], Q) == (0.0, 0.0)


def test_scores_do_not_depend_on_the_names_of_candidates() -> None:
    rng = np.random.default_rng(5)
    table = {pair: float(rng.random() < 0.5) for pair in permutations(range(5), 2)}
    found = combine(5, list(pairs(table)), pairs(table), [Q], 0.5, FittedScores()).total
    order = [3, 1, 4, 0, 2]
    renamed = pairs({(order[i], order[j]): value for (i, j), value in table.items()})
    other = combine(5, list(renamed), renamed, [Q], 0.5, FittedScores()).total
    assert [other[place] for place in order] == pytest.approx(list(found), abs=1e-8)
