"""Which batches are begun before which is trained, by the state machine alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_sip.config.groups import Config, JudgeConfig, TrainingConfig
from megatron_sip.training.overlap import Overlap, lag_of


class Batch:
    """A batch that can be given up."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


def course(lag: int, iterations: int, first: int = 0) -> list[str]:
    """What is begun (b) and trained (t) in a run from `first` to the end."""
    overlap: Overlap[Batch] = Overlap(lag, iterations)
    events = []
    for iteration in range(first, iterations):
        for coming in overlap.due(iteration):
            overlap.add(coming, Batch(f"batch {coming}"))
            events.append(f"b{coming}")
        assert overlap.take(iteration).name == f"batch {iteration}"
        assert overlap.ahead == min(lag, iterations - iteration - 1)
        events.append(f"t{iteration}")
    return events


def test_without_lag_batches_are_begun_and_trained_in_turn() -> None:
    assert course(0, 3) == ["b0", "t0", "b1", "t1", "b2", "t2"]


def test_with_lag_a_batch_is_begun_before_the_one_before_it_is_trained() -> None:
    assert course(1, 4) == ["b0", "b1", "t0", "b2", "t1", "b3", "t2", "t3"]


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("iterations", [1, 2, 7])
def test_every_batch_is_begun_once_and_none_beyond_the_end(lag: int, iterations: int) -> None:
    begun = [event for event in course(lag, iterations) if event.startswith("b")]
    assert begun == [f"b{iteration}" for iteration in range(iterations)]


def test_a_resumed_run_begins_the_waiting_batch_again_and_then_goes_on() -> None:
    assert course(1, 5, first=2) == ["b2", "b3", "t2", "b4", "t3", "t4"]


def test_only_what_waits_is_told_and_given_up() -> None:
    overlap: Overlap[Batch] = Overlap(1, 9)
    first, second = Batch("0"), Batch("1")
    overlap.add(0, first)
    overlap.add(1, second)
    assert overlap.take(0) is first
    assert overlap.waiting(0) is None
    assert overlap.waiting(1) is second
    overlap.forget()
    assert (first.cancelled, second.cancelled) == (False, True)
    assert overlap.due(1) == [1, 2]
    with pytest.raises(KeyError):
        overlap.take(1)


def test_objectives_without_judges_have_no_lag() -> None:
    config = Config(judge=JudgeConfig(judge_lag=1))
    assert lag_of(config) == 1
    assert lag_of(Config()) == 0
    for objective in ("ntp", "sft-rewrite", "sft-rollout", "dpo-rewrite-over-rollout"):
        assert lag_of(replace(config, training=TrainingConfig(objective=objective))) == 0  # type: ignore[arg-type]
    assert lag_of(replace(config, training=TrainingConfig(objective="rf-nll"))) == 1
