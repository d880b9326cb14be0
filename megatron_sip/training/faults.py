"""Stopping in time: at each boundary of a step all ranks decide alike whether the step is finished or discarded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from megatron_sip.config.groups import Config
from megatron_sip.config.timeouts import stage_timeouts
from megatron_sip.parallel.leader import StopRequestedError
from megatron_sip.parallel.signals import StopSignal
from megatron_sip.parallel.watch import StageWatch
from megatron_sip.parallel.world import World

_STEP = ("data", "rollout", "rewrite", "judge", "train")
_WAITS = ("rewrite", "judge")
_LONG_WAIT = 0.5
"""A wait for servers is abandoned at once; one that takes no longer than these seconds is none."""


def start_watch(config: Config) -> StageWatch:
    """The watch over the stages of a run and over what may ask it to stop.

    Raises:
        ConfigError: `--stage-timeout` is wrong.
    """
    stop = StopSignal(config.training.exit_duration_in_mins)
    return StageWatch(stage_timeouts(config.parallel.stage_timeout), stop, config.training.sigterm_grace)


class Boundaries:
    """The points of a step where it may be given up; all ranks call the same ones in the same order."""

    def __init__(self, world: World, watch: StageWatch) -> None:
        self.world = world
        self.watch = watch

    def before(self, stage: str) -> None:
        """Go on with `stage`, or within it if it has begun, unless the step is to be discarded.

        A step that was asked to stop goes on while what remains of it usually fits into what is left of
        `--sigterm-grace`. Stages that were never seen count nothing, so then the grace itself decides.

        Raises:
            StopRequestedError: a rank was asked to stop, and the step would take too long; on all ranks alike.
        """
        asked, seconds, ahead = self._exchange(self.seconds_ahead(stage), stage)
        if asked and seconds + ahead > self.watch.grace:
            raise StopRequestedError

    @contextmanager
    def stage(self, name: str, iteration: int, samples: tuple[int, int]) -> Iterator[None]:
        """A stage of the step with the boundary in front of it; arguments as those of `StageWatch.stage`."""
        self.before(name)
        with self.watch.stage(name, iteration, samples):
            yield

    def between_steps(self) -> bool:
        """Whether any rank was asked to stop; the same answer everywhere."""
        asked, _, _ = self._exchange(0.0, "data")
        return asked

    def before_micro_batch(self) -> None:
        """A boundary within "train", where the micro-batches of all ranks go side by side.

        The stages of a pipeline take theirs one after the other, and would wait for ever if each waited here for all.
        Their boundaries are those before a pass and before the update, and the watch knows how far away these are.

        Raises:
            StopRequestedError: as `before`.
        """
        if self.world.pp_size == 1:
            self.before("train")
        else:
            self.watch.feed()

    def seconds_ahead(self, stage: str) -> float:
        """What remains of a step before or within `stage`, by the mean times of the stages; inf with a judge wait."""
        usual, rest = self.watch.usual_seconds, _STEP[_STEP.index(stage) :] if stage in _STEP else (stage,)
        if any(name in _WAITS and usual(name) > _LONG_WAIT for name in rest):
            return float("inf")
        begun = self.watch.seconds_in_stage if self.watch.place.stage == stage else 0.0
        return max(0.0, usual(stage) - begun) + sum(usual(name) for name in rest[1:])

    def _exchange(self, ahead: float, stage: str) -> tuple[bool, float, float]:
        """Whether any rank was asked to stop, the longest time since, and the longest way ahead, through `stage`."""
        stop = self.watch.stop
        state = torch.tensor([float(stop()), stop.seconds, ahead], dtype=torch.float64)
        dist.all_reduce(state, op=dist.ReduceOp.MAX, group=self.world.control_group)
        self.watch.met(stage)
        asked, seconds, longest = state.tolist()
        return bool(asked), seconds, longest
