"""Saving while a run goes on: the state is copied at the call, and written while the next steps are trained.

`save` copies this rank's shards into host memory; a thread makes the bytes of one after the other, writes and flushes
them. No process is forked: a child would inherit the locks of other threads and keep the connections of a dead rank
open. When the files of all ranks are on disk, which they find out together between two
steps, the main rank describes and names the checkpoint. Until then the one before is the newest.

Without `--async-save`, `save` returns when the checkpoint is named, and holds one item in memory at a time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from concurrent.futures import wait as wait_futures
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_sip.checkpoint.agree import attempt, from_main, on_main
from megatron_sip.checkpoint.dist import state_to_save
from megatron_sip.checkpoint.latest import checkpoint_folder, first_line
from megatron_sip.checkpoint.lock import SaveLock
from megatron_sip.checkpoint.manifest import COMMON, write_durably
from megatron_sip.checkpoint.naming import incomplete_folder
from megatron_sip.checkpoint.plan import HostCopies, Item, SavePlan, common_bytes, plan_save
from megatron_sip.checkpoint.progress import Progress, pending_state
from megatron_sip.checkpoint.publish import Written, fresh_folder, publish, write_pieces
from megatron_sip.checkpoint.retain import clean
from megatron_sip.config.groups import Config
from megatron_sip.errors import CheckpointError
from megatron_sip.parallel.ending import WRITER_THREAD
from megatron_sip.parallel.world import World
from megatron_sip.rollout.pending import joined
from megatron_sip.training.step import PolicyTrainer

T = TypeVar("T")
LONGEST_POLL = 1.0
"""Seconds between two meetings at most while a save is waited for."""
_PROBE_BYTES = 1 << 16
_TORCH_WRITER = ("PytorchStreamWriter", "inline_container.cc")
"""Marks of the RuntimeError by which torch.save tells that a write failed."""


def _probe(root: Path, rank: int) -> None:
    """Write a little, and take it away again."""
    file = root / f".probe-{rank}"
    try:
        write_durably(file, bytes(_PROBE_BYTES))
    finally:
        file.unlink(missing_ok=True)


def _clean(root: Path) -> list[str]:
    root.mkdir(parents=True, exist_ok=True)
    return clean(root)


@dataclass
class _Pending:
    """A save that is under way on this rank. `naming` begins when the files of all ranks are on disk."""

    iteration: int
    plan: SavePlan
    started: float
    writing: Future[Written]
    naming: Future[str | None] | None = None

    @property
    def current(self) -> Future:
        """What this rank is waiting for."""
        return self.writing if self.naming is None else self.naming


class CheckpointWriter:
    """Writes the checkpoints of one run. Every rank makes the same calls in the same order, on its main thread.

    One save is under way at most. `say` prints on the main rank; `lock` is held there.
    """

    def __init__(self, config: Config, world: World, say: Callable[[str], None], lock: SaveLock) -> None:
        self._config, self._world, self._say, self._lock = config, world, say, lock
        self._pending: _Pending | None = None
        self._copies = HostCopies()
        self.last_saved: int | None = None
        """Iteration of the newest checkpoint that is durable and named; None before the first of this run."""

    def prepare(self) -> None:
        """Find out at the start of a run whether `--save` can be written to, and clean up after a killed one.

        Raises:
            CheckpointError: a rank cannot write there, on all ranks alike.
        """
        if self._config.checkpoint.save is None:
            return
        root, rank = self._root(), self._world.rank
        for done in from_main(self._world, lambda: _usable(root, lambda: _clean(root))):
            self._say(done)
        attempt(self._world, lambda: _usable(root, lambda: _probe(root, rank)))

    def save(self, trainer: PolicyTrainer, progress: Progress) -> None:
        """Save the state as it is now; it may change as soon as this returns.

        A save that is under way is finished first.

        Raises:
            CheckpointError: the folder cannot be written, or another run took it over, on all ranks alike; an earlier
                checkpoint stays intact.
        """
        self.finish()
        started = time.perf_counter()
        root, iteration = self._root(), progress.iteration
        partial = incomplete_folder(root, iteration)
        from_main(self._world, lambda: _written(partial, lambda: self._begin(partial)))
        plan = plan_save(state_to_save(trainer, progress), str(partial), self._world)
        items: Iterable[Item] = plan.items()
        if self._config.checkpoint.async_save:
            items = attempt(self._world, lambda: _written(partial, lambda: self._copies.take(plan.items())))
        waiting = self._waiting(progress)
        common = common_bytes(plan, waiting) if self._world.is_main else None
        writing = _in_background(lambda: _write(partial, plan, items, common))
        self._pending = _Pending(iteration, plan, started, writing)
        if self._config.checkpoint.async_save:
            stall = 1000 * (time.perf_counter() - started)
            self._say(f"save of iteration {iteration} started, {stall:.0f} ms")
        else:
            self.finish()

    def _waiting(self, progress: Progress) -> dict[str, Any]:
        """On the main rank, the rollouts that the next global batch waits with, as they are saved."""
        if progress.pending is None:  # alike on all ranks
            return {}
        parts = on_main(self._world, progress.pending if self._world.is_leader else None)
        return {} if parts is None else pending_state(joined([part for part in parts if part is not None]))

    def poll(self) -> Path | None:
        """Look whether a save is durable; all ranks call it between two steps. It never waits for a disk.

        Returns:
            The folder of the checkpoint that was named by this call or just before it; None otherwise.

        Raises:
            CheckpointError: a rank could not write, on all ranks alike; an earlier checkpoint stays intact.
        """
        pending = self._pending
        if pending is None or self._any(not pending.current.done()):
            return None
        if pending.naming is None:
            self._begin_naming(pending)
            return None
        problem = self._result(pending, pending.naming)
        if problem:
            self._say(f"WARNING: {problem}")
        self._pending, self.last_saved = None, pending.iteration
        folder, seconds = checkpoint_folder(self._root(), pending.iteration), time.perf_counter() - pending.started
        self._say(f"checkpoint of iteration {pending.iteration} saved to {folder}, durable after {seconds:.1f} s")
        return folder

    def finish(self) -> Path | None:
        """Wait for the save that is under way, if any; all ranks call it together.

        Returns:
            The folder of the checkpoint that was named, None where no save was under way.

        Raises:
            CheckpointError: as `poll`.
        """
        folder, wait = None, 0.01
        while self._pending is not None:
            wait_futures([self._pending.current], timeout=wait)
            folder, wait = self.poll(), min(2 * wait, LONGEST_POLL)
        return folder

    def _begin_naming(self, pending: _Pending) -> None:
        """The files of all ranks are on disk, or one failed."""
        mine = self._result(pending, pending.writing)
        parts: list[Written] | None = [mine] * self._world.size if self._world.is_main else None
        dist.gather_object(mine, parts, dst=0, group=self._world.control_group)
        if parts is None:
            pending.naming = Future()
            pending.naming.set_result(None)
            return
        files = parts
        pending.naming = _in_background(lambda: self._name(pending, files))

    def _begin(self, partial: Path) -> None:
        self._lock.require()
        fresh_folder(partial)

    def _name(self, pending: _Pending, parts: list[Written]) -> str | None:
        self._lock.require()
        return publish(self._config, self._root(), pending.iteration, pending.plan, parts)

    def _result(self, pending: _Pending, future: Future[T]) -> T:
        """A future's result, where it is one on all ranks; else the save is given up everywhere."""
        partial = incomplete_folder(self._root(), pending.iteration)
        try:
            return attempt(self._world, lambda: _written(partial, future.result))
        except CheckpointError:
            self._pending = None
            raise

    def _any(self, condition: bool) -> bool:
        state = torch.tensor(int(condition))
        dist.all_reduce(state, op=dist.ReduceOp.MAX, group=self._world.control_group)
        return bool(state)

    def _root(self) -> Path:
        if self._config.checkpoint.save is None:
            raise CheckpointError("no folder to save to; give --save")
        return Path(self._config.checkpoint.save)


def _write(partial: Path, plan: SavePlan, items: Iterable[Item], common: bytes | None) -> Written:
    """This rank's files, on disk; `common` is the main rank's."""
    # A rank that holds copies alone writes nothing.
    written = write_pieces(partial / plan.file_name, plan.pieces(items)) if plan.writer.items else Written([], {})
    if common is None:
        return written
    return replace(written, files=written.files | {COMMON: write_durably(partial / COMMON, common)})


def _written(partial: Path, action: Callable[[], T]) -> T:
    """What `action` gives; what stops it is an error that names the folder.

    Raises:
        CheckpointError: a file could not be written, or the state could not be read: not for want of space then.
    """
    try:
        return action()
    except (OSError, RuntimeError, MemoryError) as error:
        if isinstance(error, OSError) or any(mark in str(error) for mark in _TORCH_WRITER):
            cause = f"cannot write {partial}: {first_line(error)}; free space or choose another --save"
        else:  # a fault of CUDA or of ours; all ranks must hear of it
            cause = (
                f"the save to {partial} failed with {type(error).__name__}: {first_line(error)}; the folder is not at "
                "fault: see the traceback, and go on from the checkpoint before"
            )
        raise CheckpointError(cause) from error


def _usable(root: Path, action: Callable[[], T]) -> T:
    """What `action` does in the folder of `--save`.

    Raises:
        CheckpointError: nothing can be written there.
    """
    try:
        return action()
    except OSError as error:
        raise CheckpointError(
            f"cannot write to --save {root}: {error.strerror or error}; free space, mend its rights or name another"
        ) from error


def _in_background(action: Callable[[], T]) -> Future[T]:
    """Run `action` in a thread that does not keep the process alive: what it leaves unfinished has no name yet."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(action())
        except BaseException as error:  # whatever it is, the main thread gets it
            future.set_exception(error)

    threading.Thread(target=work, name=WRITER_THREAD, daemon=True).start()
    return future
