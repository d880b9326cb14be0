"""An arm that makes steps with the product's own code; alone, or as the ranks of torchrun.

python tools/bench/step_sip.py SPEC.json SOCKET

What makes pairs of cuts (`PreferenceMaker` over `MegatronEngine`) and what trains on them (`PolicyTrainer`) are those
of a run; only the judge is scripted. Orders are {"kind": "step" | "save" | "prefix", ...}, see `answer`.
"""

from __future__ import annotations

import resource
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_sip.checkpoint.lock import SaveLock
from megatron_sip.checkpoint.progress import Progress
from megatron_sip.config.groups import (
    CheckpointConfig,
    Config,
    DataConfig,
    JudgeConfig,
    ParallelConfig,
    RolloutConfig,
    TrainingConfig,
)
from megatron_sip.config.presets import with_preset
from megatron_sip.cost.sizes import model_sizes
from megatron_sip.data.tokenizer import Tokenizer
from megatron_sip.errors import SipError
from megatron_sip.parallel import world as world_module
from megatron_sip.parallel.leader import Leader
from megatron_sip.preference.collate import collate
from megatron_sip.training.faults import Boundaries, start_watch
from megatron_sip.training.overlap import Overlap, lag_of
from megatron_sip.training.preferences import BegunBatch, PreferenceMaker
from megatron_sip.types import Candidate, CandidateKind, Cut, Pair, PreferenceBatch
from tools.bench.arm import Line, Order, Reply, mean_of
from tools.bench.matmul import synchronize
from tools.bench.scripted_judge import ScriptedServices
from tools.bench.step_inputs import random_cuts
from tools.bench.step_spec import Point, Spec

_DAY = 86400
"""Seconds; an arm waits for its turn, which is no hang."""


def config_of(spec: Spec, point: Point) -> Config:
    """The settings of a run that makes steps of this size."""
    model = with_preset(spec.model)
    return Config(
        model=model,
        parallel=ParallelConfig(
            tensor_model_parallel_size=spec.tensor,
            pipeline_model_parallel_size=spec.pipeline,
            sequence_parallel=spec.sequence_parallel,
            stage_timeout=(str(_DAY),),
        ),
        data=DataConfig(seq_length=point.prefix + point.suffix, suffix_length=point.suffix),
        training=TrainingConfig(
            micro_batch_size=spec.micro_batch_size or point.batch,
            global_batch_size=point.batch,
            train_iters=10**6,
            shared_prefix=spec.shared_prefix,
            bf16=spec.dtype == "bf16",
            num_threads=spec.threads,
            seed=spec.seed,
        ),
        rollout=RolloutConfig(
            num_rollouts=point.rollouts,
            rollout_batch_size=spec.rollout_batch_size,
            rollout_pipeline_groups=spec.rollout_pipeline_groups,
            rollout_cuda_graph=spec.rollout_cuda_graph,
        ),
        judge=JudgeConfig(quality_weight=0.0, classifier_weight=1.0, judge_lag=spec.judge_lag),
        checkpoint=CheckpointConfig(save=spec.save, keep_last_n=1),
    )


class Marks:
    """The moments of a step at which one of its parts ends, after the device has done what was asked of it.

    They are set where the loop of a run has its own boundaries, which are there too.
    """

    def __init__(self, boundaries: Boundaries) -> None:
        self._boundaries = boundaries
        self.times: list[float] = []

    def mark(self) -> None:
        """A part ends here."""
        synchronize()
        self.times.append(time.perf_counter())

    def before_pass(self) -> None:
        """Of the reference or of the policy."""
        self._boundaries.before("train")
        self.mark()

    @contextmanager
    def updating(self) -> Iterator[None]:
        """Around the update."""
        self._boundaries.before("optimizer")
        self.mark()
        yield
        self.mark()


class SipStep:
    """One rank of the policy with its trainer, and the steps that it makes."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        config = config_of(spec, Point(prefix=2, suffix=1, rollouts=1, batch=1))
        self.watch = start_watch(config)
        self.world = world_module.start(config)
        from megatron_sip.model.build import build_policy
        from megatron_sip.training.step import PolicyTrainer

        self.leader, self.boundaries = Leader(self.world, self.watch), Boundaries(self.world, self.watch)
        self.tokenizer = Tokenizer(spec.tokenizer)
        self.trainer = PolicyTrainer(build_policy(config, self.world), config, self.world)
        self.vocab_size = model_sizes(spec.model).vocab_size
        self.services = ScriptedServices(config, spec.seed) if self.world.is_leader else None
        if self.services:
            self.services.start()

    def use(self, point: Point, shared_prefix: bool | None = None) -> None:
        """Be ready for steps of this size."""
        from megatron_sip.rollout.megatron import MegatronEngine
        from megatron_sip.rollout.wave_plan import WaveLimits

        config = config_of(self.spec, point)
        if shared_prefix is not None:
            config = replace(config, training=replace(config.training, shared_prefix=shared_prefix))
        engine = MegatronEngine(
            self.trainer.policy,
            self.world,
            WaveLimits(config.rollout.rollout_batch_size),
            at_boundary=lambda: self.boundaries.before("rollout"),
            groups=config.rollout.rollout_pipeline_groups,
            cuda_graph=config.rollout.rollout_cuda_graph,
        )
        if self.services:
            self.services.take(point.judge_seconds, point.batch * (point.rollouts + 1))
        self.trainer.config = config
        self.maker = PreferenceMaker(
            config, self.world, self.leader, self.boundaries, self.tokenizer, engine, self.services
        )

    def begin(self, point: Point, number: int) -> BegunBatch:
        """The rollouts of a step, and its questions on their way."""
        return self.maker.begin(random_cuts(point, self.vocab_size, number, self.spec.seed), number)

    def step(self, point: Point, number: int, overlap: Overlap[BegunBatch]) -> Reply:
        """One whole step as the loop makes it, and the seconds of its parts."""
        synchronize()
        started = time.perf_counter()
        for coming in overlap.due(number):
            overlap.add(coming, self.begin(point, coming))
        self.trainer.expect_batch()
        preferences = self.maker.finish(overlap.take(number))
        parts = {name: preferences.seconds[name] for name in ("rollout", "judge_wait")}
        parts |= self.train(preferences.batch)
        seconds = time.perf_counter() - started
        parts["other"] = seconds - sum(parts.values())
        return {"seconds": seconds, "parts": parts, "memory_gib": self.peak_memory()}

    def steps(self, point: Point, first: int, count: int) -> list[Reply]:
        """So many steps in a row.

        With a judge lag one more step goes before them, which is not timed: the judge shall be at work on the first
        of them as it is on those behind it.
        """
        lag = lag_of(self.trainer.config)
        overlap: Overlap[BegunBatch] = Overlap(lag, first + count + lag)
        replies = [self.step(point, number, overlap) for number in range(first - lag, first + count)]
        overlap.forget()
        return replies[lag:]

    def train(self, batch: PreferenceBatch) -> dict[str, float]:
        """Reference, forward and backward, and update on one batch; seconds of each.

        Raises:
            SipError: the trainer made no update.
        """
        marks = Marks(self.boundaries)
        self.trainer.before_pass = marks.before_pass
        self.trainer.before_micro_batch = self.boundaries.before_micro_batch
        marks.mark()
        with self.boundaries.stage("train", 1, (0, batch.rows - 1)):
            result = self.trainer.step(batch, marks.updating)
        if result.skipped:
            raise SipError(f"a step was skipped ({result.skipped}), so that it cannot be timed")
        began, _, reference, train, updated = marks.times
        return {"reference": reference - began, "train": train - reference, "optimizer": updated - train}

    def compare_prefix(self, point: Point, number: int, shared_first: bool) -> Reply:
        """Seconds of reference and training on the same pairs with the prefix shared, and with two rows a pair."""
        multiple = self.spec.tensor if self.spec.sequence_parallel else 1
        batch = pairs_of(random_cuts(point, self.vocab_size, number, self.spec.seed), multiple)
        reply: Reply = {}
        for shared in (shared_first, not shared_first):
            self.use(point, shared)
            seconds = self.train(batch)
            reply["shared" if shared else "unshared"] = {name: seconds[name] for name in ("reference", "train")}
        return reply

    def save(self, number: int) -> Reply:
        """Seconds of a checkpoint, until it is durable."""
        from megatron_sip.checkpoint.writer import CheckpointWriter

        writer = CheckpointWriter(self.trainer.config, self.world, lambda _text: None, SaveLock(None, print))
        writer.prepare()
        synchronize()
        started = time.perf_counter()
        writer.save(self.trainer, Progress(number, number, {}))
        return {"seconds": time.perf_counter() - started}

    def peak_memory(self) -> float:
        """Most memory that a rank ever held, in GiB: of its GPU where there is one, else of the host."""
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        if torch.cuda.is_available():
            own = float(torch.cuda.max_memory_allocated()) / 2**30
        box = torch.tensor(own, dtype=torch.float64)
        dist.all_reduce(box, op=dist.ReduceOp.MAX, group=self.world.control_group)
        return float(box)

    def answer(self, order: Order) -> Reply:
        """Do what is ordered.

        {"kind": "step", "point", "first_step", "steps"}: the mean of so many steps in a row
        {"kind": "prefix", "point", "first_step", "shared_first"}: `compare_prefix`
        {"kind": "save", "first_step"}: `save`
        """
        number = order["first_step"]
        if order["kind"] == "save":
            return self.save(number)
        point = Point(**order["point"])
        self.use(point)
        if order["kind"] == "prefix":
            return self.compare_prefix(point, number, order["shared_first"])
        return mean_of(self.steps(point, number, order["steps"]))

    def serve(self, path: str) -> None:
        """Take orders on the main rank and obey them on all; the others wait in a collective of the control group."""
        line = Line.to(path) if self.world.is_main else None
        orders = line.read() if line else iter(())
        while True:
            box = [next(orders, None)]
            dist.broadcast_object_list(box, src=0, group=self.world.control_group)
            if box[0] is None:
                break
            reply = self.answer(box[0])
            if line:
                line.write(reply)


def pairs_of(cuts: list[Cut], width_multiple: int) -> PreferenceBatch:
    """The suffix of each cut over that of the next one, turned round."""
    rows = []
    for cut, other in zip(cuts, [*cuts[1:], cuts[0]], strict=True):
        chosen = Candidate(CandidateKind.ORIGINAL, tuple(cut.suffix.tolist()), "")
        rejected = Candidate(CandidateKind.ROLLOUT, tuple(other.suffix.tolist()[::-1]), "", 0)
        rows.append((cut, Pair(chosen, rejected)))
    return collate(rows, width_multiple=width_multiple)


def run_arm(spec_file: str, path: str) -> None:
    """Make the steps that are ordered."""
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
    arm = SipStep(Spec.from_json(Path(spec_file).read_text()))
    with arm.watch:
        arm.serve(path)
        if arm.services:
            arm.services.close()
        world_module.stop()


if __name__ == "__main__":
    run_arm(*sys.argv[1:])
