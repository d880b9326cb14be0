"""When a run goes back, which samples it leaves out, and when it gives up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_sip.checkpoint.progress import Progress, from_state, to_state
from megatron_sip.config.groups import TrainingConfig
from megatron_sip.data.cursor import sample_indices
from megatron_sip.errors import SipError
from megatron_sip.training.rollback import Recovery, Rollback

BATCH = 4
ROOT = Path("saved")


def recovery(limit: int = 3, rollbacks: int = 2) -> Recovery:
    return Recovery(TrainingConfig(max_skipped_iterations=limit, max_rollbacks=rollbacks))


def at(iteration: int, **more: object) -> Progress:
    return Progress(iteration, BATCH * iteration, {}, **more)


def loading(progress: Progress) -> Callable[[Path, int], Progress]:
    """A checkpoint store with one checkpoint."""

    def load(root: Path, iteration: int) -> Progress:
        assert (root, iteration) == (ROOT, progress.iteration)
        return progress

    return load


def bad(watch: Recovery, *iterations: int, reason: str = "non_finite") -> None:
    for iteration in iterations:
        watch.observe(iteration, reason, ((BATCH * (iteration - 1), BATCH * iteration),))


def test_bad_steps_in_a_row_are_counted_and_an_accepted_one_ends_them() -> None:
    watch = recovery()
    watch.checkpoint_at(ROOT, 2)
    bad(watch, 3, 4)
    assert not watch.calm
    watch.observe(5, "", ((16, 20),))
    assert watch.calm
    bad(watch, 6, 7)
    watch.observe(8, "no_pairs", ((28, 32),))  # tells nothing
    assert not watch.stuck
    bad(watch, 9)
    assert watch.stuck


def test_the_samples_at_fault_are_left_out_and_those_before_them_are_not() -> None:
    watch = recovery()
    watch.checkpoint_at(ROOT, 4)
    bad(watch, 7, 8)
    bad(watch, 9, reason="spike")
    now, done = watch.roll_back(at(9), loading(at(4)))
    assert done == Rollback(9, 4, "a non-finite loss or gradient or a loss spike", ((24, 36),), 16)
    assert (now.iteration, now.consumed_samples, now.jumped) == (4, 16, ((24, 36),))
    assert sample_indices(now.consumed_samples, 12, now.jumped) == [*range(16, 24), *range(36, 40)]
    assert watch.calm


def test_a_second_time_all_behind_the_checkpoint_is_left_out() -> None:
    watch = recovery()
    watch.checkpoint_at(ROOT, 4)
    bad(watch, 7, 8, 9)
    now, _ = watch.roll_back(at(9), loading(at(4)))
    # Iterations 5 and 6 are made again with samples 16 to 23, then 7 to 9 with what lies behind the jump.
    for iteration, first in ((7, 36), (8, 40), (9, 44)):
        watch.observe(iteration, "spike", ((first, first + BATCH),))
    assert watch.stuck
    again, done = watch.roll_back(Progress(9, 36, {}, now.jumped), loading(at(4)))
    assert done.jumped == ((16, 48),)
    assert again.jumped == ((16, 48),)


def test_earlier_jumps_stay() -> None:
    watch = recovery()
    watch.checkpoint_at(ROOT, 4)
    bad(watch, 7, 8, 9)
    now, _ = watch.roll_back(at(9, jumped=((20, 24), (60, 64))), loading(at(4)))
    assert now.jumped == ((20, 36), (60, 64))


def test_it_gives_up_where_going_back_does_not_help() -> None:
    watch = recovery(rollbacks=1)
    watch.checkpoint_at(ROOT, 4)
    bad(watch, 5, 6, 7)
    watch.roll_back(at(7), loading(at(4)))
    bad(watch, 5, 6, 7)
    with pytest.raises(SipError, match=r"3 iterations in a row .* after 1 rollbacks .* --max-rollbacks"):
        watch.roll_back(at(7), loading(at(4)))


def test_a_newer_checkpoint_is_progress() -> None:
    watch = recovery(rollbacks=1)
    watch.checkpoint_at(ROOT, 4)
    bad(watch, 5, 6, 7)
    watch.roll_back(at(7), loading(at(4)))
    watch.observe(5, "", ((28, 32),))
    watch.checkpoint_at(ROOT, 8)
    bad(watch, 9, 10, 11)
    assert watch.stuck
    _, done = watch.roll_back(at(11), loading(at(8)))
    assert done.jumped == ((32, 44),)


def test_without_a_checkpoint_it_stops_with_the_reason() -> None:
    watch = recovery()
    bad(watch, 1, 2, 3)
    with pytest.raises(SipError, match=r"non-finite .* no checkpoint yet .* --max-skipped-iterations"):
        watch.roll_back(at(3), loading(at(0)))
    never = recovery(rollbacks=0)
    never.checkpoint_at(ROOT, 4)
    bad(never, 5, 6, 7)
    with pytest.raises(SipError, match="--max-rollbacks is 0"):
        never.roll_back(at(7), loading(at(4)))


def test_progress_survives_a_checkpoint_and_older_ones_are_read() -> None:
    progress = Progress(7, 28, {"kind": "cuts"}, ((24, 36),), (0.69, 0.5))
    assert from_state({"other": 1, **to_state(progress)}) == progress
    assert from_state({"iteration": 7, "consumed_samples": 28, "stream": {}}) == Progress(7, 28, {})
