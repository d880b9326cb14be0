"""Scoring plans against simulated judges: how much of the margin a plan finds, for how many calls and rounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import TypeAlias

import numpy as np

from megatron_sip.evaluation.simulated_judge import SimulatedJudge
from megatron_sip.preference.adaptive import AdaptivePlan, AdaptiveSettings, plan_together
from megatron_sip.preference.bradley_terry import AnswerKind, Array, fit
from megatron_sip.preference.combine import combine, mean_scores
from megatron_sip.preference.draw import Purpose, generator
from megatron_sip.preference.fitted import FittedScores, mean_win_rates, prior_of, tally_of
from megatron_sip.preference.scoring import against_pivot
from megatron_sip.preference.spec import JudgeSpec
from megatron_sip.types import Answers, Missing, Question

QUALITY = JudgeSpec("quality", pairwise=True, weight=1.0)
_FRACTION = 0.5
_CHUNK = 64


@dataclass(frozen=True)
class Outcome:
    """What a plan found: true margins, calls and rounds of each pool (`[pools]`), and the mean fitted bias."""

    margins: Array
    calls: Array
    rounds: Array
    bias: float | None = None


Plan: TypeAlias = Callable[[SimulatedJudge], Outcome]


def spec_for(judge: SimulatedJudge, repeats: int = QUALITY.repeats) -> JudgeSpec:
    """What the configuration would say of such a judge: how it answers, and how often it is worth asking again."""
    model = judge.model
    same = model.repeats_itself or model.probabilities
    answers: AnswerKind = "probabilities" if model.probabilities else "votes"
    return JudgeSpec("quality", pairwise=True, weight=1.0, answers=answers, repeats=1 if same else repeats)


def adaptive(settings: AdaptiveSettings, repeats: int = QUALITY.repeats) -> Plan:
    """The adaptive plan and its scores, as the trainer runs them."""

    def run(judge: SimulatedJudge) -> Outcome:
        spec = spec_for(judge, repeats)
        plans = [AdaptivePlan(judge.size, (spec,), (), settings, judge.seed, pool) for pool in range(judge.pools)]
        answers: list[Answers] = [{} for _ in plans]
        rounds = np.zeros(judge.pools)
        while any(questions := plan_together(plans, answers)):
            for pool, asked in enumerate(questions):
                answers[pool].update(judge.answer(pool, asked))
                rounds[pool] += bool(asked)
        return _scored(judge, spec, answers, rounds, fitted=True)

    return run


def every_pair(votes: int) -> Plan:
    """Each pair so many times in one round, in one drawn option order; scores are means (the paper's way)."""

    def run(judge: SimulatedJudge) -> Outcome:
        best, worst = np.zeros((2, judge.pools), dtype=np.int64)
        upper = np.triu(np.ones((judge.size, judge.size), dtype=bool), 1)
        for pool in range(judge.pools):
            draws = generator(judge.seed, Purpose.SIMULATED_JUDGE, pool, 5)
            ahead = draws.random((judge.size, judge.size)) < 0.5
            asked = (upper & ahead) | (upper & ~ahead).T
            verdicts = np.where(asked, judge.verdicts(pool, votes), np.nan)
            both = np.concatenate([verdicts, 1.0 - verdicts.transpose(0, 2, 1)])
            answered = ~np.isnan(both)
            scores = np.where(answered, both, 0.0).sum(axis=(0, 2)) / np.maximum(answered.sum(axis=(0, 2)), 1)
            best[pool], worst[pool] = _ends(scores, judge, pool)
        calls = np.full(judge.pools, float(votes * upper.sum()))
        return Outcome(judge.margins(best, worst), calls, np.ones(judge.pools))

    return run


def pivot() -> Plan:
    """Each candidate against the first one, once."""

    def questions(judge: SimulatedJudge, pool: int) -> list[Question]:
        return against_pivot(judge.size, QUALITY, pivot=0, seed=judge.seed, sample_index=pool)

    return _one_round(questions, fitted=False)


def random_pairs(calls: int) -> Plan:
    """`calls` pairs drawn by seed in one round, each as often as any other within one; fitted scores."""

    def questions(judge: SimulatedJudge, pool: int) -> list[Question]:
        draws = generator(judge.seed, Purpose.SIMULATED_JUDGE, pool, 2)
        pairs = list(combinations(range(judge.size), 2))
        order: list[int] = []
        while len(order) < calls:
            order += draws.permutation(len(pairs)).tolist()
        swapped = draws.random(calls) < 0.5
        asked = []
        for place, index in enumerate(order[:calls]):
            first, second = pairs[index][:: -1 if swapped[place] else 1]
            asked.append(Question("quality", first, second, place // len(pairs)))
        return asked

    return _one_round(questions, fitted=True)


def knockout() -> Plan:
    """A knockout for the best, then one among those who lost their first game for the worst; one vote a game."""

    def run(judge: SimulatedJudge) -> Outcome:
        best, worst = np.zeros((2, judge.pools), dtype=np.int64)
        calls, rounds = np.zeros(judge.pools), np.zeros(judge.pools)
        for pool in range(judge.pools):
            draws = generator(judge.seed, Purpose.SIMULATED_JUDGE, pool, 3)
            winners: list[int] = draws.permutation(judge.size).tolist()
            losers: list[int] = []
            while len(winners) > 1:
                beaten, winners = _games(judge, pool, winners, calls, keep_winner=True)
                losers = losers or beaten
                rounds[pool] += 1
            best[pool] = winners[0]
            while len(losers) > 1:
                _, losers = _games(judge, pool, losers, calls, keep_winner=False)
            worst[pool] = losers[0]
        return Outcome(judge.margins(best, worst), calls, rounds)

    return run


def _games(
    judge: SimulatedJudge, pool: int, players: list[int], calls: Array, keep_winner: bool
) -> tuple[list[int], list[int]]:
    """Play neighbours; who is dropped, who is kept. An odd player passes. A game without an answer goes by place."""
    pairs = [Question("quality", *players[at : at + 2]) for at in range(0, len(players) - 1, 2)]
    answers = judge.answer(pool, pairs)
    dropped, kept = [], players[len(pairs) * 2 :]
    for question, verdict in answers.items():
        sides = [question.first, int(question.second or 0)]
        first_won = isinstance(verdict, Missing) or verdict > 0.5
        winner, loser = sides if first_won else sides[::-1]
        kept.append(winner if keep_winner else loser)
        dropped.append(loser if keep_winner else winner)
    calls[pool] += len(pairs)
    return dropped, kept


def _one_round(questions: Callable[[SimulatedJudge, int], list[Question]], fitted: bool) -> Plan:
    def run(judge: SimulatedJudge) -> Outcome:
        answers = [judge.answer(pool, questions(judge, pool)) for pool in range(judge.pools)]
        return _scored(judge, spec_for(judge), answers, np.ones(judge.pools), fitted)

    return run


def _scored(judge: SimulatedJudge, spec: JudgeSpec, answers: list[Answers], rounds: Array, fitted: bool) -> Outcome:
    """Best and worst by the scores of `combine`."""
    best, worst = np.zeros((2, judge.pools), dtype=np.int64)
    for start in range(0, judge.pools, _CHUNK):
        part = answers[start : start + _CHUNK]
        whole = fitted and not judge.model.missing
        scores = _fitted_whole(judge, spec, part) if whole else _combined(judge, spec, part, fitted)
        for place, own in enumerate(scores):
            best[start + place], worst[start + place] = _ends(own, judge, start + place)
    calls = np.array([float(len(given)) for given in answers])
    return Outcome(judge.margins(best, worst), calls, rounds)


def _combined(judge: SimulatedJudge, spec: JudgeSpec, answers: list[Answers], fitted: bool) -> Array:
    """`[pools, n]` totals; NaN for a candidate without a score."""
    scorer = FittedScores() if fitted else mean_scores
    found = [combine(judge.size, list(given), given, [spec], _FRACTION, scorer).total for given in answers]
    return np.array([[np.nan if isinstance(score, Missing) else score for score in total] for total in found])


def _fitted_whole(judge: SimulatedJudge, spec: JudgeSpec, answers: list[Answers]) -> Array:
    """What `_combined` gives where every question was answered and everybody was asked about, all pools at once."""
    tally = tally_of(judge.size, spec, answers)
    return mean_win_rates(fit(tally, prior_of(spec)), np.ones((len(answers), judge.size)))


def _ends(scores: Array, judge: SimulatedJudge, pool: int) -> tuple[int, int]:
    """Highest and lowest score; ties are broken by seed, and a candidate without a score is neither."""
    jitter = 1e-9 * generator(judge.seed, Purpose.SIMULATED_JUDGE, pool, 4).random(judge.size)
    values = jitter if np.isnan(scores).all() else scores + jitter
    return int(np.nanargmax(values)), int(np.nanargmin(values))


def share(outcome: Outcome, reference: Outcome) -> tuple[float, float]:
    """Mean margin as a share of the reference's, and its standard error over pools (a ratio of paired means)."""
    ratio = outcome.margins.mean() / reference.margins.mean()
    residual = outcome.margins - ratio * reference.margins
    spread = residual.std(ddof=1) / np.sqrt(len(residual)) / reference.margins.mean()
    return float(ratio), float(spread)
