"""Who is asked about whom, in rounds: scoring plans (paper section 3). Pure and seeded; no server is known here.

A plan speaks of the *distinct* candidates of a pool: candidates with identical tokens are judged once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Protocol

from megatron_sip.config.groups import ScoringMethod
from megatron_sip.preference.adaptive import AdaptivePlan, AdaptiveSettings
from megatron_sip.preference.draw import Purpose, draw_index
from megatron_sip.preference.spec import JudgeSpec
from megatron_sip.types import Answers, Candidate, CandidateKind, Pool, Question, Scores, Verdict


@dataclass(frozen=True)
class Distinct:
    """The candidates of a pool without repetition.

    `members[d]` is the pool index of distinct candidate d (its first appearance); `of_candidate[i]` is
    the distinct index of pool candidate i.
    """

    members: tuple[int, ...]
    of_candidate: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.members)

    def spread(self, scores: Scores) -> Scores:
        """Scores of the distinct candidates to scores of the whole pool: copies share one score."""

        def over_pool(values: Sequence[Verdict]) -> tuple[Verdict, ...]:
            return tuple(values[index] for index in self.of_candidate)

        return Scores(
            total=over_pool(scores.total),
            by_judge={name: over_pool(values) for name, values in scores.by_judge.items()},
            questions_asked=scores.questions_asked,
            missing_by_reason=dict(scores.missing_by_reason),
        )


def distinct(candidates: Sequence[Candidate]) -> Distinct:
    """Group candidates with identical tokens, in order of first appearance."""
    seen: dict[tuple[int, ...], int] = {}
    members: list[int] = []
    of_candidate: list[int] = []
    for index, candidate in enumerate(candidates):
        if candidate.tokens not in seen:
            seen[candidate.tokens] = len(members)
            members.append(index)
        of_candidate.append(seen[candidate.tokens])
    return Distinct(tuple(members), tuple(of_candidate))


def distinct_pool(pool: Pool) -> Pool:
    """`pool` with each token sequence once, which is what question indices speak of."""
    members = distinct(pool.candidates).members
    return replace(pool, candidates=tuple(pool.candidates[member] for member in members))


class ScoringPlan(Protocol):
    """Questions in rounds: the next round may depend on the answers of those before."""

    def next_round(self, answers: Answers) -> list[Question]:
        """Questions to ask now; empty when the plan is done.

        `answers` holds a verdict or a `Missing` for every question of the rounds before. A question that
        was answered is not asked again.
        """
        ...


@dataclass(frozen=True)
class OneRound:
    """A plan whose questions do not depend on any answer."""

    questions: tuple[Question, ...]

    def next_round(self, answers: Answers) -> list[Question]:
        """All questions at first, nothing afterwards."""
        return [question for question in self.questions if question not in answers]


def _ask_pair(i: int, j: int, judge: JudgeSpec, seed: int, sample_index: int) -> list[Question]:
    """The questions on one unordered pair; one seeded order for all votes, so that prompts share their start."""
    first, second = (i, j) if i < j else (j, i)
    orders = [(first, second), (second, first)]
    if not judge.both_orders:
        orders = [orders[draw_index(2, seed, Purpose.OPTION_ORDER, sample_index, first, second)]]
    return [Question(judge.name, a, b, vote) for a, b in orders for vote in range(judge.votes)]


def pointwise(num_distinct: int, judge: JudgeSpec) -> list[Question]:
    """`votes` questions on each candidate."""
    return [Question(judge.name, i, None, vote) for i in range(num_distinct) for vote in range(judge.votes)]


def all_pairs(num_distinct: int, judge: JudgeSpec, *, seed: int, sample_index: int) -> list[Question]:
    """Every unordered pair once per vote (paper section 3: C(16, 2) = 120 pairs), in a seeded option order."""
    pairs = combinations(range(num_distinct), 2)
    return [question for i, j in pairs for question in _ask_pair(i, j, judge, seed, sample_index)]


def against_pivot(num_distinct: int, judge: JudgeSpec, *, pivot: int, seed: int, sample_index: int) -> list[Question]:
    """Every other candidate against one pivot: the paper's cheap and lossy baseline."""
    others = (i for i in range(num_distinct) if i != pivot)
    return [question for i in others for question in _ask_pair(i, pivot, judge, seed, sample_index)]


def choose_pivot(candidates: Sequence[Candidate], unique: Distinct, *, seed: int, sample_index: int) -> int:
    """The distinct index of the pivot: the original where it competes, else a seeded draw."""
    for index, candidate in enumerate(candidates):
        if candidate.kind is CandidateKind.ORIGINAL:
            return unique.of_candidate[index]
    return draw_index(len(unique), seed, Purpose.PIVOT, sample_index)


def plan_scoring(
    method: ScoringMethod,
    candidates: Sequence[Candidate],
    unique: Distinct,
    judges: Sequence[JudgeSpec],
    *,
    seed: int,
    sample_index: int,
    adaptive: AdaptiveSettings | None = None,
    bonus: Sequence[float] = (),
) -> ScoringPlan:
    """The plan for one pool. Judges of weight 0 are not asked; one candidate alone is not asked about at all.

    `adaptive` are the settings of the method of that name (default its defaults); it looks for best and worst of
    the totals that have the `bonus` of each candidate (default none) in them.
    """
    size = len(unique)
    if size < 2:
        return OneRound(())
    if method == "adaptive":
        asked = tuple(judge for judge in judges if judge.weight > 0)
        single = tuple(question for judge in asked if not judge.pairwise for question in pointwise(size, judge))
        # Copies share a place in the plan. The first has the bonus if any has: rollouts, which have none, come last.
        extra = tuple(bonus[index] for index in unique.members) if any(bonus) else ()
        return AdaptivePlan(size, asked, single, adaptive or AdaptiveSettings(), seed, sample_index, extra)
    pairs: Callable[[JudgeSpec], list[Question]]
    if method == "pivot":
        pivot = choose_pivot(candidates, unique, seed=seed, sample_index=sample_index)

        def pairs(judge: JudgeSpec) -> list[Question]:
            return against_pivot(size, judge, pivot=pivot, seed=seed, sample_index=sample_index)
    else:

        def pairs(judge: JudgeSpec) -> list[Question]:
            return all_pairs(size, judge, seed=seed, sample_index=sample_index)

    questions: list[Question] = []
    for judge in judges:
        if judge.weight > 0:
            questions += pairs(judge) if judge.pairwise else pointwise(size, judge)
    return OneRound(tuple(questions))
