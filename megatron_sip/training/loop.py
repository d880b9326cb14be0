"""Self-Improving Pretraining (arXiv 2601.21343, section 2), as a loop.

Cuts of documents, rollouts of the policy, verdicts on all candidates, a preference pair a cut, one update;
then the next cuts. With `--judge-lag 1` the verdicts on the next cuts are awaited by nobody while this update is made.
What only plumbing needs is behind a name in its own room.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from megatron_sip.checkpoint.agree import from_main
from megatron_sip.checkpoint.lock import SaveLock
from megatron_sip.checkpoint.writer import CheckpointWriter
from megatron_sip.config.groups import Config
from megatron_sip.config.validate import validate
from megatron_sip.parallel import world as world_module
from megatron_sip.parallel.leader import Leader, StopRequestedError
from megatron_sip.parallel.watch import StageWatch
from megatron_sip.parallel.world import World
from megatron_sip.services.hub import PreferenceServices
from megatron_sip.training import assemble
from megatron_sip.training.course import Course
from megatron_sip.training.faults import Boundaries, start_watch
from megatron_sip.training.journal import JournalKeeper
from megatron_sip.training.overlap import Overlap, lag_of
from megatron_sip.training.preferences import BegunBatch
from megatron_sip.training.report import Reporter
from megatron_sip.training.restart import continued, note_found
from megatron_sip.training.trace import StepTracer
from megatron_sip.training.upcoming import Upcoming
from megatron_sip.types import Cut


def pretrain(config: Config) -> None:
    """Run the training that `config` describes on the ranks that were launched.

    What ends it otherwise than well is printed here, on one rank, and told to the others, before it is raised.

    Raises:
        SipError: something that the user can mend, on all ranks alike.
    """
    with start_watch(config) as watch:
        run: Run | None = None
        try:
            run = Run(config, world_module.start(config, watch.join), watch)
            run.assemble()
            run.train()
        except BaseException as error:
            watch.tell(error)
            raise
        finally:
            try:
                if run:
                    run.close()
            finally:
                if not watch.broken:
                    world_module.stop()


class Run:
    """One run on one rank: what was assembled, where it stands, and the loop over it."""

    def __init__(self, config: Config, world: World, watch: StageWatch) -> None:
        self.config, self.world, self.watch = config, world, watch
        self.leader = Leader(world, watch)
        self.boundaries = Boundaries(world, watch)
        self.services: PreferenceServices | None = None
        self.reporter: Reporter | None = None
        self._opened = ExitStack()
        save = config.checkpoint.save
        self.lock = SaveLock(Path(save) if save and world.is_main else None, _say)

    def assemble(self) -> None:
        """Open and build everything; all ranks do each step together, so that what fails on one is told by all."""
        together, world = self.leader.together, self.world
        from_main(world, self.lock.acquire)  # before anything there is put in order
        start = from_main(world, lambda: continued(self.config, _say))
        self.config = start.config
        self.data = together(lambda: assemble.open_data(self.config))
        self.config = together(lambda: assemble.with_model(self.config, self.data.tokenizer))
        together(lambda: validate(self.config, world.size))
        self.reporter = reporter = Reporter(self.config, world)
        reporter.describe(self.config, self.data.stream.skipped())
        writer = CheckpointWriter(self.config, world, reporter.say, self.lock)
        writer.prepare()
        from_main(world, lambda: note_found(self.config))
        # Servers first: a refused key shall not cost the time that a large model takes to load.
        self.services = together(lambda: assemble.connect_services(self.config, world))
        # With collectives inside: a rank that fails there could not tell the others in one of them; the watch does.
        self.trainer = assemble.build_trainer(self.config, world)
        self.trainer.before_pass = lambda: self.boundaries.before("train")
        self.trainer.before_micro_batch = self.boundaries.before_micro_batch
        with self.watch.stage("load"):
            progress = assemble.load_checkpoint(
                *(self.config, world, self.trainer, self.data.stream, reporter.say, self.watch.feed),
                named=start.named,
                among=start.among,
            )
            behind = from_main(world, lambda: start.behind(progress.iteration))
        together(lambda: reporter.start(progress))
        journal = JournalKeeper(self.config.checkpoint, self.leader, self.services, reporter.say)
        with self.watch.stage("load"):
            journal.open(progress)
        self.course = Course(
            self.config, self.leader, self.trainer, self.data.stream, writer, journal, progress, behind
        )
        self.maker = assemble.build_maker(
            *(self.config, world, self.leader, self.boundaries, self.data.tokenizer, self.trainer.policy),
            *(self.services, reporter.say),
        )
        self._opened.callback(self.maker.close)
        self.tracer = StepTracer(self.config, world.rank)
        together(lambda: self.tracer.prepare(progress.iteration))
        self._opened.callback(self.tracer.write)
        self.upcoming = Upcoming(self.config, self.maker, self.cuts)
        self.overlap: Overlap[BegunBatch] = Overlap(lag_of(self.config), self.config.training.train_iters)

    def train(self) -> None:
        """Train to `--train-iters` or until asked to stop, and save what is new."""
        course, reporter = self.course, self._reporter()
        self.watch.begin_steps()
        try:
            while not course.ended and not self.boundaries.between_steps():
                iteration = course.progress.iteration
                with self.tracer.iteration(iteration + 1):
                    self.step(iteration)
                    if course.stuck:
                        self.overlap.forget()
                        self.upcoming.forget()
                        course.roll_back(reporter)
                    else:
                        course.save_if_due()
                if self.tracer.due(iteration + 1):
                    with self.watch.stage("report"):
                        self.leader.together(self.tracer.write)
            if not course.ended:
                reporter.say(f"stopping after iteration {course.progress.iteration}: {self.watch.stop.reason}")
        except StopRequestedError:
            what = f"{self.watch.stop.reason}; the step in {self.watch.place} is discarded"
            reporter.say(f"stopping after iteration {course.progress.iteration}: {what}")
        self.watch.stop_agreed()
        course.finish()

    def step(self, iteration: int) -> None:
        """One step of the method: cuts, rollouts, scores, pairs; reference, forward and backward, update.

        With `--judge-lag 1` the cuts and rollouts are those of the next batch.
        """
        started = time.perf_counter()
        for coming in self.overlap.due(iteration):
            self.overlap.add(coming, self.begin(coming))
        batch = self.overlap.take(iteration)
        self.trainer.expect_batch()
        preferences = self.maker.finish(batch)
        size, samples = self.config.training.global_batch_size, batch.samples
        consumed = self.course.progress.consumed_samples + size
        self.upcoming.read_on(iteration + 1 + self.overlap.ahead, consumed + self.overlap.ahead * size)
        learning_rate = self.trainer.learning_rate
        with self.boundaries.stage("train", iteration + 1, samples):
            result = self.trainer.step(preferences.batch, self._updating)
        reporter, seconds = self._reporter(), time.perf_counter() - started
        with self.watch.stage("report", iteration + 1, samples):
            reporter.step(iteration + 1, consumed, learning_rate, preferences, result, seconds)
            self.leader.together(reporter.write)
        following = self.overlap.waiting(iteration + 1)
        self.course.advance(result.skipped, size, following.pending if following else None)

    def begin(self, iteration: int) -> BegunBatch:
        """Rollouts for the cuts of `iteration` with the weights as they are now; their questions leave."""
        now = self.course.progress
        ahead = (iteration - now.iteration) * self.config.training.global_batch_size
        cuts = self.upcoming.take(now.consumed_samples + ahead)
        written = self.course.written(iteration, [cut.sample_index for cut in cuts])
        batch = self.maker.begin(cuts, iteration, written)
        if written is not None:
            taken = "takes its rollouts from" if batch.rollouts is written else "has other rollouts than those in"
            self._reporter().say(f"iteration {iteration + 1} {taken} the checkpoint")
        return batch

    @contextmanager
    def _updating(self) -> Iterator[None]:
        """Around the optimizer's step; until here a step can be discarded."""
        self.boundaries.before("optimizer")
        with self.watch.stage("optimizer"):
            yield

    def close(self) -> None:
        """Leave nothing running and no file open, whatever happened before."""
        with self.watch.stage("report"), ExitStack() as closing:
            closing.callback(self.lock.release)  # called last
            closing.callback(self._opened.close)
            if self.reporter:
                closing.callback(self.reporter.close)
            if self.services:
                closing.callback(self.services.close)

    def _reporter(self) -> Reporter:
        if self.reporter is None:
            raise RuntimeError("assemble() comes first")
        return self.reporter

    def cuts(self, consumed_samples: int) -> list[Cut]:
        """This rank's share of the global batch behind `consumed_samples`."""
        world, jumped = self.world, self.course.progress.jumped
        with self.watch.stage("data"):
            return self.leader.together(
                lambda: self.data.stream.batch(consumed_samples, world.dp_rank, world.dp_size, jumped)
            )


def _say(text: str) -> None:
    """A line before there is a reporter; for the main rank."""
    print(f"> {text}", flush=True)
