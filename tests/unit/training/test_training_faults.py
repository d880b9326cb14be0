"""The stage watch's bookkeeping, and what is left of a step by it."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_sip.config.timeouts import STAGES
from megatron_sip.parallel import watch as watch_module
from megatron_sip.parallel.inquest import Place
from megatron_sip.parallel.leader import StopRequestedError
from megatron_sip.parallel.watch import StageWatch
from megatron_sip.training import faults
from megatron_sip.training.faults import Boundaries


class Clock:
    """`time` with a hand that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Stop:
    """A request to stop, as `StopSignal` tells of it."""

    again, reason, requested_at, signalled_at, seconds = None, "SIGTERM", None, None, 0.0

    def listen(self, _seconds: float = 0.0) -> None:
        """Nobody signals."""

    def __call__(self) -> bool:
        return self.requested_at is not None


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(watch_module, "time", made)
    return made


@pytest.fixture
def watch(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Iterator[StageWatch]:
    """A watch without its thread."""
    monkeypatch.setattr(StageWatch, "_run", lambda self: None)
    limits = {**dict.fromkeys(STAGES, 50.0), "rewrite": 7.0}
    made = StageWatch(limits, Stop(), 20.0)  # type: ignore[arg-type]
    yield made
    made.close()


def spend(watch: StageWatch, clock: Clock, stage: str, seconds: float) -> None:
    with watch.stage(stage, 3, (8, 11)):
        clock.now += seconds


def test_a_stage_inherits_what_is_not_said_and_gives_it_back(watch: StageWatch, clock: Clock) -> None:
    with watch.stage("train", 3, (8, 11)):
        with watch.stage("optimizer"):
            assert str(watch.place) == "stage optimizer of iteration 3 (samples 8 to 11)"
            clock.now += 2
        assert watch.place.stage == "train"
        clock.now += 1
    assert watch.usual_seconds("optimizer") == 2
    assert watch.usual_seconds("train") == 3
    # What lies between two stages counts as the one before.
    assert watch.place == Place("train", 3, (8, 11), 4)


def test_behind_an_error_the_place_stays(watch: StageWatch) -> None:
    with pytest.raises(MemoryError), watch.stage("train", 3, (8, 11)), watch.stage("optimizer"):
        raise MemoryError
    assert watch.place.stage == "optimizer"
    assert watch.usual_seconds("optimizer") == 0


def test_a_stage_that_is_none_is_refused(watch: StageWatch) -> None:
    with pytest.raises(ValueError, match="no stage 'rolout'"), watch.stage("rolout"):
        pass


def test_only_a_stage_without_progress_is_overdue(watch: StageWatch, clock: Clock) -> None:
    with watch.stage("rewrite", 3):
        clock.now += 6
        watch.feed()
        clock.now += 6
        assert watch._alarm() is None
        clock.now += 2
        alarm = watch._alarm()
    assert alarm is not None
    assert alarm.text == "no progress for 7 s in stage rewrite of iteration 3"
    assert "--stage-timeout rewrite=7" in alarm.advice
    assert watch._alarm() is None


def test_a_stop_must_be_agreed_in_time_but_nothing_cuts_a_save_short(watch: StageWatch, clock: Clock) -> None:
    watch.begin_steps()
    watch.stop.requested_at = watch.stop.signalled_at = clock.now  # type: ignore[misc]
    clock.now += 31
    with watch.stage("save"):
        assert watch._alarm() is None
    assert watch._alarm() is None
    clock.now += 31
    alarm = watch._alarm()
    assert alarm is not None
    assert alarm.status == 4
    assert "did not agree to stop within 30 s of SIGTERM (--sigterm-grace 20 and 10)" in alarm.text
    watch.stop_agreed()
    assert watch._alarm() is None


def test_ranks_that_are_well_are_given_the_time_to_their_next_boundary(watch: StageWatch, clock: Clock) -> None:
    """A train stage of 40 s, as it took before, with the signal at its second 1."""
    for _ in range(2):
        watch.met("train")
        clock.now += 40
    watch.met("train")
    clock.now += 1
    watch.stop.requested_at = watch.stop.signalled_at = clock.now  # type: ignore[misc]
    clock.now += 58
    watch.feed()
    assert watch._alarm() is None
    clock.now += 2
    alarm = watch._alarm()
    assert alarm is not None
    assert alarm.status == 4
    assert "did not agree to stop within 59 s of SIGTERM (--sigterm-grace 20 and 10, and the way to a far" in alarm.text
    # At the boundary they agree, which takes its time too; the way behind it was never long.
    watch.met("optimizer")
    clock.now += 9
    assert watch._alarm() is None
    clock.now += 2
    assert watch._alarm() is not None


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A world of one rank, whose exchanges are what it says itself."""
    monkeypatch.setattr(faults.dist, "all_reduce", lambda *_, **__: None)


@pytest.mark.usefixtures("alone")
def test_without_pipeline_a_step_can_be_given_up_before_each_micro_batch(watch: StageWatch, clock: Clock) -> None:
    world: Any = SimpleNamespace(pp_size=1, control_group=None)
    boundaries, begun = Boundaries(world, watch), []

    def train() -> None:
        with boundaries.stage("train", 3, (8, 11)):
            for micro_batch in range(9):
                boundaries.before_micro_batch()
                begun.append(micro_batch)
                clock.now += 10
                watch.stop.requested_at = 1010.0  # type: ignore[misc]
                watch.stop.seconds = clock.now - 1010  # type: ignore[misc]

    with pytest.raises(StopRequestedError):
        train()
    assert begun == [0, 1, 2, 3]  # the last one begins with the grace of 20 s


def test_with_pipeline_no_rank_waits_for_the_others_amid_a_pass(watch: StageWatch, clock: Clock) -> None:
    world: Any = SimpleNamespace(pp_size=2)  # without a group to meet in
    watch.stop.requested_at, watch.stop.seconds = clock.now, 1000.0  # type: ignore[misc]
    with watch.stage("train"):
        clock.now += 30
        Boundaries(world, watch).before_micro_batch()
        clock.now += 30
        assert watch._alarm() is None  # it counts as progress


def seconds_ahead(watch: StageWatch, stage: str) -> float:
    world: Any = SimpleNamespace()
    return Boundaries(world, watch).seconds_ahead(stage)


def test_what_remains_of_a_step(watch: StageWatch, clock: Clock) -> None:
    assert seconds_ahead(watch, "rollout") == 0  # nothing was ever seen
    for stage, seconds in {"data": 1.0, "rollout": 8.0, "rewrite": 0.01, "judge": 0.05, "train": 4.0}.items():
        spend(watch, clock, stage, seconds)
    assert seconds_ahead(watch, "rollout") == pytest.approx(12.06)
    assert seconds_ahead(watch, "judge") == pytest.approx(4.05)
    with watch.stage("rollout"):
        clock.now += 5
        assert seconds_ahead(watch, "rollout") == pytest.approx(7.06)
        clock.now += 50
        assert seconds_ahead(watch, "rollout") == pytest.approx(4.06)
    with watch.stage("train"), watch.stage("optimizer"):
        clock.now += 0.5
    assert seconds_ahead(watch, "optimizer") == pytest.approx(0.5)


def test_a_step_with_a_wait_for_judges_ahead_is_not_finished(watch: StageWatch, clock: Clock) -> None:
    spend(watch, clock, "judge", 5.0)
    assert seconds_ahead(watch, "rollout") == float("inf")
    assert seconds_ahead(watch, "train") == 0
