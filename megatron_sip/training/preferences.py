"""From cuts to a batch of preference pairs: rollouts, rewrites, verdicts, selection.

Every rank of a model-parallel group calls `make` with the same cuts. All ranks write rollouts; the leader
alone has texts, asks the servers and selects; the others receive the finished batch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from megatron_sip.config.groups import Config
from megatron_sip.data.tokenizer import Tokenizer
from megatron_sip.metrics.aggregate import SumCount, pool_metrics
from megatron_sip.metrics.position import fitted_bias, position_metrics
from megatron_sip.parallel.leader import Leader
from megatron_sip.parallel.world import World
from megatron_sip.preference.adaptive import adaptive_settings
from megatron_sip.preference.collate import collate, ntp_batch
from megatron_sip.preference.combine import combine
from megatron_sip.preference.curriculum import active_rollouts, apply_bonus, score_bonus
from megatron_sip.preference.fitted import scores_for
from megatron_sip.preference.pool import build_pool
from megatron_sip.preference.rounds import next_rounds
from megatron_sip.preference.scoring import JudgeSpec, ScoringPlan, distinct, plan_scoring
from megatron_sip.preference.screen import Screen, ScreenedPlan, screened_scores
from megatron_sip.preference.select import choose, needs_scores
from megatron_sip.rollout.engine import RolloutEngine, Rollouts, Sampling
from megatron_sip.services.build import needs_rewriter
from megatron_sip.services.hub import PreferenceServices, distinct_pool
from megatron_sip.services.rewriter import RewriteRequest
from megatron_sip.training.faults import Boundaries
from megatron_sip.training.judged import JudgeWatch
from megatron_sip.types import (
    Answers,
    Candidate,
    CandidateKind,
    Cut,
    Missing,
    NoPair,
    Pair,
    Pool,
    PreferenceBatch,
    Question,
    Scores,
)


@dataclass(frozen=True)
class Preferences:
    """One step's batch and, on leaders, what led to it.

    `metrics` holds (sum, count) by name and is empty off the leaders; `seconds` by part is there on all ranks.
    `asked_of` tells who scored and in which words, for the sample log.
    """

    batch: PreferenceBatch
    pools: list[Pool] = field(default_factory=list)
    scores: list[Scores | None] = field(default_factory=list)
    pairs: list[Pair | NoPair] = field(default_factory=list)
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    asked_of: dict[str, dict[str, str]] = field(default_factory=dict)


class BatchMaker(Protocol):
    """Turns the cuts of one iteration into rows to train on."""

    def prefetch(self, cuts: Sequence[Cut], iteration: int) -> None:
        """Start what a coming iteration will need and what depends on its documents alone."""
        ...

    def make(self, cuts: Sequence[Cut], iteration: int) -> Preferences:
        """The rows of this iteration; called by all ranks."""
        ...

    def forget(self) -> None:
        """Drop what was prefetched: the iterations to come are about other cuts."""
        ...

    def close(self) -> None:
        """Leave nothing running."""
        ...


class NextTokenMaker:
    """Plain pretraining: every cut is one row of next-token prediction."""

    def __init__(self, config: Config, world: World) -> None:
        self.multiple = world.tp_size if config.parallel.sequence_parallel else 1

    def prefetch(self, cuts: Sequence[Cut], iteration: int) -> None:
        """Nothing is asked of anybody."""

    def make(self, cuts: Sequence[Cut], iteration: int) -> Preferences:  # noqa: ARG002  # the protocol's
        """Prefix and suffix as one row."""
        return Preferences(batch=ntp_batch(cuts, self.multiple))

    def forget(self) -> None:
        """Nothing was asked of anybody."""

    def close(self) -> None:
        """Nothing is running."""


class PreferenceMaker:
    """Makes the preference pairs of one step. `services` is None on ranks that are no leader."""

    def __init__(
        self,
        config: Config,
        world: World,
        leader: Leader,
        boundaries: Boundaries,
        tokenizer: Tokenizer,
        engine: RolloutEngine,
        services: PreferenceServices | None,
    ) -> None:
        self.config = config
        self.world = world
        self.leader = leader
        self.boundaries = boundaries
        self.tokenizer = tokenizer
        self.engine = engine
        self.services = services
        preference = config.preference
        self._screen = Screen(preference.screen_safety_below, preference.screen_repetition_above)
        self._watch = JudgeWatch(config, leader)
        self._rewrites: dict[int, Future[list[str | Missing]]] = {}
        self._counted: dict[str, float] = {}

    def prefetch(self, cuts: Sequence[Cut], iteration: int) -> None:
        """Ask for the rewrites of a coming iteration, which depend on the documents alone."""
        due = needs_rewriter(self.config) and iteration % self.config.rewriter.rewrite_interval == 0
        if self.services is None or not due or iteration in self._rewrites:
            return
        requests = []
        for cut in cuts:
            prefix, suffix = cut.prefix.tolist(), cut.suffix.tolist()
            texts = self.tokenizer.prefix_text(prefix), self.tokenizer.candidate_text(prefix, suffix)
            requests.append(RewriteRequest(cut.sample_index, suffix, *texts))
        longest = self.config.rewriter.rewriter_max_tokens or 2 * self.config.data.suffix_length
        self._rewrites[iteration] = self.services.submit_rewrites(requests, longest)

    def make(self, cuts: Sequence[Cut], iteration: int) -> Preferences:
        """The batch of this iteration.

        Raises:
            SipError: a server cannot be used at all, or too many verdicts are missing; on all ranks alike.
            StopRequestedError: a rank was asked to stop, and the step is not finished.
        """
        stage, where = self.boundaries.stage, (iteration + 1, (cuts[0].sample_index, cuts[-1].sample_index))
        started = time.perf_counter()
        with stage("rollout", *where):
            self.prefetch(cuts, iteration)
            rollouts = self._write_rollouts(cuts, iteration)
        rolled = time.perf_counter()
        with stage("rewrite", *where):
            rewrites = self.leader.wait(self._rewrites.pop(iteration, None), self._trouble)
        rewritten = time.perf_counter()
        with stage("judge", *where):
            pools, absent = self._pools(cuts, rollouts, rewrites)
            scores, verdicts = self._score(pools, iteration)
            self._watch.check(cuts, self.services, [] if rewrites is None else _lost_rewrites(pools, absent))
        pairs = [
            choose(self.config.training.objective, pool, own, self.config.training.seed)
            for pool, own in zip(pools, scores, strict=True)
        ]
        judged = time.perf_counter()
        multiple = self.world.tp_size if self.config.parallel.sequence_parallel else 1
        mine = collate(list(zip(cuts, pairs, strict=True)), width_multiple=multiple) if self.services else None
        return Preferences(
            batch=self.leader.tell(mine),
            pools=pools,
            scores=scores,
            pairs=pairs,
            metrics={
                **self._metrics(pools, scores, pairs, absent),
                **verdicts,
                **(rollouts.metrics if rollouts and self.services else {}),
            },
            seconds={
                "rollout": rolled - started,
                "rewrite_wait": rewritten - rolled,
                "judge_wait": judged - rewritten,
            },
            asked_of=self.services.asked_of() if self.services else {},
        )

    def _trouble(self) -> str | None:
        """What the services wait for, on a leader."""
        return None if self.services is None else self.services.waits_for()

    def forget(self) -> None:
        """Let go of the rewrites that are on their way."""
        for future in self._rewrites.values():
            future.cancel()
        self._rewrites.clear()

    def close(self) -> None:
        """Close the rollout engine; the services belong to others."""
        self.engine.close()

    def _metrics(
        self,
        pools: Sequence[Pool],
        scores: Sequence[Scores | None],
        pairs: Sequence[Pair | NoPair],
        absent: Sequence[Sequence[Missing]],
    ) -> dict[str, tuple[float, float]]:
        """What is known of the pools, on the leader; nothing elsewhere, so that nothing is counted twice."""
        if self.services is None:
            return {}
        missing = float(sum(len(item) for item in absent))
        stats = self.services.stats()
        trims = stats.get("judge_prompt_trims", 0.0) + stats.get("rewriter_prompt_trims", 0.0)
        return {
            **pool_metrics(pools, scores, pairs),
            "candidates/missing": (missing, float(len(pools))),
            "judge/prompts_trimmed": (self._fresh("trims", trims), float(len(pools))),
            "judge/from_journal": (self._fresh("journal", stats["from_journal"]), float(len(pools))),
            "judge/from_cache": (self._fresh("cache", stats["from_cache"]), float(len(pools))),
        }

    def _fresh(self, name: str, total: float) -> float:
        """What a running total has gained since the last call, by prefetched rewrites too."""
        fresh = total - self._counted.get(name, 0.0)
        self._counted[name] = total
        return fresh

    def _write_rollouts(self, cuts: Sequence[Cut], iteration: int) -> Rollouts | None:
        count = active_rollouts(self.config.preference, self.config.rollout, iteration)
        if self.config.training.objective == "sft-rewrite" or count == 0:
            return None
        if needs_scores(self.config.training.objective) and "rollout" not in self.config.preference.pool:
            return None
        if not needs_scores(self.config.training.objective):
            count = 1  # nothing chooses among rollouts, so one is what the baseline trains on
        sampling = Sampling(
            num_rollouts=count,
            max_new_tokens=self.config.data.suffix_length,
            temperature=self.config.rollout.temperature,
            top_p=self.config.rollout.top_p,
            eod=self.tokenizer.eod,
            stop_at_eod=self.config.rollout.rollout_stop_at_eod,
            seed=self.config.training.seed,
        )
        return self.engine.generate([cut.prefix for cut in cuts], [cut.sample_index for cut in cuts], sampling)

    def _pools(
        self, cuts: Sequence[Cut], rollouts: Rollouts | None, rewrites: list[str | Missing] | None
    ) -> tuple[list[Pool], list[list[Missing]]]:
        """Pools of all cuts, on the leader; nothing elsewhere."""
        if self.services is None:
            return [], []
        objective = self.config.training.objective
        members = self.config.preference.pool if needs_scores(objective) else ("rewrite", "rollout")
        pools, absent = [], []
        for index, cut in enumerate(cuts):
            rows = [rollouts.row(index, k) for k in range(rollouts.tokens.shape[1])] if rollouts else []
            rewrite = None if rewrites is None else rewrites[index]
            pool, missing = build_pool(cut, members, rows, rewrite, self.config.data.suffix_length, self.tokenizer)
            pools.append(pool)
            absent.append(missing)
        return pools, absent

    def _score(self, pools: Sequence[Pool], iteration: int) -> tuple[list[Scores | None], dict[str, SumCount]]:
        """Ask the judges in the rounds of the scoring plan; all ranks wait together.

        The scores, and metrics of the verdicts they rest on; both empty off the leaders.
        """
        if not needs_scores(self.config.training.objective):
            return [None] * len(pools), {}
        judges = self.services.judges(iteration) if self.services else []
        plans = [self._plan(pool, judges, iteration) for pool in pools]
        answers: list[Answers] = [{} for _ in pools]
        while True:
            questions = next_rounds(plans, answers)
            if not self.leader.any(any(questions)):
                break
            future = self.services.submit_answers(pools, questions) if self.services else None
            answered = self.leader.wait(future, self._trouble)
            for given, fresh in zip(answers, answered or [], strict=True):
                given.update(fresh)
        stopped = [self._stopped(pool, given, judges) for pool, given in zip(pools, answers, strict=True)]
        scores: list[Scores | None] = [
            self._combined(pool, given, judges, out, iteration)
            for pool, given, out in zip(pools, answers, stopped, strict=True)
        ]
        if self.services is None:
            return scores, {}
        screened = float(sum(len(out) for out in stopped))
        metrics = {**position_metrics(answers), "candidates/screened": (screened, float(len(pools)))}
        if self.config.preference.scoring == "adaptive":
            metrics |= fitted_bias([len(distinct(pool.candidates)) for pool in pools], answers, judges)
        return scores, metrics

    def _plan(self, pool: Pool, judges: Sequence[JudgeSpec], iteration: int) -> ScoringPlan:
        def plan(candidates: Sequence[Candidate]) -> ScoringPlan:
            return plan_scoring(
                self.config.preference.scoring,
                candidates,
                distinct(candidates),
                judges,
                seed=self.config.training.seed,
                sample_index=pool.sample_index,
                adaptive=adaptive_settings(self.config.preference),
                bonus=[score_bonus(self.config.preference, candidate.kind, iteration) for candidate in candidates],
            )

        if not self._screen:
            return plan(pool.candidates)
        unique = distinct_pool(pool).candidates
        return ScreenedPlan(self._screen, unique, judges, lambda members: plan([unique[index] for index in members]))

    def _stopped(self, pool: Pool, answers: Answers, judges: Sequence[JudgeSpec]) -> frozenset[int]:
        """The distinct candidates of a pool that a screen kept from being compared."""
        if not self._screen or not any(judge.pairwise for judge in judges):
            return frozenset()
        return self._screen.stopped(distinct_pool(pool).candidates, answers, judges)

    def _combined(
        self, pool: Pool, answers: Answers, judges: Sequence[JudgeSpec], stopped: frozenset[int], iteration: int
    ) -> Scores:
        """Verdicts of the distinct candidates to scores of the whole pool."""
        unique = distinct(pool.candidates)
        planned: list[Question] = list(answers)
        preference = self.config.preference
        combined = partial(
            combine,
            min_answered_fraction=preference.min_answered_fraction,
            pairwise_scores=scores_for(preference.scoring),
        )
        scores = screened_scores(stopped, len(unique), planned, answers, judges, combined)
        return apply_bonus(unique.spread(scores), pool, preference, iteration)


def _lost_rewrites(pools: Sequence[Pool], absent: Sequence[Sequence[Missing]]) -> list[Missing | None]:
    """Of each pool for which a rewrite was asked why it has none; None where it has one."""
    # What is missing stands in the order of the pool, in which only the original, never missing, is before the rewrite.
    return [
        None if any(candidate.kind is CandidateKind.REWRITE for candidate in pool.candidates) else missing[0]
        for pool, missing in zip(pools, absent, strict=True)
    ]
