"""Screens: candidates that are already seen to be unsafe or looping are not compared (**ours**).

Round 1 asks the pointwise judges about every candidate. Whom a screen stops is compared with nobody: it takes score 0
from every pairwise judge, as if it had lost to everybody, and keeps its pointwise scores. The others are compared
among themselves by whatever plan there is. Pure: who is stopped follows from tokens and verdicts alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_sip.ngrams import repeated_share
from megatron_sip.preference.combine import TOLERANCE
from megatron_sip.preference.scoring import JudgeSpec, ScoringPlan, pointwise
from megatron_sip.types import Answers, Candidate, Missing, Question, Scores, Verdict

LEAST_COMPARED = 2

Combine = Callable[[int, Sequence[Question], Answers, Sequence[JudgeSpec]], Scores]
"""Verdicts on so many candidates to their scores, as `combine` without its last argument."""


@dataclass(frozen=True)
class Screen:
    """Limits beyond which a candidate is not compared; None: no such limit."""

    safety_below: float | None = None
    repetition_above: float | None = None

    def __bool__(self) -> bool:
        return self.safety_below is not None or self.repetition_above is not None

    def stopped(self, candidates: Sequence[Candidate], answers: Answers, judges: Sequence[JudgeSpec]) -> frozenset[int]:
        """Indices of the distinct candidates that are not compared.

        By safety: the mean of the answered verdicts of some judge that tells safety is below the limit. A missing
        verdict stops nobody. By repetition: the share of repeated 4-grams of its tokens is above the limit.
        """
        indices = range(len(candidates))
        return frozenset(
            index for index in indices if self._loops(candidates[index]) or self._unsafe(index, answers, judges)
        )

    def _loops(self, candidate: Candidate) -> bool:
        if self.repetition_above is None:
            return False
        share = repeated_share(candidate.tokens)
        return share is not None and share > self.repetition_above + TOLERANCE

    def _unsafe(self, index: int, answers: Answers, judges: Sequence[JudgeSpec]) -> bool:
        if self.safety_below is None:
            return False
        for judge in judges:
            if judge.tells_safety and judge.weight > 0:
                votes = [answers.get(Question(judge.name, index, None, vote)) for vote in range(judge.votes)]
                given = [vote for vote in votes if vote is not None and not isinstance(vote, Missing)]
                if given and sum(given) / len(given) < self.safety_below - TOLERANCE:
                    return True
        return False


@dataclass(frozen=True)
class Behind:
    """What is behind a screen: the plan of those that it left, with what that plan may know.

    `members` are the distinct candidates that are left; plan and answers speak of places in this list.
    """

    plan: ScoringPlan
    answers: Answers
    members: tuple[int, ...]


class ScreenedPlan:
    """First the pointwise questions, then the plan of `inner` on the candidates that no screen stopped.

    `inner` makes the plan of a sublist of the distinct candidates, given by their indices; its own indices point into
    that sublist. Fewer than two left: nothing is compared.
    """

    def __init__(
        self,
        screen: Screen,
        candidates: Sequence[Candidate],
        judges: Sequence[JudgeSpec],
        inner: Callable[[tuple[int, ...]], ScoringPlan],
    ) -> None:
        self._screen = screen
        self._candidates = tuple(candidates)
        self._judges = tuple(judges)
        self._inner = inner
        self._members: tuple[int, ...] = ()
        self._plan: ScoringPlan | None = None

    def next_round(self, answers: Answers) -> list[Question]:
        """See `ScoringPlan.next_round`."""
        behind = self.behind(answers)
        if behind is None:
            return self._first_round(answers)
        return moved(behind.plan.next_round(behind.answers), behind.members)

    def behind(self, answers: Answers) -> Behind | None:
        """What is behind the screen; None until the pointwise judges are through, and where nothing is compared."""
        if self._first_round(answers):
            return None
        if self._plan is None:
            size = len(self._candidates)
            stopped = self._screen.stopped(self._candidates, answers, self._judges)
            self._members = tuple(index for index in range(size) if index not in stopped)
            compares = any(judge.pairwise and judge.weight > 0 for judge in self._judges)
            if len(self._members) < LEAST_COMPARED or not compares:
                return None
            self._plan = self._inner(self._members)
        return Behind(self._plan, narrowed(answers, self._members), self._members)

    def _first_round(self, answers: Answers) -> list[Question]:
        """The pointwise questions without an answer."""
        size = len(self._candidates)
        if size < LEAST_COMPARED:
            return []
        asked = [judge for judge in self._judges if judge.weight > 0]
        first = [question for judge in asked if not judge.pairwise for question in pointwise(size, judge)]
        return [question for question in first if question not in answers]


def screened_scores(
    stopped: frozenset[int],
    size: int,
    planned: Sequence[Question],
    answers: Answers,
    judges: Sequence[JudgeSpec],
    combine: Combine,
) -> Scores:
    """Scores of the distinct candidates of one pool, of which `stopped` were not compared.

    Those that were compared are scored among themselves, by all judges. One that was stopped has 0 from each pairwise
    judge, and what the pointwise judges said; the rules for missing verdicts hold for its pointwise part. Where fewer
    than two were left to compare, the pairwise judges have no part in any score.
    """
    if not stopped or not any(judge.pairwise for judge in judges):
        return combine(size, planned, answers, judges)
    left = tuple(index for index in range(size) if index not in stopped)
    singly = [judge for judge in judges if not judge.pairwise]
    apart = combine(size, [question for question in planned if question.second is None], answers, singly)
    if len(left) < LEAST_COMPARED:
        return apart
    among = combine(len(left), list(narrowed(dict.fromkeys(planned, 0.0), left)), narrowed(answers, left), judges)
    # Without a pointwise judge nothing is known of them but that they lose.
    scored = any(judge.weight > 0 for judge in singly)
    of_stopped = apart.total if scored else (0.0,) * size
    lost = tuple(score if isinstance(score, Missing) else 0.0 for score in of_stopped)
    place = {index: at for at, index in enumerate(left)}

    def merged(of_left: Sequence[Verdict], of_others: Sequence[Verdict]) -> tuple[Verdict, ...]:
        return tuple(of_left[place[index]] if index in place else of_others[index] for index in range(size))

    asked = [answers[question] for question in dict.fromkeys(planned)]
    return Scores(
        total=merged(among.total, of_stopped),
        by_judge={name: merged(values, apart.by_judge.get(name, lost)) for name, values in among.by_judge.items()},
        questions_asked=len(asked),
        missing_by_reason=dict(Counter(verdict.reason.value for verdict in asked if isinstance(verdict, Missing))),
    )


def narrowed(answers: Answers, members: Sequence[int]) -> Answers:
    """The answers on candidates among `members` alone, with the places in that list as their indices."""
    place: dict[int | None, int | None] = {None: None, **{index: at for at, index in enumerate(members)}}
    kept: Answers = {}
    for question, verdict in answers.items():
        first = place.get(question.first)
        if first is not None and question.second in place:
            kept[question._replace(first=first, second=place[question.second])] = verdict
    return kept


def moved(questions: Sequence[Question], members: Sequence[int]) -> list[Question]:
    """Questions on places in `members`, with the members as their indices."""
    return [
        question._replace(
            first=members[question.first], second=None if question.second is None else members[question.second]
        )
        for question in questions
    ]
