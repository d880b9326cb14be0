"""Verdicts to scores: a table worked by hand, and properties that hold for every table."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from itertools import combinations

import pytest

from megatron_sip.preference.combine import combine
from megatron_sip.preference.scoring import JudgeSpec
from megatron_sip.types import Answers, Missing, MissingReason, Question, Verdict

GONE = "gone"
LOST = Missing(MissingReason.TIMEOUT)
Q = JudgeSpec("q", pairwise=True, weight=1.0)
S = JudgeSpec("s", pairwise=False, weight=1.0)


def pairs(table: dict[tuple[int, int], float | None]) -> Answers:
    """{(i, j): P(i beats j)}; None is a missing verdict."""
    return {Question("q", i, j): LOST if value is None else value for (i, j), value in table.items()}


def points(*values: float | None) -> Answers:
    return {Question("s", i): LOST if value is None else value for i, value in enumerate(values)}


def votes(candidate: int, *values: float | None) -> Answers:
    return {Question("s", candidate, None, v): LOST if x is None else x for v, x in enumerate(values)}


@dataclass(frozen=True)
class Case:
    name: str
    size: int
    answers: Answers
    total: tuple[float | str, ...]
    judges: tuple[JudgeSpec, ...] = (Q,)
    fraction: float = 0.5
    missing: int = field(default=0)


CASES = [
    # 0: (1 + 1) / 2; 1: (0 + 1) / 2; 2: (0 + 0) / 2
    Case("clear order", 3, pairs({(0, 1): 1, (0, 2): 1, (1, 2): 1}), (1.0, 0.5, 0.0)),
    # 0: (3/4 + 1/2) / 2 = 5/8; 1: (1/4 + 1/4) / 2 = 1/4; 2: (1/2 + 3/4) / 2 = 5/8
    Case("probabilities", 3, pairs({(0, 1): 0.75, (0, 2): 0.5, (1, 2): 0.25}), (0.625, 0.25, 0.625)),
    # Option 1 is candidate 1: it wins against 0, so 1 gets 1 and 0 gets 0.
    Case("swapped order", 2, pairs({(1, 0): 1}), (0.0, 1.0)),
    # Both orders. 0: (0.75 + (1 - 0.5)) / 2 = 0.625; 1: (0.25 + 0.5) / 2 = 0.375
    Case("both orders", 2, pairs({(0, 1): 0.75, (1, 0): 0.5}), (0.625, 0.375)),
    # 0 against 1 is lost. 0: only (0, 2) = 1, one of two answered, which is half: stays. 1: only (1, 2) = 1.
    # 2: (0 + 0) / 2. Were the missing verdict a 0, candidate 0 would have 1/2.
    Case("missing is not zero", 3, pairs({(0, 1): None, (0, 2): 1, (1, 2): 1}), (1.0, 1.0, 0.0), missing=1),
    # The same verdicts, but 60 % must be answered: 0 and 1 have one of two and leave; 2 has two of two and
    # stays, but no question with a remaining candidate is left to it.
    Case(
        "half is not enough",
        3,
        pairs({(0, 1): None, (0, 2): 1, (1, 2): 1}),
        (GONE, GONE, GONE),
        fraction=0.6,
        missing=1,
    ),
    # 3 has one of three answered (it beat 0) and leaves; 0 and the others are scored again without it.
    # 0: (1 + 1) / 2 = 1 and not 2/3; 1: (0 + 1) / 2; 2: 0 / 2
    Case(
        "a leaver takes its wins along",
        4,
        pairs({(0, 1): 1, (0, 2): 1, (1, 2): 1, (0, 3): 0, (1, 3): None, (2, 3): None}),
        (1.0, 0.5, 0.0, GONE),
        missing=2,
    ),
    # 4 has one of four and leaves. 3 has two of four (against 0 and 4) and stays; without 4 it has one of
    # three, but leaving was decided on the planned questions.
    # 0: (1 + 1 + 0) / 3; 1: (0 + 1) / 2; 2: 0 / 2; 3: 1 / 1
    Case(
        "decided once",
        5,
        pairs(
            {
                (0, 1): 1,
                (0, 2): 1,
                (0, 3): 0,
                (0, 4): None,
                (1, 2): 1,
                (1, 3): None,
                (1, 4): None,
                (2, 3): None,
                (2, 4): None,
                (3, 4): 0,
            }
        ),
        (2 / 3, 0.5, 0.0, 1.0, GONE),
        missing=5,
    ),
    # Safety of 1 is missing, so 1 leaves altogether; quality is then 0 against 2 alone.
    # 0: 1 + 0 = 1; 2: 0 + 1 = 1
    Case(
        "lacking one judge",
        3,
        pairs({(0, 1): 0, (0, 2): 1, (1, 2): 1}) | points(0, None, 1),
        (1.0, GONE, 1.0),
        judges=(Q, S),
        missing=1,
    ),
    # 0: 2 * 1 + 0.5 * 0 = 2; 1: 2 * 0 + 0.5 * 1 = 0.5
    Case(
        "weights",
        2,
        pairs({(0, 1): 1}) | points(0, 1),
        (2.0, 0.5),
        judges=(JudgeSpec("q", pairwise=True, weight=2.0), JudgeSpec("s", pairwise=False, weight=0.5)),
    ),
    # 0: three of five answered, (1 + 1 + 0) / 3; 1: two of five are under half: leaves; 2: half a point each
    Case(
        "votes",
        3,
        votes(0, 1, None, 1, 0, None) | votes(1, 1, 1, None, None, None) | votes(2, 0.5, 0.5, 0.5, 0.5, 0.5),
        (2 / 3, GONE, 0.5),
        judges=(S,),
        missing=5,
    ),
    # Pivot 0. 3 is lost and leaves. 0: (1 + 0) / 2; 1: 0; 2: 1
    Case("pivot", 4, pairs({(0, 1): 1, (2, 0): 1, (0, 3): None}), (0.5, 0.0, 1.0, GONE), missing=1),
    # Pivot 0 has one of three answered and leaves, and nobody has an opponent left; 2 and 3 had none anyway.
    Case("pivot leaves", 4, pairs({(0, 1): 1, (2, 0): None, (0, 3): None}), (GONE, GONE, GONE, GONE), missing=2),
    Case("nobody answers", 2, pairs({(0, 1): None}) | points(1, 1), (GONE, GONE), judges=(Q, S), missing=1),
    # A fraction of 0 still needs one answer: a mean of nothing is no score.
    Case("fraction zero", 2, points(None, 1), (GONE, 1.0), judges=(S,), fraction=0.0, missing=1),
    # Even so candidate 1, which no safety verdict reached, leaves and takes its win over 0 along.
    # 0: 1 + 0; 2: 0 + 1
    Case(
        "fraction zero, lacking one judge",
        3,
        pairs({(0, 1): 0, (0, 2): 1, (1, 2): 1}) | points(0, None, 1),
        (1.0, GONE, 1.0),
        judges=(Q, S),
        fraction=0.0,
        missing=1,
    ),
    # A judge of weight 0 puts nobody out and adds nothing.
    Case(
        "weight zero",
        2,
        pairs({(0, 1): 1}) | points(None, 1),
        (1.0, 0.0),
        judges=(Q, JudgeSpec("s", pairwise=False, weight=0.0)),
        missing=1,
    ),
    # Nothing was planned for anyone (a lone candidate).
    Case("nothing planned", 1, {}, (GONE,)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_scores_worked_by_hand(case: Case) -> None:
    scores = combine(case.size, list(case.answers), case.answers, case.judges, case.fraction)
    found = tuple(GONE if isinstance(score, Missing) else score for score in scores.total)
    assert [f == GONE for f in found] == [t == GONE for t in case.total]
    assert [f for f in found if f != GONE] == pytest.approx([t for t in case.total if t != GONE], abs=1e-12)
    assert scores.questions_asked == len(case.answers)
    assert scores.missing_by_reason == ({"timeout": case.missing} if case.missing else {})


def test_parts_by_judge_and_why_one_left() -> None:
    answers = pairs({(0, 1): 0.75, (0, 2): 1, (1, 2): 0.5}) | points(0.5, 1, None)
    scores = combine(3, list(answers), answers, (Q, S), 0.5)
    assert scores.by_judge["q"][:2] == (0.75, 0.25)
    assert scores.by_judge["s"][:2] == (0.5, 1.0)
    left = Missing(MissingReason.TOO_FEW_ANSWERS, "s: 0 of 1 answered")
    assert scores.total == (1.25, 1.25, left)
    assert scores.by_judge["q"][2] == scores.by_judge["s"][2] == left


def test_a_question_planned_twice_counts_once() -> None:
    answers = pairs({(0, 1): 1})
    assert combine(2, [*answers, *answers], answers, (Q,), 0.5).questions_asked == 1


def test_reasons_are_counted_apart() -> None:
    answers: Answers = {
        Question("s", 0): 1.0,
        Question("s", 1): Missing(MissingReason.UNPARSABLE),
        Question("s", 2): LOST,
        Question("s", 3): LOST,
    }
    assert combine(4, list(answers), answers, (S,), 0.5).missing_by_reason == {"unparsable": 1, "timeout": 2}


@pytest.mark.parametrize(
    ("planned", "answers", "message"),
    [
        ([Question("q", 0, 1)], {}, "neither a verdict nor a Missing"),
        ([Question("q", 0, 1)], {Question("q", 0, 1): float("nan")}, r"not in \[0, 1\]"),
        ([Question("q", 0, 1)], {Question("q", 0, 1): 1.5}, r"not in \[0, 1\]"),
        ([Question("q", 0, 2)], {Question("q", 0, 2): 1.0}, "beyond the 2"),
        ([Question("q", 1, 1)], {Question("q", 1, 1): 1.0}, "with itself"),
        ([Question("q", 0)], {Question("q", 0): 1.0}, "kind of its judge"),
        ([Question("other", 0)], {Question("other", 0): 1.0}, "not among"),
    ],
)
def test_what_does_not_fit_the_plan_is_refused(planned: list[Question], answers: Answers, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        combine(2, planned, answers, (Q,), 0.5)


def test_scores_do_not_depend_on_names_or_order_of_candidates() -> None:
    rng = random.Random(5)
    for _ in range(40):
        size = rng.randint(2, 6)
        answers: Answers = {
            Question("q", i, j): LOST if rng.random() < 0.35 else rng.random() for i, j in combinations(range(size), 2)
        }
        answers |= {Question("s", i): LOST if rng.random() < 0.1 else rng.random() for i in range(size)}
        renamed = rng.sample(range(size), size)
        moved: dict[Question, Verdict] = {}
        for question, verdict in answers.items():
            second = None if question.second is None else renamed[question.second]
            moved[question._replace(first=renamed[question.first], second=second)] = verdict
        plain = combine(size, list(answers), answers, (Q, S), 0.5).total
        other = combine(size, rng.sample(list(moved), len(moved)), moved, (S, Q), 0.5).total
        for index in range(size):
            here, there = plain[index], other[renamed[index]]
            assert isinstance(here, Missing) == isinstance(there, Missing)
            if not isinstance(here, Missing):
                assert here == pytest.approx(there, abs=1e-12)
