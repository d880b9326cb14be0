"""Self-Improving Pretraining (arXiv 2601.21343, section 2), as a loop.

Cuts of documents, rollouts of the policy, verdicts on all candidates, a preference pair a cut, one update;
then the next cuts. What only plumbing needs is behind a name in its own room.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_sip.checkpoint import dist as dist_checkpoint
from megatron_sip.checkpoint.agree import from_main
from megatron_sip.checkpoint.latest import checkpoint_folder
from megatron_sip.checkpoint.progress import Progress
from megatron_sip.checkpoint.writer import CheckpointWriter
from megatron_sip.config.groups import Config
from megatron_sip.config.validate import validate
from megatron_sip.data.cursor import ranges_of, sample_indices
from megatron_sip.parallel import world as world_module
from megatron_sip.parallel.leader import Leader, StopRequestedError
from megatron_sip.parallel.watch import StageWatch
from megatron_sip.parallel.world import World
from megatron_sip.services.hub import PreferenceServices
from megatron_sip.training import assemble
from megatron_sip.training.faults import Boundaries, start_watch
from megatron_sip.training.journal import JournalKeeper
from megatron_sip.training.report import Reporter
from megatron_sip.training.restart import continued
from megatron_sip.training.rollback import Recovery
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
            if run:
                run.close()
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

    def assemble(self) -> None:
        """Open and build everything; all ranks do each step together, so that what fails on one is told by all."""
        together, world = self.leader.together, self.world
        self.config = from_main(world, lambda: continued(self.config))
        self.data = together(lambda: assemble.open_data(self.config))
        self.config = together(lambda: assemble.with_model(self.config, self.data.tokenizer))
        together(lambda: validate(self.config, world.size))
        self.reporter = reporter = Reporter(self.config, world)
        reporter.describe(self.config, self.data.stream.skipped())
        self.writer = CheckpointWriter(self.config, world, reporter.say)
        self.writer.prepare()
        # Servers first: a refused key shall not cost the time that a large model takes to load.
        self.services = together(lambda: assemble.connect_services(self.config, world))
        self.trainer = together(lambda: assemble.build_trainer(self.config, world))
        with self.watch.stage("load"):
            self.progress = together(
                lambda: assemble.load_checkpoint(self.config, world, self.trainer, self.data.stream, reporter.say)
            )
        self._stand_at(self.progress)
        self.recovery = Recovery(self.config.training)
        if self.config.checkpoint.load and self.progress.iteration:
            self.recovery.checkpoint_at(Path(self.config.checkpoint.load), self.progress.iteration)
        together(lambda: reporter.start(self.progress))
        self.journal = JournalKeeper(self.config.checkpoint, self.leader, self.services, reporter.say)
        with self.watch.stage("load"):
            self.journal.open(self.progress)
        self.maker = assemble.build_maker(
            self.config, world, self.leader, self.boundaries, self.data.tokenizer, self.trainer.policy, self.services
        )

    def train(self) -> None:
        """Train to `--train-iters` or until asked to stop, and save what is new."""
        reporter = self._reporter()
        iteration = started_at = self.progress.iteration
        upcoming = self.cuts(self.progress.consumed_samples)
        self.watch.begin_steps()
        try:
            while iteration < self.config.training.train_iters and not self.boundaries.between_steps():
                upcoming = self.step(iteration, upcoming)
                iteration += 1
                self._advance(iteration)
                self._follow(self.writer.poll)
                if self.recovery.stuck:
                    upcoming = self._roll_back(reporter)
                    iteration = self.progress.iteration
                elif self._save_is_due(iteration):
                    self._save()
            if iteration < self.config.training.train_iters:
                reporter.say(f"stopping after iteration {iteration}: {self.watch.stop.reason}")
        except StopRequestedError:
            what = f"{self.watch.stop.reason}; the step in {self.watch.place} is discarded"
            reporter.say(f"stopping after iteration {iteration}: {what}")
        self.watch.stop_agreed()
        if iteration < self.config.training.train_iters:
            # Amid bad steps: as of the last step before them, so that a resume repeats them.
            self.progress = self.calm
        iteration = self.progress.iteration
        if self.config.checkpoint.save and iteration > started_at and self.writer.last_begun != iteration:
            self._save()
        self._follow(self.writer.finish)

    def step(self, iteration: int, cuts: list[Cut]) -> list[Cut]:
        """One step of the method: cuts, rollouts, scores, pairs; reference, forward and backward, update.

        Returns:
            The cuts of the next step, whose rewrites are on their way.
        """
        started = time.perf_counter()
        consumed = self.progress.consumed_samples + self.config.training.global_batch_size
        preferences = self.maker.make(cuts, iteration)
        samples = cuts[0].sample_index, cuts[-1].sample_index
        upcoming = self.cuts(consumed)
        if iteration + 1 < self.config.training.train_iters:
            self.maker.prefetch(upcoming, iteration + 1)
        learning_rate = self.trainer.learning_rate
        with self.boundaries.stage("train", iteration + 1, samples):
            result = self.trainer.step(preferences.batch, self._updating)
        reporter, seconds = self._reporter(), time.perf_counter() - started
        with self.watch.stage("report", iteration + 1, samples):
            reporter.step(iteration + 1, consumed, learning_rate, preferences, result, seconds)
            self.leader.together(reporter.write)
        taken = sample_indices(self.progress.consumed_samples, len(cuts) * self.world.dp_size, self.progress.jumped)
        self.recovery.observe(iteration + 1, result.skipped, ranges_of(taken))
        return upcoming

    @contextmanager
    def _updating(self) -> Iterator[None]:
        """Around the optimizer's step; until here a step can be discarded."""
        self.boundaries.before("optimizer")
        with self.watch.stage("optimizer"):
            yield

    def close(self) -> None:
        """Leave nothing running and no file open, whatever happened before."""
        with self.watch.stage("report"):
            if self.services:
                self.services.close()
            if self.reporter:
                self.reporter.close()

    def _reporter(self) -> Reporter:
        if self.reporter is None:
            raise RuntimeError("assemble() comes first")
        return self.reporter

    def cuts(self, consumed_samples: int) -> list[Cut]:
        """This rank's share of the global batch behind `consumed_samples`."""
        world, jumped = self.world, self.progress.jumped
        with self.watch.stage("data"):
            return self.leader.together(
                lambda: self.data.stream.batch(consumed_samples, world.dp_rank, world.dp_size, jumped)
            )

    def _advance(self, iteration: int) -> None:
        """Count the samples of a finished step; only here does the stream move."""
        consumed = self.progress.consumed_samples + self.config.training.global_batch_size
        stream = self.data.stream.state_dict(consumed)
        self.progress = Progress(iteration, consumed, stream, self.progress.jumped, self.trainer.recent_losses)
        if self.recovery.calm:
            self.calm = self.progress

    def _stand_at(self, progress: Progress) -> None:
        """Go on from a state that was loaded."""
        self.progress = self.calm = progress
        self.saved_at = progress.iteration
        self.trainer.recent_losses = progress.recent_losses

    def _roll_back(self, reporter: Reporter) -> list[Cut]:
        """Go back to the last checkpoint and past the samples at fault; the cuts that come next.

        Raises:
            SipError: there is no checkpoint, or going back to it has not helped.
        """

        def load(root: Path, iteration: int) -> Progress:
            self.trainer.before_reload()
            folder = checkpoint_folder(root, iteration)
            return dist_checkpoint.load(folder, self.world, self.trainer, reporter.say, weights_only=False)

        self._follow(self.writer.finish)
        self.maker.forget()
        with self.watch.stage("load"):
            progress, done = self.recovery.roll_back(self.progress, load)
        self._stand_at(progress)
        self.leader.together(lambda: reporter.rolled_back(done))
        with self.watch.stage("load"):
            self.journal.stand_at(progress)
        return self.cuts(progress.consumed_samples)

    def _save_is_due(self, iteration: int) -> bool:
        """Whether a multiple of the interval was passed since the last checkpoint; not amid bad steps."""
        interval = self.config.checkpoint.save_interval
        if not (self.config.checkpoint.save and interval and self.recovery.calm):
            return False
        return iteration // interval > self.saved_at // interval

    def _save(self) -> None:
        self._follow(lambda: self.writer.save(self.trainer, self.progress))
        self.saved_at = self.progress.iteration

    def _follow(self, writing: Callable[[], object]) -> None:
        """Let the writer go on; a rollback goes to the newest checkpoint that is durable."""
        with self.watch.stage("save", self.progress.iteration):
            writing()
            self.journal.checkpointed(self.writer.last_saved)
        if self.config.checkpoint.save and self.writer.last_saved is not None:
            self.recovery.checkpoint_at(Path(self.config.checkpoint.save), self.writer.last_saved)
