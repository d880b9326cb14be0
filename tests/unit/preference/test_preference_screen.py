"""Screens: who is stopped, what is asked, and the scores, in cases worked by hand."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from megatron_sip.preference import adaptive
from megatron_sip.preference.bradley_terry import fit
from megatron_sip.preference.combine import combine
from megatron_sip.preference.rounds import next_rounds
from megatron_sip.preference.scoring import JudgeSpec, ScoringPlan, distinct, plan_scoring
from megatron_sip.preference.screen import Screen, ScreenedPlan, narrowed, screened_scores
from megatron_sip.types import Answers, Candidate, CandidateKind, Missing, MissingReason, Question, Scores, Verdict

Q = JudgeSpec("quality", pairwise=True, weight=1.0)
S = JudgeSpec("safety", pairwise=False, weight=1.0, tells_safety=True)
C = JudgeSpec("classifier", pairwise=False, weight=0.5, tells_safety=True)
F = JudgeSpec("factuality", pairwise=False, weight=1.0)
LOST = Missing(MissingReason.TIMEOUT)
GONE = "gone"
PLAIN = (1, 2, 3, 4, 5, 6)
LOOP = (1, 2, 1, 2, 1, 2, 1, 2)  # five 4-grams, two of them different: 3/5 are repeated
HALF = (1, 2, 3, 4, 1, 2, 3, 4)  # five 4-grams, four of them different: 1/5 is repeated


def rollouts(*tokens: tuple[int, ...]) -> list[Candidate]:
    return [Candidate(CandidateKind.ROLLOUT, ids, str(ids), index) for index, ids in enumerate(tokens)]


def plain(count: int) -> list[Candidate]:
    return rollouts(*((100 * index, *PLAIN) for index in range(count)))


def points(judge: str, *values: float | None) -> Answers:
    return {Question(judge, i): LOST if value is None else value for i, value in enumerate(values)}


def pairs(table: dict[tuple[int, int], float | None]) -> Answers:
    return {Question("quality", i, j): LOST if value is None else value for (i, j), value in table.items()}


@pytest.mark.parametrize(
    ("screen", "tokens", "answers", "judges", "expected"),
    [
        (Screen(safety_below=0.5), (PLAIN, HALF, LOOP), points("safety", 0.4, 0.5, 1.0), (Q, S), {0}),
        # A missing verdict stops nobody.
        (Screen(safety_below=0.5), (PLAIN, HALF), points("safety", None, 0.0), (Q, S), {1}),
        # One judge that finds it unsafe is enough; factuality does not speak of safety.
        (
            Screen(safety_below=0.3),
            (PLAIN, HALF, LOOP),
            points("safety", 1.0, 0.2, 0.9) | points("classifier", 0.1, 0.9, 0.9) | points("factuality", 0, 0, 0),
            (Q, S, C, F),
            {0, 1},
        ),
        # Votes are averaged over those that came: (0 + 1) / 2 is no less than 0.5, (0 + 0) / 2 is.
        (
            Screen(safety_below=0.5),
            (PLAIN, HALF),
            {
                Question("safety", 0, None, 0): 0.0,
                Question("safety", 0, None, 1): 1.0,
                Question("safety", 1, None, 0): 0.0,
                Question("safety", 1, None, 1): LOST,
            },
            (Q, JudgeSpec("safety", False, 1.0, votes=2, tells_safety=True)),
            {1},
        ),
        # A judge of weight 0 was not asked, whatever stands there.
        (
            Screen(safety_below=0.5),
            (PLAIN, HALF),
            points("safety", 0.0, 1.0),
            (Q, JudgeSpec("safety", False, 0.0, tells_safety=True)),
            set(),
        ),
        (Screen(repetition_above=0.5), (PLAIN, HALF, LOOP), {}, (Q,), {2}),
        (Screen(repetition_above=0.6), (PLAIN, HALF, LOOP), {}, (Q,), set()),
        (Screen(repetition_above=0.1), (PLAIN, HALF, LOOP), {}, (Q,), {1, 2}),
        # Three tokens have no 4-gram.
        (Screen(repetition_above=0.0), ((7, 7, 7), LOOP), {}, (Q,), {1}),
        (Screen(0.5, 0.5), (PLAIN, HALF, LOOP), points("safety", 1.0, 0.0, 1.0), (Q, S), {1, 2}),
        (Screen(), (PLAIN, LOOP), points("safety", 0.0, 0.0), (Q, S), set()),
    ],
)
def test_who_is_stopped(
    screen: Screen,
    tokens: tuple[tuple[int, ...], ...],
    answers: Answers,
    judges: tuple[JudgeSpec, ...],
    expected: set[int],
) -> None:
    assert screen.stopped(rollouts(*tokens), answers, judges) == expected


def plan_of(screen: Screen, candidates: list[Candidate], judges: tuple[JudgeSpec, ...], method: str = "all-pairs"):
    def inner(members: tuple[int, ...]) -> ScoringPlan:
        kept = [candidates[index] for index in members]
        return plan_scoring(method, kept, distinct(kept), judges, seed=1, sample_index=0)  # type: ignore[arg-type]

    return ScreenedPlan(screen, candidates, judges, inner)


def answered(questions: list[Question], unsafe: set[int]) -> Answers:
    return {q: (0.0 if q.second is None and q.first in unsafe else 1.0) for q in questions}


def test_pointwise_questions_come_first_and_the_stopped_are_not_compared() -> None:
    plan = plan_of(Screen(safety_below=0.5), plain(5), (Q, S, F))
    first = plan.next_round({})
    assert {(q.judge, q.first, q.second) for q in first} == {
        (j, i, None) for j in ("safety", "factuality") for i in range(5)
    }
    answers = answered(first, {1, 3})
    # Factuality 0 alone stops nobody, safety does.
    answers = {q: 1.0 if q.judge == "factuality" else v for q, v in answers.items()}
    second = plan.next_round(answers)
    assert {frozenset((q.first, q.second)) for q in second} == {frozenset(p) for p in ((0, 2), (0, 4), (2, 4))}
    assert len(second) == 3
    answers |= dict.fromkeys(second, 0.5)
    assert plan.next_round(answers) == []


def test_nobody_stopped_asks_what_the_plan_asks_without_a_screen() -> None:
    candidates = plain(4)
    plain_plan = plan_scoring("all-pairs", candidates, distinct(candidates), (Q, S), seed=1, sample_index=0)
    plan = plan_of(Screen(safety_below=0.5), candidates, (Q, S))
    first = plan.next_round({})
    second = plan.next_round(answered(first, set()))
    assert sorted(map(str, [*first, *second])) == sorted(map(str, plain_plan.next_round({})))


def test_a_pivot_that_is_stopped_is_replaced() -> None:
    original = Candidate(CandidateKind.ORIGINAL, PLAIN, "o")
    plan = plan_of(Screen(safety_below=0.5), [original, *plain(3)], (Q, S), "pivot")
    first = plan.next_round({})
    second = plan.next_round(answered(first, {0}))
    assert len(second) == 2
    assert all(0 not in (q.first, q.second) for q in second)


@pytest.mark.parametrize("unsafe", [{0, 1, 2}, {0, 1}])
def test_fewer_than_two_left_are_not_compared(unsafe: set[int]) -> None:
    plan = plan_of(Screen(safety_below=0.5), plain(3), (Q, S))
    answers = answered(plan.next_round({}), unsafe)
    assert plan.next_round(answers) == []


def test_without_a_pointwise_judge_comparing_is_the_first_round() -> None:
    plan = plan_of(Screen(repetition_above=0.5), [*rollouts(LOOP), *plain(2)], (Q,))
    first = plan.next_round({})
    assert {frozenset((q.first, q.second)) for q in first} == {frozenset((1, 2))}
    assert plan.next_round(dict.fromkeys(first, 1.0)) == []
    assert plan_of(Screen(repetition_above=0.5), plain(1), (Q,)).next_round({}) == []


def test_without_a_pairwise_judge_there_is_one_round() -> None:
    plan = plan_of(Screen(safety_below=0.5), plain(3), (S,))
    first = plan.next_round({})
    assert len(first) == 3
    assert plan.next_round(answered(first, set())) == []


def test_a_plan_of_several_rounds_goes_on_among_those_that_are_left() -> None:
    """An inner plan sees its own indices and all answers on its candidates, and none on the others."""
    seen: list[Answers] = []

    class TwoRounds:
        def next_round(self, answers: Answers) -> list[Question]:
            seen.append(answers)
            asked = [question for question in answers if question.second is not None]
            return [[Question("quality", 0, 1)], [Question("quality", 2, 1)], []][len(asked)]

    plan = ScreenedPlan(Screen(safety_below=0.5), plain(4), (Q, S), lambda members: TwoRounds())
    answers = answered(plan.next_round({}), {1})
    answers |= dict.fromkeys(first := plan.next_round(answers), 0.25)
    answers |= dict.fromkeys(second := plan.next_round(answers), 0.75)
    assert (first, second, plan.next_round(answers)) == ([Question("quality", 0, 2)], [Question("quality", 3, 2)], [])
    assert seen[-1] == {
        **points("safety", 1.0, 1.0, 1.0),
        Question("quality", 0, 1): 0.25,
        Question("quality", 2, 1): 0.75,
    }


def test_adaptive_plans_behind_screens_are_worked_out_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked is what each plan asks by itself; pools that the screen leaves equally large share one fit."""
    unsafe: list[set[int]] = [{0}, {3}, {1, 2}, set(), {0, 1, 2, 3, 4}, {5}, set()]
    alone, plans = ([plan_of(Screen(safety_below=0.5), plain(6), (Q, S), "adaptive") for _ in range(6)] for _ in "ab")
    bare = plan_scoring("adaptive", plain(6), distinct(plain(6)), (Q,), seed=1, sample_index=0)
    answers: list[Answers] = [{} for _ in unsafe]
    fits: list[int] = []
    monkeypatch.setattr(adaptive, "fit", lambda tally, prior: fits.append(len(tally.answered)) or fit(tally, prior))
    sizes = []
    for number in range(4):
        fits.clear()
        together = next_rounds([*plans, bare], answers)
        if number == 1:
            # Three pools of five, one of four, one of six, and the bare one, which has no other judge.
            assert sorted(fits) == [1, 1, 1, 3]
        assert together == [plan.next_round(given) for plan, given in zip([*alone, bare], answers, strict=True)]
        sizes.append([len(questions) for questions in together])
        for given, questions, bad in zip(answers, together, unsafe, strict=True):
            given |= {q: float(q.first not in bad if q.second is None else q.first < q.second) for q in questions}
    assert sizes[0][:6] == [6] * 6
    assert [size > 0 for size in sizes[1]] == [True, True, True, True, False, True, True]


def test_answers_are_narrowed_to_members() -> None:
    answers = points("safety", 0.0, 0.25, 0.5) | pairs({(0, 1): 1, (2, 0): 0.75, (1, 2): 0})
    assert narrowed(answers, (0, 2)) == points("safety", 0.0, 0.5) | pairs({(1, 0): 0.75})


@dataclass(frozen=True)
class Case:
    name: str
    stopped: set[int]
    answers: Answers
    total: tuple[float | str, ...]
    judges: tuple[JudgeSpec, ...] = (Q, S)
    quality: tuple[float | str, ...] | None = None
    """The pairwise part; None where nobody has one."""


CASES = [
    # 1 was stopped. 0: 1 (beats 2) + 1; 1: 0 + 0.2; 2: 0 + 0.8
    Case("one", {1}, points("safety", 1, 0.2, 0.8) | pairs({(0, 2): 1}), (2.0, 0.2, 0.8), quality=(1.0, 0.0, 0.0)),
    # 2 beats 0 and 3 loses half: 0: (0 + 0.5)/2 + 1; 2: (1 + 1)/2 + 1; 3: (0.5 + 0)/2 + 0.5; 1: 0 + 0
    Case(
        "the others are scored among themselves",
        {1},
        points("safety", 1, 0, 1, 0.5) | pairs({(0, 2): 0, (0, 3): 0.5, (2, 3): 1}),
        (1.25, 0.0, 2.0, 0.75),
        quality=(0.25, 0.0, 1.0, 0.25),
    ),
    # A weight of 2 for quality and 0.5 for the classifier: 0: 2 * 1 + 0.45; 1: 0 + 0.05; 2: 0 + 0.5
    Case(
        "weights",
        {1},
        points("classifier", 0.9, 0.1, 1) | pairs({(2, 0): 0}),
        (2.45, 0.05, 0.5),
        judges=(JudgeSpec("quality", True, 2.0), C),
        quality=(1.0, 0.0, 0.0),
    ),
    # Stopped for a loop, without a pointwise judge: nothing but the losses is known.
    Case("no pointwise judge", {0}, pairs({(1, 2): 0.75}), (0.0, 0.75, 0.25), judges=(Q,), quality=(0, 0.75, 0.25)),
    # 1 was stopped for a loop and its safety is missing: it has no score, as without a screen.
    Case(
        "stopped and missing",
        {1},
        points("safety", 1, None, 0.5) | pairs({(0, 2): 0}),
        (1.0, GONE, 1.5),
        quality=(0.0, GONE, 1.0),
    ),
    # 2 lacks safety and leaves; 0 has no answered comparison with anyone who stays.
    Case(
        "missing among the others",
        {1},
        points("safety", 1, 0, None) | pairs({(0, 2): 1}),
        (GONE, 0.0, GONE),
        quality=(GONE, 0.0, GONE),
    ),
    # The comparison of 0 and 2 is missing: both leave, as without a screen.
    Case(
        "missing comparison",
        {1},
        points("safety", 1, 0, 1) | pairs({(0, 2): None}),
        (GONE, 0.0, GONE),
        quality=(GONE, 0.0, GONE),
    ),
    # One left: nothing was compared, and safety alone decides.
    Case("one left", {0, 2}, points("safety", 0.1, 0.9, 0.2), (0.1, 0.9, 0.2)),
    Case("none left", {0, 1, 2}, points("safety", 0.1, 0.2, None), (0.1, 0.2, GONE)),
    # One left and no pointwise judge: nobody has a score.
    Case("one left, nothing else known", {0}, {}, (GONE, GONE), judges=(Q,)),
    Case("none stopped", set(), points("safety", 1, 0) | pairs({(0, 1): 0.75}), (1.75, 0.25), quality=(0.75, 0.25)),
    # No pairwise judge in this iteration: the screen changes nothing.
    Case("nothing to compare", {0}, points("safety", 0, 1), (0.0, 1.0), judges=(S,)),
    # Two pairwise judges: 0 from each. 0: 1 + 0.5 * 0.25 + 1; 1: 0; 2: 0 + 0.5 * 0.75 + 1
    Case(
        "two pairwise judges",
        {1},
        points("safety", 1, 0, 1) | pairs({(0, 2): 1}) | {Question("quality-b", 2, 0): 0.75},
        (2.125, 0.0, 1.375),
        judges=(Q, JudgeSpec("quality-b", True, 0.5), S),
        quality=(1.0, 0.0, 0.0),
    ),
]


def shown(values: tuple[Verdict, ...]) -> tuple[float | str, ...]:
    return tuple(GONE if isinstance(value, Missing) else value for value in values)


def scores_of(case: Case) -> Scores:
    return screened_scores(
        frozenset(case.stopped),
        len(case.total),
        list(case.answers),
        case.answers,
        case.judges,
        lambda *known: combine(*known, 0.5),
    )


def same(found: tuple[float | str, ...], expected: tuple[float | str, ...]) -> bool:
    return len(found) == len(expected) and all(
        f == e if GONE in (f, e) else f == pytest.approx(e, abs=1e-12) for f, e in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_scores_worked_by_hand(case: Case) -> None:
    scores = scores_of(case)
    assert same(shown(scores.total), case.total)
    quality = scores.by_judge.get("quality")
    assert (quality is None) == (case.quality is None)
    if quality is not None and case.quality is not None:
        assert same(shown(quality), case.quality)
    assert scores.questions_asked == len(case.answers)
    missing = sum(isinstance(verdict, Missing) for verdict in case.answers.values())
    assert sum(scores.missing_by_reason.values()) == missing


def test_the_order_of_those_that_are_left_is_as_if_they_had_beaten_the_stopped() -> None:
    """Against a judge that always finds a stopped candidate worse, the screen moves neither best nor worst."""
    utility = [0.9, 0.1, 0.6, 0.2, 0.75]
    stopped = frozenset({1, 3})
    everything = pairs({(i, j): float(utility[i] > utility[j]) for i in range(5) for j in range(i + 1, 5)})
    full = combine(5, list(everything), everything, (Q,), 0.5)
    asked = {q: v for q, v in everything.items() if not stopped & {q.first, q.second}}
    screened = screened_scores(stopped, 5, list(asked), asked, (Q,), lambda *known: combine(*known, 0.5))
    order = sorted((0, 2, 4), key=lambda index: full.total[index])  # type: ignore[arg-type, return-value]
    assert order == sorted((0, 2, 4), key=lambda index: screened.total[index])  # type: ignore[arg-type, return-value]
    assert len(asked) == 3
    assert min(range(5), key=lambda index: screened.total[index]) in stopped  # type: ignore[arg-type, return-value]
