"""An adaptive scoring plan: few parallel rounds, and votes where best and worst of the pool are still in doubt.

Round 1 asks every pointwise judge, and the pairwise ones about pairs spread evenly over the pool. Each later round
fits a Bradley-Terry model to what was answered (`bradley_terry.py`), finds the pairs on which best and worst hang,
and asks about these (`design.py`). Best and worst are those of the weighted sum over all judges. Pure: a round is a
function of seed, sample index and answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_sip.config.groups import PreferenceConfig
from megatron_sip.preference.bradley_terry import Array, Counts, Mask, Posterior, fit, sigmoid
from megatron_sip.preference.combine import leavers_of, mean_scores
from megatron_sip.preference.design import choose, doubts
from megatron_sip.preference.draw import Purpose, generator
from megatron_sip.preference.fitted import prior_of, tally_of
from megatron_sip.preference.spec import JudgeSpec
from megatron_sip.types import Answers, Question

CALLS_PER_CANDIDATE = 8
_DRAWS = 128
_SILENT = 3
"""A candidate with so many questions and no answer is not asked about again, where others are answered."""
_CHUNK = 64
"""Pools that are planned in one piece; more would only leave the processor's cache."""


@dataclass(frozen=True)
class AdaptiveSettings:
    """How much an adaptive plan may ask.

    `budget` counts calls of each pairwise judge for one pool (None: 8 for each distinct candidate), `rounds` the
    times that answers are waited for. An end of the pool is clear when its candidate is the best (or worst) with
    posterior probability `confidence`. `min_answered_fraction` as in `combine`.
    """

    rounds: int = PreferenceConfig.adaptive_rounds
    budget: int | None = PreferenceConfig.adaptive_budget
    confidence: float = PreferenceConfig.adaptive_confidence
    min_answered_fraction: float = PreferenceConfig.min_answered_fraction

    def edges(self, size: int, judge: JudgeSpec) -> list[int]:
        """Calls of `judge` in all after each round for a pool of `size`, from 0 to the budget.

        A round of fewer calls than candidates is not worth its latency, so that small pools have fewer rounds.
        """
        capacity = size * (size - 1) * judge.repeats
        budget = min(CALLS_PER_CANDIDATE * size if self.budget is None else self.budget, capacity)
        rounds = max(1, min(self.rounds, budget // size))
        return [budget * done // rounds for done in range(rounds + 1)]


def adaptive_settings(preference: PreferenceConfig) -> AdaptiveSettings:
    """The settings of --adaptive-rounds and its kind."""
    return AdaptiveSettings(
        rounds=preference.adaptive_rounds,
        budget=preference.adaptive_budget,
        confidence=preference.adaptive_confidence,
        min_answered_fraction=preference.min_answered_fraction,
    )


@dataclass(frozen=True)
class AdaptivePlan:
    """The adaptive plan of one pool of `size` distinct candidates; a `ScoringPlan`.

    `judges` are those of weight above 0. `pointwise` are the questions to pointwise judges, all asked in round 1.
    `bonus` is what each candidate's total has beside its scores (empty: nothing).
    """

    size: int
    judges: tuple[JudgeSpec, ...]
    pointwise: tuple[Question, ...]
    settings: AdaptiveSettings
    seed: int
    sample_index: int
    bonus: tuple[float, ...] = ()

    def next_round(self, answers: Answers) -> list[Question]:
        """The questions of the next round; empty when best and worst are clear or the budget is spent."""
        return plan_together([self], [answers])[0]


def plan_together(plans: Sequence[AdaptivePlan], answers: Sequence[Answers]) -> list[list[Question]]:
    """The next round of many plans; like asking each, but pools of equal size are worked out together."""
    groups: dict[object, list[int]] = {}
    for index, plan in enumerate(plans):
        groups.setdefault((plan.size, plan.judges, plan.settings, any(plan.bonus)), []).append(index)
    questions: list[list[Question]] = [[] for _ in plans]
    for members in groups.values():
        for start in range(0, len(members), _CHUNK):
            part = members[start : start + _CHUNK]
            planned = _Group([plans[index] for index in part], [answers[index] for index in part]).questions()
            for index, own in zip(part, planned, strict=True):
                questions[index] = own
    return questions


class _Group:
    """Plans that differ in seed, sample index, answers and size of a bonus only.

    Arrays are `[pools, ...]`, candidates n.
    """

    def __init__(self, plans: Sequence[AdaptivePlan], answers: Sequence[Answers]) -> None:
        self.plans = plans
        self.answers = answers
        self.size = plans[0].size
        self.settings = plans[0].settings
        self.bonus = np.array([plan.bonus or (0.0,) * self.size for plan in plans])
        self.single = [judge for judge in plans[0].judges if not judge.pairwise]
        self.pairwise = [judge for judge in plans[0].judges if judge.pairwise]
        self.asked = [_asked(self.size, judge, answers) for judge in self.pairwise]
        self.tallies = [tally_of(self.size, judge, answers) for judge in self.pairwise]

    def questions(self) -> list[list[Question]]:
        """The next questions of every pool."""
        found = [
            [question for question in plan.pointwise if question not in given]
            for plan, given in zip(self.plans, self.answers, strict=True)
        ]
        due = [self._due(judge, asked) for judge, asked in zip(self.pairwise, self.asked, strict=True)]
        if not any((calls > 0).any() for calls, _ in due):
            return found
        posteriors = [fit(tally, prior_of(judge)) for judge, tally in zip(self.pairwise, self.tallies, strict=True)]
        offsets = self._offsets()
        weight = self._weight(posteriors, offsets)
        for number, (judge, (calls, done)) in enumerate(zip(self.pairwise, due, strict=True)):
            picked = choose(
                posteriors[number],
                self.tallies[number],
                # Round 1 knows nothing, and all pairs matter alike.
                np.where((done == 0)[:, None, None], 1.0 - np.eye(self.size), weight),
                self._open(number, judge, np.isneginf(offsets)),
                calls,
                self._noise(number, done),
                prior_of(judge).answer_sd ** -2,
            )
            for pool, own in enumerate(picked):
                found[pool] += _as_questions(judge, own, self.asked[number][pool])
        return found

    def _due(self, judge: JudgeSpec, asked: Array) -> tuple[Counts, Counts]:
        """`[pools]` calls of the coming round and rounds done; a plan whose last round came short has no more."""
        edges = np.array(self.settings.edges(self.size, judge))
        last = len(edges) - 1
        total = asked.reshape(len(asked), -1).sum(axis=1).astype(np.int64)
        done = np.searchsorted(edges, total)
        going = (done < last) & (edges[np.minimum(done, last)] == total)
        return np.where(going, edges[np.minimum(done + 1, last)] - total, 0), done

    def _offsets(self) -> Array:
        """`[pools, n]`: bonus and weighted sum of the pointwise scores so far.

        -inf for who has left by a pointwise judge, or about whom no pairwise judge answers.
        """
        offsets = self.bonus.copy()
        everyone = frozenset(range(self.size))
        for pool, given in enumerate(self.answers):
            for judge in self.single if given else ():
                verdicts = {question: verdict for question, verdict in given.items() if question.judge == judge.name}
                for index, score in enumerate(mean_scores(self.size, judge, verdicts, everyone)):
                    offsets[pool, index] += judge.weight * (score or 0.0)
                gone = leavers_of(self.size, judge, verdicts, self.settings.min_answered_fraction)
                offsets[pool, list(gone)] = -np.inf
        for asked, tally in zip(self.asked, self.tallies, strict=True):
            times = asked.sum(axis=1) + asked.sum(axis=2)
            answered = tally.answered.sum(axis=1) + tally.answered.sum(axis=2)
            lively = answered.sum(axis=1) > 0.5 * times.sum(axis=1)
            offsets[(times >= _SILENT) & (answered == 0) & lively[:, None]] = -np.inf
        return offsets

    def _weight(self, posteriors: Sequence[Posterior], offsets: Array) -> Array:
        """`[pools, n, n]`: the contrasts that best and worst of the total hang on."""
        draws = [posterior.draws(self._normals(number)) for number, posterior in enumerate(posteriors)]
        totals = np.repeat(offsets[:, None, :], _DRAWS, axis=1)
        if len(draws) == 1 and not self.single and not self.bonus.any():
            totals += draws[0]  # win rates rise with utilities, so that the order is the same
        else:
            present = (~np.isneginf(offsets)).astype(np.float64)
            for judge, own in zip(self.pairwise, draws, strict=True):
                totals += judge.weight * _win_rates(own, present)
        return doubts(totals, self.settings.confidence).weight

    def _open(self, number: int, judge: JudgeSpec, out: Mask) -> Array:
        """`[pools, n, n]`: how often each question may still be asked.

        Answers count against the cap; one question more may be asked in place of those that were not answered.
        """
        asked, answered = self.asked[number], self.tallies[number].answered
        left = np.minimum(judge.repeats - answered, judge.repeats + (asked > answered) - asked)
        left[:, np.arange(self.size), np.arange(self.size)] = 0
        left[np.logical_or(out[:, :, None], out[:, None, :])] = 0
        return left

    def _noise(self, number: int, done: Counts) -> Array:
        streams = [
            generator(plan.seed, Purpose.ADAPTIVE_TIES, plan.sample_index, number, at)
            for plan, at in zip(self.plans, done.tolist(), strict=True)
        ]
        return np.stack([stream.random((self.size, self.size)) for stream in streams])

    def _normals(self, number: int) -> Array:
        totals = self.asked[number].reshape(len(self.plans), -1).sum(axis=1).astype(np.int64).tolist()
        streams = [
            generator(plan.seed, Purpose.ADAPTIVE_DRAWS, plan.sample_index, number, total)
            for plan, total in zip(self.plans, totals, strict=True)
        ]
        return np.stack([stream.standard_normal((_DRAWS, self.size + 1)) for stream in streams])


def _asked(size: int, judge: JudgeSpec, answers: Sequence[Answers]) -> Array:
    """`[pools, n, n]`: how often each question was asked, answered or not."""
    asked = np.zeros((len(answers), size, size))
    for pool, given in enumerate(answers):
        for name, first, second, _ in given:
            if name == judge.name and second is not None:
                asked[pool, first, second] += 1
    return asked


def _as_questions(judge: JudgeSpec, picked: Counts, asked: Array) -> list[Question]:
    """The questions of one pool with their next vote numbers, in the order of the first candidate."""
    questions = []
    for first, second in np.argwhere(picked).tolist():
        start = int(asked[first, second])
        questions += [Question(judge.name, first, second, start + vote) for vote in range(int(picked[first, second]))]
    return questions


def _win_rates(draws: Array, present: Array) -> Array:
    """`[pools, draws, n]`: mean P(i beats j) over the others that are present, for utilities `draws`."""
    beats = sigmoid(draws[..., :, None] - draws[..., None, :]) @ present[:, None, :, None]
    others = np.maximum(present.sum(axis=1, keepdims=True) - present, 1.0)
    return np.asarray((beats[..., 0] - 0.5 * present[:, None, :]) / others[:, None, :])
