"""From the rollouts and rewrites of some cuts to scores: their pools, what is asked in which round, what it means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from megatron_sip.config.groups import Config
from megatron_sip.data.tokenizer import Tokenizer
from megatron_sip.metrics.aggregate import SumCount
from megatron_sip.metrics.position import fitted_bias, position_metrics
from megatron_sip.preference.adaptive import adaptive_settings
from megatron_sip.preference.combine import combine
from megatron_sip.preference.curriculum import apply_bonus, score_bonus
from megatron_sip.preference.fitted import scores_for
from megatron_sip.preference.pool import build_pool
from megatron_sip.preference.rounds import next_rounds
from megatron_sip.preference.scoring import JudgeSpec, ScoringPlan, distinct, distinct_pool, plan_scoring
from megatron_sip.preference.screen import Screen, ScreenedPlan, screened_scores
from megatron_sip.preference.select import needs_scores
from megatron_sip.rollout.engine import Rollouts
from megatron_sip.types import Answers, Candidate, Cut, Missing, Pool, Question, Scores


@dataclass(frozen=True)
class Scored:
    """Pools of some cuts in their order, and of each pool what became of it.

    absent   the candidates that could not be made
    scores   None where the objective asks no judge
    answers  every verdict that was asked for
    stopped  how many distinct candidates a screen kept from being compared
    """

    pools: list[Pool]
    absent: list[list[Missing]]
    scores: list[Scores | None]
    answers: list[Answers]
    stopped: list[int]


def joined(parts: Sequence[Scored]) -> Scored:
    """The parts of one batch in their order, as if they had been scored together."""
    return Scored(
        pools=[pool for part in parts for pool in part.pools],
        absent=[missing for part in parts for missing in part.absent],
        scores=[scores for part in parts for scores in part.scores],
        answers=[answers for part in parts for answers in part.answers],
        stopped=[count for part in parts for count in part.stopped],
    )


def make_pools(
    config: Config,
    tokenizer: Tokenizer,
    cuts: Sequence[Cut],
    rollouts: Rollouts | None,
    rewrites: Sequence[str | Missing] | None,
) -> tuple[list[Pool], list[list[Missing]]]:
    """Of each cut its pool and what is missing from it; rollouts and rewrites, where there are any, are of each cut."""
    members = config.preference.pool if needs_scores(config.training.objective) else ("rewrite", "rollout")
    pools, absent = [], []
    for index, cut in enumerate(cuts):
        rows = [rollouts.row(index, k) for k in range(rollouts.tokens.shape[1])] if rollouts else []
        rewrite = None if rewrites is None else rewrites[index]
        pool, missing = build_pool(cut, members, rows, rewrite, config.data.suffix_length, tokenizer)
        pools.append(pool)
        absent.append(missing)
    return pools, absent


class PoolScoring:
    """The rounds of some pools of one iteration (`services.rounds.Rounds`); what it does depends on its answers alone.

    `judges` are those of the iteration; an objective that asks none has no rounds and no scores.
    """

    def __init__(
        self,
        config: Config,
        judges: Sequence[JudgeSpec],
        iteration: int,
        pools: list[Pool],
        absent: list[list[Missing]],
    ) -> None:
        self._config, self._judges, self._iteration = config, judges, iteration
        self.pools, self._absent = pools, absent
        preference = config.preference
        self._screen = Screen(preference.screen_safety_below, preference.screen_repetition_above)
        self._asks = needs_scores(config.training.objective)
        self._plans = [self._plan(pool) for pool in pools] if self._asks else []

    def next(self, answers: Sequence[Answers]) -> list[list[Question]]:
        """See `Rounds.next`."""
        return next_rounds(self._plans, answers) if self._asks else []

    def result(self, answers: list[Answers]) -> Scored:
        """The scores by these answers."""
        stopped = [self._stopped(pool, given) for pool, given in zip(self.pools, answers, strict=True)]
        scores: list[Scores | None] = [None] * len(self.pools)
        if self._asks:
            scores = [
                self._combined(pool, given, out) for pool, given, out in zip(self.pools, answers, stopped, strict=True)
            ]
        return Scored(self.pools, self._absent, scores, answers, [len(out) for out in stopped])

    def _plan(self, pool: Pool) -> ScoringPlan:
        preference = self._config.preference

        def plan(candidates: Sequence[Candidate]) -> ScoringPlan:
            return plan_scoring(
                preference.scoring,
                candidates,
                distinct(candidates),
                self._judges,
                seed=self._config.training.seed,
                sample_index=pool.sample_index,
                adaptive=adaptive_settings(preference),
                bonus=[score_bonus(preference, candidate.kind, self._iteration) for candidate in candidates],
            )

        if not self._screen:
            return plan(pool.candidates)
        unique = distinct_pool(pool).candidates
        return ScreenedPlan(self._screen, unique, self._judges, lambda members: plan([unique[at] for at in members]))

    def _stopped(self, pool: Pool, answers: Answers) -> frozenset[int]:
        """The distinct candidates of a pool that a screen kept from being compared."""
        if not self._screen or not any(judge.pairwise for judge in self._judges):
            return frozenset()
        return self._screen.stopped(distinct_pool(pool).candidates, answers, self._judges)

    def _combined(self, pool: Pool, answers: Answers, stopped: frozenset[int]) -> Scores:
        """Verdicts of the distinct candidates to scores of the whole pool."""
        unique = distinct(pool.candidates)
        planned: list[Question] = list(answers)
        preference = self._config.preference
        combined = partial(
            combine,
            min_answered_fraction=preference.min_answered_fraction,
            pairwise_scores=scores_for(preference.scoring),
        )
        scores = screened_scores(stopped, len(unique), planned, answers, self._judges, combined)
        return apply_bonus(unique.spread(scores), pool, preference, self._iteration)


def verdict_metrics(config: Config, scored: Scored, judges: Sequence[JudgeSpec]) -> dict[str, SumCount]:
    """(sum, count) of what the verdicts of a batch tell of judges and screens; nothing where no judge is asked."""
    if not needs_scores(config.training.objective):
        return {}
    screened = float(sum(scored.stopped))
    metrics = {**position_metrics(scored.answers), "candidates/screened": (screened, float(len(scored.pools)))}
    if config.preference.scoring == "adaptive":
        metrics |= fitted_bias([len(distinct(pool.candidates)) for pool in scored.pools], scored.answers, judges)
    return metrics
