"""Self-Improving Pretraining (arXiv 2601.21343, section 2), as a loop.

Cuts of documents, rollouts of the policy, verdicts on all candidates, a preference pair a cut, one update;
then the next cuts. What only plumbing needs is behind a name in its own room.
"""

from __future__ import annotations

import time

from megatron_sip.checkpoint import dist as dist_checkpoint
from megatron_sip.config.groups import Config
from megatron_sip.config.validate import validate
from megatron_sip.parallel import world as world_module
from megatron_sip.parallel.leader import Leader, StopRequestedError
from megatron_sip.parallel.world import World
from megatron_sip.training import assemble
from megatron_sip.training.faults import StopSignal
from megatron_sip.training.report import Reporter
from megatron_sip.types import Cut


def pretrain(config: Config) -> None:
    """Run the training that `config` describes on the ranks that were launched.

    Raises:
        SipError: something that the user can mend, on all ranks alike.
    """
    stop = StopSignal(config.training.exit_duration_in_mins)
    world = world_module.start(config)
    try:
        Run(config, world, Leader(world, stop), stop).train()
    finally:
        world_module.stop()


class Run:
    """One run on one rank: what was assembled, where it stands, and the loop over it.

    Every step of the assembly is done by all ranks together, so that what fails on one is told by all.
    """

    def __init__(self, config: Config, world: World, leader: Leader, stop: StopSignal) -> None:
        together = leader.together
        self.world, self.leader, self.stop = world, leader, stop
        self.data = together(lambda: assemble.open_data(config))
        self.config = together(lambda: assemble.with_model(config, self.data.tokenizer))
        together(lambda: validate(self.config, world.size))
        self.reporter = together(lambda: Reporter(self.config, world))
        self.reporter.describe(self.config, self.data.stream.skipped())
        # Servers first: a refused key shall not cost the time that a large model takes to load.
        self.services = together(lambda: assemble.connect_services(self.config, world))
        self.trainer = together(lambda: assemble.build_trainer(self.config, world))
        self.progress = together(
            lambda: assemble.load_checkpoint(self.config, world, self.trainer, self.data.stream, self.reporter.say)
        )
        together(lambda: self.reporter.start(self.progress.iteration))
        self.maker = assemble.build_maker(
            self.config, world, leader, self.data.tokenizer, self.trainer.policy, self.services
        )

    def train(self) -> None:
        """Train to `--train-iters` or until asked to stop, save what is new, and leave nothing running."""
        iteration = started_at = self.progress.iteration
        try:
            while iteration < self.config.training.train_iters and not self.leader.any_stop():
                self.step(iteration)
                iteration += 1
                self._advance(iteration)
                if self._save_is_due(iteration):
                    self._save()
            if iteration < self.config.training.train_iters:
                self.reporter.say(f"stopping after iteration {iteration}: {self.stop.reason}")
        except StopRequestedError:
            self.reporter.say(f"stopping after iteration {iteration}: the step that waited for judges is discarded")
        finally:
            if self.services:
                self.services.close()
        if self.config.checkpoint.save and iteration > started_at and self.reporter.last_saved != iteration:
            self._save()
        self.reporter.close()

    def step(self, iteration: int) -> None:
        """One step of the method: cuts, rollouts, scores, pairs; reference, forward and backward, update."""
        started = time.perf_counter()
        size = self.config.training.global_batch_size
        cuts = self.cuts(self.progress.consumed_samples)
        preferences = self.maker.make(cuts, iteration)
        self.maker.prefetch(self.cuts(self.progress.consumed_samples + size), iteration + 1)
        learning_rate = self.trainer.learning_rate
        result = self.trainer.step(preferences.batch)
        consumed = self.progress.consumed_samples + size
        self.reporter.step(iteration + 1, consumed, learning_rate, preferences, result, time.perf_counter() - started)

    def cuts(self, consumed_samples: int) -> list[Cut]:
        """This rank's share of the global batch behind `consumed_samples`."""
        return self.leader.together(
            lambda: self.data.stream.batch(consumed_samples, self.world.dp_rank, self.world.dp_size)
        )

    def _advance(self, iteration: int) -> None:
        """Count the samples of a finished step; only here does the stream move."""
        consumed = self.progress.consumed_samples + self.config.training.global_batch_size
        self.progress = dist_checkpoint.Progress(iteration, consumed, self.data.stream.state_dict(consumed))

    def _save_is_due(self, iteration: int) -> bool:
        interval = self.config.checkpoint.save_interval
        return bool(self.config.checkpoint.save and interval and iteration % interval == 0)

    def _save(self) -> None:
        folder = dist_checkpoint.save(self.config, self.world, self.trainer, self.progress)
        self.reporter.saved(self.progress.iteration, folder)
