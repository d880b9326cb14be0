"""Where a run stands: its place in the stream, the checkpoints along its way, and the way back to the last of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from megatron_sip.checkpoint import dist as dist_checkpoint
from megatron_sip.checkpoint.choose import choose
from megatron_sip.checkpoint.latest import same_folder
from megatron_sip.checkpoint.progress import Progress
from megatron_sip.checkpoint.writer import CheckpointWriter
from megatron_sip.config.groups import Config
from megatron_sip.data.cursor import ranges_of, sample_indices
from megatron_sip.parallel.leader import Leader
from megatron_sip.rollout.engine import Rollouts
from megatron_sip.rollout.pending import PendingBatch
from megatron_sip.training.assemble import Stream, require_own_model
from megatron_sip.training.journal import JournalKeeper
from megatron_sip.training.overlap import lag_of
from megatron_sip.training.report import Reporter
from megatron_sip.training.rollback import Recovery
from megatron_sip.training.step import PolicyTrainer


class Course:
    """The course of one run. Every rank makes the same calls in the same order.

    `progress` is where the run stands; only `advance` and a rollback move it.
    """

    def __init__(
        self,
        config: Config,
        leader: Leader,
        trainer: PolicyTrainer,
        stream: Stream,
        writer: CheckpointWriter,
        journal: JournalKeeper,
        progress: Progress,
        behind: Collection[int],
    ) -> None:
        """`behind` are the iterations in the folder of `--save` that led to `progress`."""
        self._config, self._leader, self._trainer, self._stream = config, leader, trainer, stream
        self._writer, self._journal = writer, journal
        self._recovery = Recovery(config.training)
        self.progress = self._calm = progress
        self._stand_at(progress)
        self._ours = set(behind)
        if config.checkpoint.load and progress.iteration:
            self._recovery.checkpoint_at(Path(config.checkpoint.load), progress.iteration)

    @property
    def ended(self) -> bool:
        """Whether `--train-iters` are done."""
        return self.progress.iteration >= self._config.training.train_iters

    @property
    def stuck(self) -> bool:
        """Whether it is time to go back to the last checkpoint."""
        return self._recovery.stuck

    def written(self, iteration: int, samples: Sequence[int]) -> Rollouts | None:
        """The rollouts that a checkpoint brought for `iteration`, of this rank's share of its batch.

        They are by weights that are gone. None without lag, and where the batch is another now, after a rollback or at
        another batch size: then all of it is to be written anew, on all ranks.
        """
        now = self.progress
        if now.pending is None or iteration != now.iteration or not lag_of(self._config):
            return None
        batch = sample_indices(now.consumed_samples, self._config.training.global_batch_size, now.jumped)
        return now.pending.of(samples) if now.pending.holds(batch) else None

    def advance(self, skipped: str, samples: int, pending: PendingBatch | None = None) -> None:
        """Count a finished step that took this many samples; `skipped` is that of its `StepResult`.

        `pending` are the rollouts of the next batch, where they are written already.
        """
        now = self.progress
        taken = sample_indices(now.consumed_samples, samples, now.jumped)
        self._recovery.observe(now.iteration + 1, skipped, ranges_of(taken))
        consumed = now.consumed_samples + samples
        stream = self._stream.state_dict(consumed)
        losses = self._trainer.recent_losses
        self.progress = Progress(now.iteration + 1, consumed, stream, now.jumped, losses, pending)
        if self._recovery.calm:
            self._calm = self.progress
        self._follow(self._writer.poll)

    def save_if_due(self) -> None:
        """Save where a multiple of the interval was passed since the last checkpoint; not amid bad steps."""
        interval = self._config.checkpoint.save_interval
        if self._config.checkpoint.save is None or not interval or not self._recovery.calm:
            return
        if self.progress.iteration // interval > self._saved_at // interval:
            self._save()

    def finish(self) -> None:
        """Save what is not saved, and wait until it is durable."""
        if not self.ended:
            # Amid bad steps: as of the last step before them, so that a resume repeats them.
            self.progress = self._calm
        if self._config.checkpoint.save and self.progress.iteration != self._saved_at:
            self._save()
        self._follow(self._writer.finish)

    def roll_back(self, reporter: Reporter) -> None:
        """Go back to the last checkpoint that is whole, and past the samples at fault.

        Raises:
            SipError: there is no checkpoint, or going back to it has not helped.
        """

        def load(root: Path, iteration: int) -> Progress:
            # Its files were whole when it was written; what a disk did to them since must not get into the weights.
            world, say = self._leader.world, reporter.say
            among = self._ours if same_folder(root, self._config.checkpoint.save) else None
            folder = choose(root, world, say, self._leader.watch.feed, named=iteration, among=among)
            if folder is None:
                raise RuntimeError("a named checkpoint is whole, or choose() tells why not")
            require_own_model(folder, self._config)
            loaded = dist_checkpoint.load(folder, world, self._trainer, say, weights_only=False)
            self._stream.check_state(loaded.stream)
            return loaded

        self._follow(self._writer.finish)
        with self._leader.watch.stage("load"):
            progress, done = self._recovery.roll_back(self.progress, load)
        self._stand_at(progress)
        self._leader.together(lambda: reporter.rolled_back(done))
        self._journal.stand_at(progress)
        if self._config.checkpoint.save:
            # What is left out must outlive a kill, or a run that is stopped often would meet it for ever.
            self._save()

    def _stand_at(self, progress: Progress) -> None:
        """Go on from a state that was loaded."""
        self.progress = self._calm = progress
        self._saved_at = progress.iteration
        self._trainer.recent_losses = progress.recent_losses

    def _save(self) -> None:
        self._follow(lambda: self._writer.save(self._trainer, self.progress))
        self._saved_at = self.progress.iteration

    def _follow(self, writing: Callable[[], object]) -> None:
        """Let the writer go on; a rollback goes to the newest checkpoint that is durable."""
        with self._leader.watch.stage("save", self.progress.iteration):
            writing()
            self._journal.checkpointed(self._writer.last_saved)
        if self._config.checkpoint.save and self._writer.last_saved is not None:
            self._ours.add(self._writer.last_saved)
            self._recovery.checkpoint_at(Path(self._config.checkpoint.save), self._writer.last_saved)
