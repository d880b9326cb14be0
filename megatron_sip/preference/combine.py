"""Verdicts to scores, with missing verdicts never read as a number (method section 3)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from megatron_sip.preference.spec import JudgeSpec
from megatron_sip.types import Answers, Missing, MissingReason, Question, Scores, Verdict

TOLERANCE = 1e-9
"""Scores closer than this are equal; sums of fractions such as 1/3 are not exact."""

PairwiseScores: TypeAlias = Callable[
    [int, JudgeSpec, Mapping[Question, Verdict], frozenset[int]], Sequence[float | None]
]
"""(distinct candidates, judge, its verdicts, who remains) to a score for each, None where nothing was answered."""


def _involved(question: Question) -> tuple[int, ...]:
    return (question.first,) if question.second is None else (question.first, question.second)


def _check(question: Question, answers: Answers, judges: dict[str, JudgeSpec], num_distinct: int) -> Verdict:
    """The verdict on a planned question; whatever does not fit the plan is a fault of the caller."""
    if question.judge not in judges:
        raise ValueError(f"{question} is for a judge that is not among {sorted(judges)}")
    if judges[question.judge].pairwise != (question.second is not None):
        raise ValueError(f"{question} does not fit the kind of its judge")
    if len(set(_involved(question))) != len(_involved(question)):
        raise ValueError(f"{question} compares a candidate with itself")
    if not all(0 <= index < num_distinct for index in _involved(question)):
        raise ValueError(f"{question} names a candidate beyond the {num_distinct} of the pool")
    if question not in answers:
        raise ValueError(f"{question} was planned but has neither a verdict nor a Missing")
    verdict = answers[question]
    if not isinstance(verdict, Missing) and not 0.0 <= verdict <= 1.0:  # NaN fails this, too
        raise ValueError(f"the verdict {verdict} on {question} is not in [0, 1]")
    return verdict


def _means(
    num_distinct: int, verdicts: Mapping[Question, Verdict], remaining: frozenset[int]
) -> list[tuple[float | None, int, int]]:
    """Per candidate: mean of its answered questions among `remaining` (None without any), answered, planned."""
    total, answered, planned = [0.0] * num_distinct, [0] * num_distinct, [0] * num_distinct
    for question, verdict in verdicts.items():
        involved = _involved(question)
        if not remaining.issuperset(involved):
            continue
        for index in involved:
            planned[index] += 1
            if not isinstance(verdict, Missing):
                answered[index] += 1
                total[index] += verdict if index == question.first else 1.0 - verdict
    means = (total[i] / answered[i] if answered[i] else None for i in range(num_distinct))
    return list(zip(means, answered, planned, strict=True))


def mean_scores(
    num_distinct: int, judge: JudgeSpec, verdicts: Mapping[Question, Verdict], remaining: frozenset[int]
) -> list[float | None]:
    """The mean over the answered questions of each candidate with candidates that remain; the same for any judge."""
    del judge
    return [mean for mean, _, _ in _means(num_distinct, verdicts, remaining)]


def leavers_of(
    num_distinct: int, judge: JudgeSpec, verdicts: Mapping[Question, Verdict], min_answered_fraction: float
) -> dict[int, Missing]:
    """Candidates that have too few answered questions of this judge to stay, with the reason."""
    leavers = {}
    for index, (_, answered, asked) in enumerate(_means(num_distinct, verdicts, frozenset(range(num_distinct)))):
        if answered == 0 or answered < min_answered_fraction * asked - TOLERANCE:
            leavers[index] = Missing(MissingReason.TOO_FEW_ANSWERS, f"{judge.name}: {answered} of {asked} answered")
    return leavers


def combine(
    num_distinct: int,
    planned: Sequence[Question],
    answers: Answers,
    judges: Sequence[JudgeSpec],
    min_answered_fraction: float,
    pairwise_scores: PairwiseScores = mean_scores,
) -> Scores:
    """Scores of the distinct candidates of one pool.

    A pairwise verdict on `Question(first=i, second=j)` is P(i beats j): it counts v for i and 1 - v for j.
    A candidate's score by a judge is the mean over its answered questions, or for a pairwise judge what
    `pairwise_scores` makes of them; the total is the weighted sum over judges. Missing verdicts count for nobody:

    1. On the planned questions, a candidate for whom any judge of weight above 0 answered fewer than
       `min_answered_fraction` of its questions (or none at all) leaves the pool. This is decided once.
    2. Scores are computed again from the questions among those that remain. One that has no answered
       question left with them has no score either; nobody else's score rests on it.

    Raises:
        ValueError: `planned` and `answers` do not fit together or a verdict lies outside [0, 1].
    """
    weights = {judge.name: judge for judge in judges}
    if len(weights) != len(judges):
        raise ValueError("two judges have the same name")
    verdicts: dict[str, dict[Question, Verdict]] = {name: {} for name in weights}
    for question in planned:
        verdict = _check(question, answers, weights, num_distinct)
        verdicts[question.judge][question] = verdict

    leavers: dict[int, Missing] = {}
    for judge in judges:
        if judge.weight > 0:
            leavers = leavers_of(num_distinct, judge, verdicts[judge.name], min_answered_fraction) | leavers

    by_judge = {
        judge.name: _judge_scores(
            num_distinct, judge, verdicts[judge.name], leavers, pairwise_scores if judge.pairwise else mean_scores
        )
        for judge in judges
    }
    total = tuple(_weighted_sum(index, judges, by_judge) for index in range(num_distinct))
    everything = [verdict for of_judge in verdicts.values() for verdict in of_judge.values()]
    reasons = Counter(verdict.reason.value for verdict in everything if isinstance(verdict, Missing))
    return Scores(total, by_judge, questions_asked=len(everything), missing_by_reason=dict(reasons))


def _judge_scores(
    num_distinct: int,
    judge: JudgeSpec,
    verdicts: dict[Question, Verdict],
    leavers: dict[int, Missing],
    scores_of: PairwiseScores,
) -> tuple[Verdict, ...]:
    """One judge's scores without the leavers, who carry the reason why they left."""
    found = scores_of(num_distinct, judge, verdicts, frozenset(range(num_distinct)).difference(leavers))
    scores: list[Verdict] = []
    for index, score in enumerate(found):
        if index in leavers:
            scores.append(leavers[index])
        elif score is None:
            detail = f"{judge.name}: no answered question with a remaining candidate"
            scores.append(Missing(MissingReason.TOO_FEW_ANSWERS, detail))
        else:
            scores.append(score)
    return tuple(scores)


def _weighted_sum(index: int, judges: Sequence[JudgeSpec], by_judge: dict[str, tuple[Verdict, ...]]) -> Verdict:
    """The sum over judges of weight above 0, or the first `Missing` among them."""
    total = 0.0
    asked = [judge for judge in judges if judge.weight > 0]
    if not asked:
        return Missing(MissingReason.TOO_FEW_ANSWERS, "no judge has a weight above 0")
    for judge in asked:
        score = by_judge[judge.name][index]
        if isinstance(score, Missing):
            return score
        total += judge.weight * score
    return total
