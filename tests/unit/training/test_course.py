"""When a run saves and as of which step, and where it goes on behind a rollback; with stand-ins for the store."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_sip.checkpoint.latest import checkpoint_folder
from megatron_sip.checkpoint.progress import Progress
from megatron_sip.config.groups import CheckpointConfig, Config, JudgeConfig, TrainingConfig
from megatron_sip.data.cursor import Ranges
from megatron_sip.errors import CheckpointError, DataError, SipError
from megatron_sip.rollout.engine import Rollouts
from megatron_sip.rollout.pending import PendingBatch
from megatron_sip.training import course as course_module
from megatron_sip.training.course import Course

BATCH = 4
BEGIN = Progress(0, 0, {}, (), (0.5,))


class Store:
    """Keeps what is saved; a save is durable at once, or with the next call of `finish`."""

    def __init__(self, durable_at_once: bool = True) -> None:
        self.saved: dict[int, Progress] = {}
        self.last_begun: int | None = None
        self.last_saved: int | None = None
        self.durable_at_once = durable_at_once
        self.damaged: set[int] = set()

    def save(self, _trainer: object, progress: Progress) -> None:
        self.saved[progress.iteration] = progress
        self.last_begun = progress.iteration
        if self.durable_at_once:
            self.finish()

    def poll(self) -> None:
        """A write that is under way stays under way."""

    def finish(self) -> None:
        self.last_saved = self.last_begun


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A course of 12 iterations that saves every fourth and goes back after two bad steps."""

    def make_course(
        store: Store,
        begin: Progress = BEGIN,
        load: str | None = None,
        behind: tuple[int, ...] = (),
        judge_lag: int = 0,
        **training: int,
    ) -> Course:
        def read(folder: Path, *_: object, **__: object) -> Progress:
            return store.saved[int(folder.name.removeprefix("iter_"))]

        def choose(root: Path, *_: object, named: int, among: set[int] | None) -> Path:
            lawful = store.saved if among is None else among
            whole = [iteration for iteration in lawful if iteration <= named and iteration not in store.damaged]
            if not whole:
                raise CheckpointError("no whole checkpoint is left")
            return checkpoint_folder(root, max(whole))

        monkeypatch.setattr(course_module.dist_checkpoint, "load", read)
        monkeypatch.setattr(course_module, "choose", choose)
        monkeypatch.setattr(course_module, "require_own_model", lambda *_: None)
        config = Config(
            training=TrainingConfig(
                **{"train_iters": 12, "max_skipped_iterations": 2, "global_batch_size": BATCH, **training}
            ),
            judge=JudgeConfig(judge_lag=judge_lag),
            checkpoint=CheckpointConfig(save="saved", save_interval=4, load=load),
        )
        watch = SimpleNamespace(stage=lambda *_: nullcontext(), feed=lambda: None)
        leader = SimpleNamespace(watch=watch, world=None, together=lambda action: action())
        trainer = SimpleNamespace(recent_losses=())
        stream = SimpleNamespace(state_dict=lambda consumed: {"at": consumed}, check_state=check_state)
        journal = SimpleNamespace(checkpointed=lambda _iteration: None, stand_at=lambda _progress: None)
        return Course(config, leader, trainer, stream, store, journal, begin, behind)

    return make_course


def check_state(state: dict[str, Any]) -> None:
    if "other data" in state:
        raise DataError("the checkpoint was trained on another stream of samples")


REPORTER: Any = SimpleNamespace(rolled_back=lambda _done: None, say=print)


def walk(course: Course, *steps: str) -> None:
    """Steps with these outcomes; "" is an accepted one."""
    for skipped in steps:
        course.advance(skipped, BATCH)
        if course.stuck:
            course.roll_back(REPORTER)
        else:
            course.save_if_due()


def test_it_saves_at_the_interval_and_at_the_end(make: Any) -> None:
    store = Store()
    course = make(store)
    walk(course, *[""] * 10)
    course.finish()
    assert sorted(store.saved) == [4, 8, 10]
    assert store.saved[10] == Progress(10, 40, {"at": 40}, (), (0.5,))


def test_a_save_that_falls_due_amid_bad_steps_waits_for_an_accepted_one(make: Any) -> None:
    store = Store()
    course = make(store)
    walk(course, "", "", "", "spike", "", "", "", "")
    assert sorted(store.saved) == [5, 8]


def test_a_run_that_is_stopped_amid_bad_steps_saves_as_of_the_last_step_before_them(make: Any) -> None:
    store = Store()
    course = make(store)
    walk(course, *[""] * 5, "no_pairs", "non_finite")
    course.finish()
    assert sorted(store.saved) == [4, 6]
    assert store.saved[6].consumed_samples == 6 * BATCH


def test_the_last_iteration_is_saved_also_if_it_was_bad(make: Any) -> None:
    store = Store()
    course = make(store, train_iters=6)
    walk(course, *[""] * 5, "spike")
    assert course.ended
    course.finish()
    assert sorted(store.saved) == [4, 6]


def test_a_rollback_goes_on_behind_the_checkpoint_and_past_the_bad_samples(make: Any) -> None:
    store = Store()
    course = make(store)
    walk(course, *[""] * 5, "non_finite", "non_finite")
    assert course.progress == Progress(4, 16, {"at": 16}, ((20, 28),), (0.5,))
    # On disk at once: a kill before the next save must not bring the bad samples back.
    assert store.saved[4] == course.progress
    walk(course, "", "", "", "")
    assert store.saved[8] == Progress(8, 32, {"at": 32}, ((20, 28),), (0.5,))


def test_a_rollback_goes_behind_a_checkpoint_that_is_no_longer_whole(make: Any) -> None:
    store = Store()
    course = make(store, max_rollbacks=2)
    walk(course, *[""] * 9)
    store.damaged.add(8)
    walk(course, "non_finite", "non_finite")
    assert course.progress == Progress(4, 16, {"at": 16}, ((36, 44),), (0.5,))
    assert store.saved[4] == course.progress
    # The rollback counts as one to the checkpoint that was taken: the third to it is one too many.
    walk(course, "non_finite", "non_finite")
    with pytest.raises(SipError, match="again after 2 rollbacks to the checkpoint of iteration 4"):
        walk(course, "non_finite", "non_finite")


def at(iteration: int, **stream: str) -> Progress:
    return Progress(iteration, BATCH * iteration, stream, (), (0.5,))


@pytest.mark.parametrize("began", ["here", "elsewhere"])
def test_a_rollback_takes_no_checkpoint_of_an_earlier_run(make: Any, began: str) -> None:
    """One of 3 stands in the folder; it is this run's only if the run went on from there."""
    store = Store()
    store.saved = {3: at(3)}
    course = make(store, at(3), "saved", (3,)) if began == "here" else make(store, at(3), "other")
    walk(course, "", "")
    store.damaged.add(4)
    walk(course, "spike")
    if began == "here":
        walk(course, "spike")
        assert course.progress.iteration == 3
    else:
        with pytest.raises(CheckpointError, match="no whole checkpoint is left"):
            walk(course, "spike")


def test_a_rollback_takes_no_checkpoint_of_other_data(make: Any) -> None:
    """An earlier one that is of this run's folder and chain, and was trained on another stream before --finetune."""
    store = Store()
    store.saved = {2: at(2, **{"other data": "yes"}), 8: at(8)}
    course = make(store, at(8), "saved", (8, 2))
    store.damaged.add(8)
    with pytest.raises(DataError, match="another stream"):
        walk(course, "spike", "spike")


def test_what_a_rollback_went_behind_the_start_for_is_saved_at_a_stop(make: Any) -> None:
    """Resumed at 8, back to 4, stopped at 7, or just at 8 again."""
    for last in (7, 8):
        store = Store()
        store.saved = {4: at(4), 8: at(8)}
        course = make(store, at(8), "saved", (8, 4))
        store.damaged.add(8)
        walk(course, "spike", "spike")
        for _ in range(4, last):
            course.advance("", BATCH)
        store.last_begun = None
        course.finish()
        assert store.last_begun == last
        assert store.saved[last] == course.progress


def test_a_run_that_is_stopped_before_its_first_step_saves_nothing(make: Any) -> None:
    store = Store()
    make(store, at(8), "saved", (8,)).finish()
    assert store.saved == {}


def test_a_rollback_takes_the_checkpoint_that_is_still_being_written(make: Any) -> None:
    course = make(Store(durable_at_once=False))
    walk(course, *[""] * 4, "non_finite", "non_finite")
    assert course.progress.iteration == 4
    assert course.progress.jumped == ((16, 24),)


def test_a_rollback_right_before_the_end_leaves_nothing_to_save(make: Any) -> None:
    store = Store()
    course = make(store, train_iters=6)
    walk(course, *[""] * 4, "spike", "spike")
    assert not course.ended
    course.finish()
    assert sorted(store.saved) == [4]


def rollouts_of(first: int) -> PendingBatch:
    """The rollouts of a batch, whose tokens tell the sample."""
    samples = tuple(range(first, first + BATCH))
    tokens = torch.tensor(samples)[:, None, None].expand(BATCH, 2, 3)
    return PendingBatch(samples, Rollouts(tokens, torch.full((BATCH, 2), 3)))


def test_rollouts_that_wait_are_saved_with_the_step_before_them(make: Any) -> None:
    store = Store()
    course = make(store, judge_lag=1)
    for iteration in range(6):
        course.advance("" if iteration < 5 else "non_finite", BATCH, rollouts_of(BATCH * (iteration + 1)))
        course.save_if_due()
    course.finish()
    # The step under way is bad, so the state is that before it, with the batch that it will train again.
    assert {at: progress.pending.samples[0] for at, progress in store.saved.items()} == {4: 16, 5: 20}


def test_rollouts_of_a_checkpoint_are_for_its_next_batch_alone(make: Any) -> None:
    def begun(course: Course, jumped: Ranges = ()) -> Course:
        course.progress = Progress(4, 16, {}, jumped, pending=rollouts_of(16))
        return course

    course = begun(make(Store(), judge_lag=1))
    found = course.written(4, [18, 19])
    assert found is not None
    assert found.tokens[:, 0, 0].tolist() == [18, 19]
    assert course.written(5, [18, 19]) is None
    # One sample of the batch was jumped over since, or the batch is larger: on no rank any of it is taken.
    assert begun(course, jumped=((17, 18),)).written(4, [18, 19]) is None
    assert begun(make(Store(), judge_lag=1, global_batch_size=8)).written(4, [18, 19]) is None
    assert begun(make(Store(), judge_lag=1, global_batch_size=2)).written(4, [16, 17]) is not None
    assert begun(make(Store(), judge_lag=0)).written(4, [18, 19]) is None


def test_without_a_checkpoint_it_ends(make: Any) -> None:
    course = make(Store())
    walk(course, "non_finite")
    with pytest.raises(SipError, match="no checkpoint yet"):
        walk(course, "non_finite")
