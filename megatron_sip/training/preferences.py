"""From cuts to a batch of preference pairs: rollouts, rewrites, verdicts, selection.

Every rank of a model-parallel group makes the same calls with the same cuts. All ranks write rollouts; the leader
alone has texts, asks the servers and selects; the others receive the finished batch. What is asked about a wave of
rollouts leaves as soon as the wave is written, and is answered in the background.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from megatron_sip.config.groups import Config
from megatron_sip.cost.done import DoneWork
from megatron_sip.data.tokenizer import Tokenizer
from megatron_sip.metrics.aggregate import pool_metrics
from megatron_sip.parallel.leader import Leader
from megatron_sip.parallel.world import World
from megatron_sip.preference.collate import collate, ntp_batch
from megatron_sip.preference.curriculum import active_rollouts
from megatron_sip.preference.scoring import JudgeSpec
from megatron_sip.preference.select import choose, needs_scores
from megatron_sip.rollout.engine import OnWave, RolloutEngine, Rollouts, Sampling
from megatron_sip.rollout.pending import PendingBatch
from megatron_sip.services.build import needs_rewriter
from megatron_sip.services.hub import PreferenceServices, Role
from megatron_sip.services.rewriter import RewriteRequest
from megatron_sip.services.rounds import Rewrites
from megatron_sip.training.faults import Boundaries
from megatron_sip.training.judged import JudgeWatch
from megatron_sip.training.scoring import PoolScoring, Scored, joined, make_pools, verdict_metrics
from megatron_sip.training.writing import Writing
from megatron_sip.types import CandidateKind, Cut, Missing, NoPair, Pair, Pool, PreferenceBatch, Scores


@dataclass(frozen=True)
class BegunBatch:
    """A batch between its rollouts and its pairs.

    `rollouts` is None where the iteration writes none. Leaders alone have futures: `rewrites`, where they were asked
    for, and `scored`, with a part for each wave of rollouts. `spared` counts for what of both nobody had to be asked.
    """

    cuts: Sequence[Cut]
    iteration: int
    rollouts: Rollouts | None = None
    rewrites: Future[Rewrites] | None = None
    scored: Future[list[Scored]] | None = None
    spared: Counter[str] = field(default_factory=Counter)

    @property
    def samples(self) -> tuple[int, int]:
        """First and last global sample index."""
        return self.cuts[0].sample_index, self.cuts[-1].sample_index

    @property
    def pending(self) -> PendingBatch | None:
        """What only the weights that are there now can write; None where nothing was written."""
        if self.rollouts is None:
            return None
        return PendingBatch(tuple(cut.sample_index for cut in self.cuts), self.rollouts)

    def cancel(self) -> None:
        """Give up what is asked about it."""
        for future in (self.rewrites, self.scored):
            if future is not None:
                future.cancel()


@dataclass(frozen=True)
class Preferences:
    """One step's batch and, on leaders, what led to it.

    `metrics` holds (sum, count) by name and is empty off the leaders; `seconds` by part is there on all ranks, as is
    `written`, the work of the rollouts that the step wrote.
    `asked_of` tells who scored and in which words, for the sample log.
    """

    batch: PreferenceBatch
    pools: list[Pool] = field(default_factory=list)
    scores: list[Scores | None] = field(default_factory=list)
    pairs: list[Pair | NoPair] = field(default_factory=list)
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    asked_of: dict[str, dict[str, str]] = field(default_factory=dict)
    written: DoneWork = DoneWork()  # noqa: RUF009  # it is frozen


class BatchMaker(Protocol):
    """Turns the cuts of one iteration into rows to train on; all ranks make the same calls."""

    def prefetch(self, cuts: Sequence[Cut], iteration: int) -> None:
        """Start what a coming iteration will need and what depends on its documents alone."""
        ...

    def begin(self, cuts: Sequence[Cut], iteration: int, written: Rollouts | None = None) -> BegunBatch:
        """Write the rollouts of this iteration, unless they are `written`, and ask about them without waiting."""
        ...

    def finish(self, batch: BegunBatch) -> Preferences:
        """The rows of a batch that was begun; waits for what was asked about it."""
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

    def begin(self, cuts: Sequence[Cut], iteration: int, written: Rollouts | None = None) -> BegunBatch:  # noqa: ARG002  # the protocol's
        """Nothing is written."""
        return BegunBatch(cuts, iteration)

    def finish(self, batch: BegunBatch) -> Preferences:
        """Prefix and suffix as one row."""
        return Preferences(batch=ntp_batch(batch.cuts, self.multiple))

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
        self._watch = JudgeWatch(config, leader)
        self._rewrites: dict[int, Future[Rewrites]] = {}
        self._spared: defaultdict[int, Counter[str]] = defaultdict(Counter)
        self._trims = 0.0
        self._writing = Writing()

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
        self._rewrites[iteration] = self.services.submit_rewrites(requests, longest, self._spared[iteration])

    def begin(self, cuts: Sequence[Cut], iteration: int, written: Rollouts | None = None) -> BegunBatch:
        """Write the rollouts of this iteration; the questions of each wave leave while the next one is written.

        `written` are rollouts of these cuts by earlier weights. They are taken if they are as many and as long as this
        iteration wants.

        Raises:
            StopRequestedError: a rank was asked to stop, and the step is not finished; on all ranks alike.
        """
        started = time.perf_counter()
        waves: dict[int, Future[Scored]] = {}
        with self.boundaries.stage("rollout", iteration + 1, (cuts[0].sample_index, cuts[-1].sample_index)):
            self.prefetch(cuts, iteration)
            rewrites, spared = self._rewrites.pop(iteration, None), self._spared.pop(iteration, Counter())
            ask = partial(self._ask, waves, cuts, iteration, rewrites, spared)
            rollouts = self._write_rollouts(cuts, iteration, written, ask)
            if rollouts is None:
                ask(0, None)
        self._writing = self._writing.and_then(time.perf_counter() - started, rollouts)
        # The waves may have come in any order.
        scored = None if self.services is None else self.services.all_of([waves[first] for first in sorted(waves)])
        return BegunBatch(cuts, iteration, rollouts, rewrites, scored, spared)

    def _ask(
        self,
        waves: dict[int, Future[Scored]],
        cuts: Sequence[Cut],
        iteration: int,
        rewrites: Future[Rewrites] | None,
        spared: Counter[str],
        first: int,
        rollouts: Rollouts | None,
    ) -> None:
        """On the leader, ask about the wave that begins at `first`, or where nothing was written about all cuts."""
        if self.services is None:
            return
        wave = cuts if rollouts is None else cuts[first : first + len(rollouts.tokens)]
        judges = self._judges(iteration)

        def begin(texts: Rewrites | None) -> PoolScoring:
            own = None if texts is None else texts[first : first + len(wave)]
            pools, absent = make_pools(self.config, self.tokenizer, wave, rollouts, own)
            return PoolScoring(self.config, judges, iteration, pools, absent)

        waves[first] = self.services.submit_rounds(begin, rewrites, spared)

    def finish(self, batch: BegunBatch) -> Preferences:
        """The pairs of a batch; what is waited for is waited for by all ranks together.

        Raises:
            SipError: a server cannot be used at all, or too many verdicts are missing; on all ranks alike.
            StopRequestedError: a rank was asked to stop, and the step is not finished.
        """
        stage, where = self.boundaries.stage, (batch.iteration + 1, batch.samples)
        started = time.perf_counter()
        with stage("rewrite", *where):
            rewrites = self.leader.wait(batch.rewrites, partial(self._trouble, "rewriter"))
        rewritten = time.perf_counter()
        with stage("judge", *where):
            parts = self.leader.wait(batch.scored, partial(self._trouble, "judge"))
            scored = joined([] if parts is None else parts)
            lost = [] if rewrites is None else _lost_rewrites(scored.pools, scored.absent)
            self._watch.check(batch.cuts, self.services, scored.answers, lost)
        objective, seed = self.config.training.objective, self.config.training.seed
        pairs = [choose(objective, pool, own, seed) for pool, own in zip(scored.pools, scored.scores, strict=True)]
        judged = time.perf_counter()
        multiple = self.world.tp_size if self.config.parallel.sequence_parallel else 1
        items = list(zip(batch.cuts, pairs, strict=True)) if self.services else []
        mine = collate(items, width_multiple=multiple) if self.services else None
        writing, self._writing = self._writing, Writing()
        return Preferences(
            batch=self.leader.tell(mine),
            pools=scored.pools,
            scores=scored.scores,
            pairs=pairs,
            metrics={**self._metrics(scored, pairs, batch), **(writing.metrics if self.services else {})},
            seconds={
                "rollout": writing.seconds,
                "rewrite_wait": rewritten - started,
                "judge_wait": judged - rewritten,
            },
            asked_of=self.services.asked_of() if self.services else {},
            written=writing.work,
        )

    def _judges(self, iteration: int) -> list[JudgeSpec]:
        """Who scores in this iteration, on the leader."""
        if self.services is None or not needs_scores(self.config.training.objective):
            return []
        return self.services.judges(iteration)

    def _trouble(self, role: Role) -> str | None:
        """What the judges or the rewriter wait for, on a leader. Rewrites that are fetched ahead hold up no verdict."""
        return None if self.services is None else self.services.waits_for(role)

    def forget(self) -> None:
        """Let go of the rewrites that are on their way."""
        for future in self._rewrites.values():
            future.cancel()
        self._rewrites.clear()
        self._spared.clear()

    def close(self) -> None:
        """Close the rollout engine; the services belong to others."""
        self.engine.close()

    def _metrics(
        self, scored: Scored, pairs: Sequence[Pair | NoPair], batch: BegunBatch
    ) -> dict[str, tuple[float, float]]:
        """What is known of the pools, on the leader; nothing elsewhere, so that nothing is counted twice."""
        if self.services is None:
            return {}
        pools, missing = float(len(scored.pools)), float(sum(len(item) for item in scored.absent))
        stats = self.services.stats()
        # Of batches under way too: a server does not know for whom it trims.
        before, self._trims = self._trims, stats.get("judge_prompt_trims", 0) + stats.get("rewriter_prompt_trims", 0)
        return {
            **pool_metrics(scored.pools, scored.scores, pairs),
            "candidates/missing": (missing, pools),
            "judge/prompts_trimmed": (self._trims - before, pools),
            "judge/from_journal": (float(batch.spared["from_journal"]), pools),
            "judge/from_cache": (float(batch.spared["from_cache"]), pools),
            **verdict_metrics(self.config, scored, self._judges(batch.iteration)),
        }

    def _write_rollouts(
        self, cuts: Sequence[Cut], iteration: int, written: Rollouts | None, on_wave: OnWave
    ) -> Rollouts | None:
        """The rollouts of this iteration, which `on_wave` hears of; None where it writes none."""
        sampling = self._sampling(iteration)
        if sampling is None:
            return None
        prefixes, samples = [cut.prefix for cut in cuts], [cut.sample_index for cut in cuts]
        if written is None or written.tokens.shape[1:] != (sampling.num_rollouts, sampling.max_new_tokens):
            return self.engine.generate(prefixes, samples, sampling, on_wave)
        size = self.config.rollout.rollout_batch_size or len(cuts)
        for first in range(0, len(cuts), size):
            wave = slice(first, first + size)
            on_wave(first, Rollouts(written.tokens[wave], written.lengths[wave]))
        return written

    def _sampling(self, iteration: int) -> Sampling | None:
        """How the rollouts of this iteration are drawn; None where it has none."""
        count = active_rollouts(self.config.preference, self.config.rollout, iteration)
        if self.config.training.objective == "sft-rewrite" or count == 0:
            return None
        if needs_scores(self.config.training.objective) and "rollout" not in self.config.preference.pool:
            return None
        if not needs_scores(self.config.training.objective):
            count = 1  # nothing chooses among rollouts, so one is what the baseline trains on
        return Sampling(
            num_rollouts=count,
            max_new_tokens=self.config.data.suffix_length,
            temperature=self.config.rollout.temperature,
            top_p=self.config.rollout.top_p,
            eod=self.tokenizer.eod,
            stop_at_eod=self.config.rollout.rollout_stop_at_eod,
            seed=self.config.training.seed,
        )


def _lost_rewrites(pools: Sequence[Pool], absent: Sequence[Sequence[Missing]]) -> list[Missing | None]:
    """Of each pool for which a rewrite was asked why it has none; None where it has one."""
    # What is missing stands in the order of the pool, in which only the original, never missing, is before the rewrite.
    return [
        None if any(candidate.kind is CandidateKind.REWRITE for candidate in pool.candidates) else missing[0]
        for pool, missing in zip(pools, absent, strict=True)
    ]
