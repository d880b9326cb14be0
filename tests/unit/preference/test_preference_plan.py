"""Scoring plans: who is asked about whom, in which option order, in how many rounds."""

from __future__ import annotations

from collections import Counter

import pytest

from megatron_sip.preference.draw import Purpose, draw_index
from megatron_sip.preference.scoring import (
    Distinct,
    JudgeSpec,
    against_pivot,
    all_pairs,
    choose_pivot,
    distinct,
    plan_scoring,
    pointwise,
)
from megatron_sip.types import Answers, Candidate, CandidateKind, Missing, MissingReason, Question, Scores

QUALITY = JudgeSpec("quality", pairwise=True, weight=1.0)
SAFETY = JudgeSpec("safety", pairwise=False, weight=1.0)


def rollouts(*tokens: tuple[int, ...]) -> list[Candidate]:
    return [Candidate(CandidateKind.ROLLOUT, ids, str(ids), index) for index, ids in enumerate(tokens)]


def unordered(questions: list[Question]) -> Counter[frozenset[int | None]]:
    return Counter(frozenset((question.first, question.second)) for question in questions)


@pytest.mark.parametrize(("size", "pairs"), [(2, 1), (5, 10), (16, 120), (17, 136)])
def test_all_pairs_asks_every_unordered_pair_once(size: int, pairs: int) -> None:
    asked = unordered(all_pairs(size, QUALITY, seed=1, sample_index=0))
    assert len(asked) == pairs
    assert set(asked.values()) == {1}


def test_paper_sized_pool_with_five_votes_costs_680_and_85_calls() -> None:
    quality = JudgeSpec("quality", pairwise=True, weight=1.0, votes=5)
    safety = JudgeSpec("safety", pairwise=False, weight=1.0, votes=5)
    assert len(all_pairs(17, quality, seed=1, sample_index=0)) == 680
    assert len(pointwise(17, safety)) == 85


def test_votes_of_a_pair_share_one_order_and_differ_only_in_the_vote() -> None:
    judge = JudgeSpec("quality", pairwise=True, weight=1.0, votes=3)
    questions = all_pairs(4, judge, seed=3, sample_index=8)
    assert len(set(questions)) == 18
    orders = {(question.first, question.second) for question in questions}
    assert len(orders) == 6
    assert Counter(question.vote for question in questions) == {0: 6, 1: 6, 2: 6}


def test_both_orders_asks_each_pair_either_way() -> None:
    judge = JudgeSpec("quality", pairwise=True, weight=1.0, both_orders=True)
    orders = {(question.first, question.second) for question in all_pairs(3, judge, seed=1, sample_index=0)}
    assert orders == {(0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1)}


def test_option_order_is_seeded_and_even() -> None:
    first = [all_pairs(4, QUALITY, seed=7, sample_index=sample) for sample in range(300)]
    again = [all_pairs(4, QUALITY, seed=7, sample_index=sample) for sample in range(300)]
    other = [all_pairs(4, QUALITY, seed=8, sample_index=sample) for sample in range(300)]
    assert first == again
    assert first != other
    assert len({plan[0][1:3] for plan in first}) == 2, "the order of a pair is drawn anew for each cut"
    swapped = sum(q.first > q.second for plan in first for q in plan if q.second is not None)
    # 1800 fair coins: the mean is 900, the standard deviation 21.
    assert 815 < swapped < 985


def test_pivot_meets_each_other_candidate_once() -> None:
    asked = unordered(against_pivot(4, QUALITY, pivot=2, seed=1, sample_index=0))
    assert asked == {frozenset((0, 2)): 1, frozenset((1, 2)): 1, frozenset((3, 2)): 1}


def test_pivot_is_the_original_or_a_seeded_draw() -> None:
    pool = [*rollouts((1,), (2,)), Candidate(CandidateKind.ORIGINAL, (3,), "c")]
    assert choose_pivot(pool, distinct(pool), seed=1, sample_index=0) == 2
    drawn = [choose_pivot(pool[:2], distinct(pool[:2]), seed=1, sample_index=sample) for sample in range(200)]
    assert 70 < sum(drawn) < 130


def test_copies_are_grouped_and_share_scores() -> None:
    unique = distinct(rollouts((5, 6), (7,), (5, 6), (8,), (7,)))
    assert unique == Distinct(members=(0, 1, 3), of_candidate=(0, 1, 0, 2, 1))
    gone = Missing(MissingReason.TOO_FEW_ANSWERS)
    spread = unique.spread(Scores((0.25, gone, 1.0), {"quality": (0.25, gone, 1.0)}, 6, {"timeout": 2}))
    assert spread.total == (0.25, gone, 0.25, 1.0, gone)
    assert spread.by_judge == {"quality": (0.25, gone, 0.25, 1.0, gone)}
    assert (spread.questions_asked, spread.missing_by_reason) == (6, {"timeout": 2})


def test_a_plan_asks_all_judges_of_weight_above_0_in_one_round() -> None:
    pool = rollouts((1,), (2,), (3,), (1,))
    silent = JudgeSpec("factuality", pairwise=False, weight=0.0)
    plan = plan_scoring("all-pairs", pool, distinct(pool), [QUALITY, silent, SAFETY], seed=1, sample_index=0)
    first = plan.next_round({})
    assert Counter(question.judge for question in first) == {"quality": 3, "safety": 3}
    answers: Answers = dict.fromkeys(first, 1.0)
    answers[first[0]] = Missing(MissingReason.TIMEOUT)
    assert plan.next_round(answers) == []


def test_a_pivot_plan_asks_pairs_with_the_pivot_only() -> None:
    pool = [Candidate(CandidateKind.ORIGINAL, (9,), "o"), *rollouts((1,), (2,), (3,))]
    plan = plan_scoring("pivot", pool, distinct(pool), [QUALITY, SAFETY], seed=1, sample_index=0)
    questions = plan.next_round({})
    assert all(0 in (q.first, q.second) for q in questions if q.judge == "quality")
    assert Counter(question.judge for question in questions) == {"quality": 3, "safety": 4}


def test_nothing_is_asked_about_a_lone_candidate() -> None:
    pool = rollouts((1,), (1,))
    assert (
        plan_scoring("all-pairs", pool, distinct(pool), [QUALITY, SAFETY], seed=1, sample_index=0).next_round({}) == []
    )


@pytest.mark.parametrize(("votes", "weight"), [(0, 1.0), (1, -0.5)])
def test_a_judge_that_makes_no_sense_is_refused(votes: int, weight: float) -> None:
    with pytest.raises(ValueError, match="judge quality"):
        JudgeSpec("quality", pairwise=True, weight=weight, votes=votes)


def test_draws_depend_on_every_part_of_their_key() -> None:
    def stream(seed: int, purpose: Purpose, last: int) -> list[int]:
        return [draw_index(1000, seed, purpose, place, last) for place in range(20)]

    streams = [
        stream(1, Purpose.BEST_TIE, 0),
        stream(2, Purpose.BEST_TIE, 0),
        stream(1, Purpose.WORST_TIE, 0),
        stream(1, Purpose.BEST_TIE, 1),
    ]
    assert len({tuple(numbers) for numbers in streams}) == 4
    assert stream(1, Purpose.BEST_TIE, 0) == streams[0]
    assert all(len(set(numbers)) > 10 for numbers in streams)
    with pytest.raises(ValueError, match="from nothing"):
        draw_index(0, 1, Purpose.PIVOT)
