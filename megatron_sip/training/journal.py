"""The journal of a run, in step with its checkpoints: opened, read again after a rollback, shortened after a save."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_sip.checkpoint.agree import from_main
from megatron_sip.checkpoint.latest import candidates, checkpoint_folder
from megatron_sip.checkpoint.manifest import COMMON
from megatron_sip.checkpoint.progress import Progress, from_state
from megatron_sip.checkpoint.restricted import load_pickled
from megatron_sip.config.groups import CheckpointConfig
from megatron_sip.errors import CheckpointError
from megatron_sip.parallel.leader import Leader
from megatron_sip.services.hub import PreferenceServices
from megatron_sip.services.journal import FOLDER, Journal, Recalled


class JournalKeeper:
    """Keeps the journal beside the checkpoints of `--save`. Every rank makes the same calls; leaders have `services`.

    `say` prints on the main rank.
    """

    def __init__(
        self,
        checkpoint: CheckpointConfig,
        leader: Leader,
        services: PreferenceServices | None,
        say: Callable[[str], None],
    ) -> None:
        self._checkpoint, self._leader, self._say = checkpoint, leader, say
        self._services = services if services is not None and services.asks else None
        self._shortened_at: int | None = None

    def open(self, progress: Progress) -> None:
        """Before the first step behind `progress`: answer from the journal what was asked there before.

        A run that goes on from a checkpoint in another folder reads that folder's journal too.

        Raises:
            CheckpointError: a journal cannot be read; on all ranks alike.
        """
        if self._services is not None:
            if self._checkpoint.save is None:
                self._say("no journal of verdicts and rewrites without --save: a run that starts again asks anew")
            else:
                self._services.use_journal(self._journal(Path(self._checkpoint.save) / FOLDER))
        self.stand_at(progress)

    def _journal(self, own: Path) -> Journal:
        load, earlier = self._checkpoint.load, None
        if load is not None and not self._checkpoint.finetune and (Path(load) / FOLDER).resolve() != own.resolve():
            earlier = Path(load) / FOLDER
        return Journal(own, self._leader.world.dp_rank, earlier)

    def stand_at(self, progress: Progress) -> None:
        """The run stands at `progress`, at its start or by a rollback: read what the journal holds of what comes now.

        Raises:
            CheckpointError: the journal cannot be read; on all ranks alike.
        """
        # Samples are taken in their order, so the next has at least this index (more, if some were jumped over).
        services, first = self._services, progress.consumed_samples
        found = self._leader.together(lambda: services.recall(first) if services else None)
        for line in [] if found is None else report(found, progress.iteration):
            self._say(line)

    def checkpointed(self, iteration: int | None) -> None:
        """The newest durable checkpoint is that of `iteration`: drop what no kept checkpoint can need.

        Raises:
            CheckpointError: the journal cannot be written; on all ranks alike.
        """
        save, services = self._checkpoint.save, self._services
        if iteration is None or iteration == self._shortened_at or save is None:
            return
        self._shortened_at = iteration
        first = from_main(self._leader.world, lambda: oldest_sample(Path(save)))
        self._leader.together(lambda: services.checkpointed(first) if services else None)


def oldest_sample(root: Path) -> int:
    """The least index of a sample that the oldest checkpoint under `root` has before it; 0 where it does not say.

    Raises:
        CheckpointError: the latest file is damaged.
    """
    kept = candidates(root)
    if not kept:
        return 0
    file = checkpoint_folder(root, kept[-1]) / COMMON
    try:
        return from_state(load_pickled(file, str(file))).consumed_samples
    except (CheckpointError, KeyError, TypeError, ValueError):
        return 0  # a damaged one may be mended yet, so nothing is dropped


def report(found: Recalled, iteration: int) -> list[str]:
    """What a journal holds of the steps since `iteration`, and what of it could not be read, for the log."""
    lines = [
        f"journal: {found.verdicts} verdicts and {found.rewrites} rewrites of the steps since iteration {iteration}"
    ]
    if found.torn:
        lines.append(f"journal: {found.torn} file(s) end in a record that was cut off, as by a kill; it was never used")
    if found.damaged:
        shown = "; ".join(found.damaged[:5]) + (" and others" if len(found.damaged) > 5 else "")
        lines.append(
            f"WARNING: journal: {len(found.damaged)} damaged record(s) are left out ({shown}); what they held is asked "
            "anew, so the steps since the checkpoint may not repeat exactly"
        )
    return lines
