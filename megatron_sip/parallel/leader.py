"""Waiting, telling and failing together.

One rank of each model-parallel group, the leader, talks HTTP. While it waits no rank may sit in an open-ended
collective, so all ranks meet on the gloo control group at short intervals and say how they are. What fails
on one rank is told to all there and raised everywhere with the same words.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import wait as wait_futures
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_sip.errors import SipError
from megatron_sip.parallel.pause import PauseNotes
from megatron_sip.parallel.watch import StageWatch
from megatron_sip.parallel.world import World

T = TypeVar("T")

LONGEST_POLL = 2.0
"""Seconds between two meetings at most (the house allows 5)."""


class StopRequestedError(Exception):
    """Raised on all ranks alike: one of them was asked to stop, and the step under way is discarded."""


class Leader:
    """Coordinates one model-parallel group and, over the control group, the world."""

    def __init__(self, world: World, watch: StageWatch) -> None:
        self.world = world
        self.watch = watch
        self._group = self._host_group()

    def _host_group(self) -> dist.ProcessGroup:
        """gloo group of this model-parallel group, for objects; every rank makes all of them, in one order."""
        ranks = dist.get_process_group_ranks(self.world.model_parallel_group)
        everyone: list[list[int]] = [[] for _ in range(self.world.size)]
        dist.all_gather_object(everyone, ranks, group=self.world.control_group)
        mine = None
        for members in sorted({tuple(sorted(item)) for item in everyone}):
            group = dist.new_group(list(members), backend="gloo")
            if self.world.rank in members:
                mine = group
        if mine is None:
            raise RuntimeError(f"rank {self.world.rank} is in no model-parallel group")
        return mine

    def tell(self, value: T | None) -> T:
        """The leader's value, on every rank of its model-parallel group."""
        box = [value]
        dist.broadcast_object_list(box, src=self.world.leader_rank, group=self._group)
        return box[0]  # type: ignore[return-value]

    def together(self, action: Callable[[], T]) -> T:
        """Run `action` on every rank; if it fails on one, all raise that error.

        Raises:
            SipError: the first one, by rank, that any rank met. An error that is no SipError is a fault of ours: its
                traceback is printed where it happened, and the others hear of it as a SipError.
        """
        error, result = None, None
        try:
            result = action()
        except SipError as caught:
            error = caught
        except Exception as caught:
            traceback.print_exc()
            error = SipError(f"rank {self.world.rank} failed with {type(caught).__name__}: {caught}; see its traceback")
        self._raise_first(error)
        return result  # type: ignore[return-value]

    def _raise_first(self, error: SipError | None) -> None:
        errors: list[SipError | None] = [None] * self.world.size
        dist.all_gather_object(errors, error, group=self.world.control_group)
        first = next((item for item in errors if item is not None), None)
        if first is not None:
            raise first

    def wait(self, future: Future[T] | None, trouble: Callable[[], str | None] = lambda: None) -> T | None:
        """Wait until every leader's future is done; every rank calls this, those without work pass None.

        `trouble` tells on a leader what its future waits for, None if all is well; the main rank prints it when a pause
        begins, each minute, and when it is over.

        Returns:
            The future's result, or None where there was no future.

        Raises:
            SipError: a leader's future failed with it; on all ranks alike.
            StopRequestedError: a rank was asked to stop, and some still wait.
        """
        poll, notes = 0.02, PauseNotes(self.world)
        while True:
            if future is not None:
                wait_futures([future], timeout=poll)
            waiting = future is not None and not future.done()
            text = trouble() if waiting else None
            state = torch.tensor([int(waiting), int(self.watch.stop()), int(text is not None)])
            dist.all_reduce(state, op=dist.ReduceOp.MAX, group=self.world.control_group)
            # All ranks are here and well, so a long wait is no hang.
            self.watch.met()
            if not state[0]:
                notes.heard(False, None)
                break
            if state[1]:
                raise StopRequestedError
            notes.heard(bool(state[2]), text)
            poll = min(2 * poll, LONGEST_POLL)
        return self.together(lambda: None if future is None else future.result())

    def any(self, condition: bool) -> bool:
        """Whether `condition` holds on any rank; the same answer everywhere."""
        state = torch.tensor(int(condition))
        dist.all_reduce(state, op=dist.ReduceOp.MAX, group=self.world.control_group)
        return bool(state)
