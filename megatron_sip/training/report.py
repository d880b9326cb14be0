"""What a run says while it goes: log line, sinks, sample table, audit log."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_sip.checkpoint.progress import Progress
from megatron_sip.config.groups import Config
from megatron_sip.config.run_config import to_yaml
from megatron_sip.config.validate import notes
from megatron_sip.data.cursor import next_sample
from megatron_sip.metrics.aggregate import StepMetrics
from megatron_sip.metrics.names import STEPS, TIMES, TRAINING, metric_specs
from megatron_sip.metrics.samples import SampleLog
from megatron_sip.metrics.sinks import Sinks, open_sinks
from megatron_sip.parallel.world import World
from megatron_sip.services.build import judge_specs
from megatron_sip.training.audit import OUTCOMES, AuditLog, rollback_record, step_record
from megatron_sip.training.audit_check import ranges_text
from megatron_sip.training.preferences import Preferences
from megatron_sip.training.rollback import Rollback
from megatron_sip.training.step import StepResult
from megatron_sip.training.throughput import Throughput
from megatron_sip.types import NoPair


class Reporter:
    """Reports of one rank. Every rank calls the same methods; only the main rank prints and writes.

    A metric is known on one rank of each model-parallel group (the leader, or the last stage) and is added there
    alone; one reduction over the world adds them up.
    """

    def __init__(self, config: Config, world: World) -> None:
        self.config = config
        self.world = world
        judges = judge_specs(config)
        names, pairwise = [spec.name for spec in judges], [spec.name for spec in judges if spec.pairwise]
        # A run without pairs does not report on pairs.
        ntp = config.training.objective == "ntp"
        self._specs = (*TRAINING, *STEPS, *TIMES) if ntp else metric_specs(names, pairwise)
        self._metrics = StepMetrics(self._specs)
        self._throughput = Throughput(config, world)
        self._pending: list[Callable[[], None]] = []
        self._iterations = 0
        self._seconds = 0.0
        self._sinks: Sinks | None = None
        self._samples: SampleLog | None = None
        self._audit: AuditLog | None = None

    def say(self, text: str) -> None:
        """A line of the main rank."""
        if self.world.is_main:
            print(f"> {text}", flush=True)

    def describe(self, config: Config, skipped: dict[str, int]) -> None:
        """The resolved configuration, once; what it costs; what the corpus leaves out."""
        self.say("resolved configuration:\n" + to_yaml(config).rstrip())
        for note in notes(config):
            self.say(note)
        counted = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in skipped.items())
        self.say(f"left out of each epoch: {counted or 'nothing'}")

    def start(self, progress: Progress) -> None:
        """Open the sinks; what they hold beyond where `progress` stands belongs to steps that will be made again."""
        iteration = progress.iteration
        if self.world.is_main:
            self._audit = self._open_audit(progress)
            self._sinks = open_sinks(
                self.config.logging,
                train_iters=self.config.training.train_iters,
                run_config=asdict(self.config),
                start_iteration=iteration,
                specs=self._specs,
            )
            self._samples = SampleLog(
                self.config.logging.sample_log,
                self._sinks.console,
                interval=self.config.logging.sample_log_interval,
                start_iteration=iteration,
            )

    def _open_audit(self, progress: Progress) -> AuditLog | None:
        """The log at `--audit-log`, or in the folder of `--save`; none where neither is given."""
        path, save = self.config.logging.audit_log, self.config.checkpoint.save
        if path is None and save is not None:
            path = str(Path(save) / "audit.jsonl")
        if path is None:
            return None
        first = next_sample(progress.consumed_samples, progress.jumped)
        return AuditLog(path, iteration=progress.iteration, next_sample=first, jumped=progress.jumped)

    def step(
        self,
        iteration: int,
        consumed_samples: int,
        learning_rate: float,
        preferences: Preferences,
        result: StepResult,
        seconds: float,
    ) -> None:
        """Account for one finished iteration (counted from 1): all ranks meet here, nothing is written yet."""
        self._iterations += 1
        self._seconds += seconds
        self._metrics.add_all(preferences.metrics)
        if result.skipped != "non_finite":  # one nan would hide the mean of a whole interval
            self._metrics.add_all(result.metrics)
        if self.world.is_leader:
            trained = result.skipped != "no_pairs"
            throughput = self._throughput.metrics(preferences.written, preferences.batch, seconds, trained=trained)
            self._metrics.add_all(throughput)
        if self.world.is_main:
            self._add_main(preferences, result)
        self._gather_outcomes(iteration, preferences, result)
        self._gather_samples(iteration, preferences)
        if iteration % self.config.logging.log_interval == 0 or iteration == self.config.training.train_iters:
            self._flush(iteration, consumed_samples, learning_rate)

    def write(self) -> None:
        """Hand to files and console what `step` gathered. It meets no other rank, so it may fail on its own."""
        pending, self._pending = self._pending, []
        for action in pending:
            action()

    def rolled_back(self, done: Rollback) -> None:
        """The run stands at an earlier iteration again; what was gathered beyond it is dropped, the audit log keeps it.

        It meets no other rank, so it may fail on its own.
        """
        self.say(
            f"rolled back from iteration {done.from_iteration} to {done.to_iteration} after {done.reason}; "
            f"samples {ranges_text(done.jumped)} are left out"
        )
        self._pending.clear()
        self._forget_interval()
        if self._audit:
            self._audit.write(rollback_record(done))
        if self._sinks:
            self._sinks.rewind(done.to_iteration)
        if self._samples:
            self._samples.rewind(done.to_iteration)

    def _forget_interval(self) -> None:
        self._metrics.reset()
        self._iterations, self._seconds = 0, 0.0

    def _gather_outcomes(self, iteration: int, preferences: Preferences, result: StepResult) -> None:
        """What became of each sample of the global batch, on the main rank."""
        batch = preferences.batch
        # Leaders know the reasons; what the other ranks of their group send is left out.
        rows = torch.full((batch.rows, 2), -1, dtype=torch.int64)
        if self.world.is_leader:
            rows = torch.stack([batch.sample_index, torch.tensor(_outcomes(preferences))], dim=1)
        parts = [torch.empty_like(rows) for _ in range(self.world.size)] if self.world.is_main else None
        dist.gather(rows, parts, dst=0, group=self.world.control_group)
        audit = self._audit
        if parts is None or audit is None:
            return
        outcomes = {sample: outcome for part in parts for sample, outcome in part.tolist() if sample >= 0}
        record = step_record(iteration, outcomes, result.skipped, result.loss)
        self._pending.append(lambda: audit.write(record))

    def _gather_samples(self, iteration: int, preferences: Preferences) -> None:
        """The pools of all leaders, on the main rank, where samples are logged at all."""
        interval = self.config.logging.sample_log_interval
        shown = interval > 0 and iteration % interval == 0
        if self.config.training.objective == "ntp" or not (shown or self.config.logging.sample_log):
            return
        mine = (preferences.pools, preferences.scores, preferences.pairs, preferences.asked_of)
        parts = [mine] * self.world.size if self.world.is_main else None
        dist.gather_object(mine, parts, dst=0, group=self.world.control_group)
        samples = self._samples
        if parts is None or samples is None:
            return
        pools = [pool for part in parts for pool in part[0]]
        scores = [score for part in parts for score in part[1]]
        pairs = [pair for part in parts for pair in part[2]]
        asked_of = next((part[3] for part in parts if part[3]), {})  # the same on every leader
        self._pending.append(lambda: samples.log(iteration, pools, scores, pairs, asked_of))

    def _add_main(self, preferences: Preferences, result: StepResult) -> None:
        if result.grad_norm is not None and math.isfinite(result.grad_norm):
            self._metrics.add("grad_norm", result.grad_norm)
        self._metrics.add("steps/skipped", float(result.skipped != ""))
        self._metrics.add("steps/nan", float(result.skipped == "non_finite"))
        self._metrics.add("steps/spike", float(result.skipped == "spike"))
        self._metrics.add("steps/without_pair", float(result.skipped == "no_pairs"))
        for part, spent in preferences.seconds.items():
            self._metrics.add(f"time/{part}", spent)
        self._metrics.add("time/reference", result.reference_seconds)
        self._metrics.add("time/train", result.train_seconds)

    def _flush(self, iteration: int, consumed_samples: int, learning_rate: float) -> None:
        """Reduce over all ranks, hand to the sinks, begin anew."""
        values = self._metrics.all_reduce(self.world.control_group).result()
        if self._sinks:
            size = self.config.training.global_batch_size
            general = {
                "consumed_samples": float(consumed_samples),
                "elapsed_ms": 1000 * self._seconds / self._iterations,
                "learning_rate": learning_rate,
                "global_batch_size": float(size),
            }
            sinks = self._sinks
            self._pending.append(lambda: sinks.log(iteration, {**general, **values}))
        self._forget_interval()

    def close(self) -> None:
        """Flush and close the sinks."""
        with ExitStack() as closing:
            for file in (self._audit, self._samples, self._sinks):
                if file:
                    closing.callback(file.close)


def _outcomes(preferences: Preferences) -> list[int]:
    """Of each row of the batch the place in OUTCOMES, on a leader."""
    if not preferences.pairs:  # plain pretraining trains every row
        return [0] * preferences.batch.rows
    return [OUTCOMES.index(pair.reason) if isinstance(pair, NoPair) else 0 for pair in preferences.pairs]
