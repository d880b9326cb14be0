"""Prefixes of like length are written together; their rollouts come back in the order of the batch."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from megatron_sip.rollout.engine import Rollouts, Sampling
from megatron_sip.rollout.groups import RowGroup, divide
from megatron_sip.rollout.order import InBatchOrder, longest_first

SAMPLING = Sampling(num_rollouts=2, max_new_tokens=3, temperature=1.0, top_p=1.0, eod=0, stop_at_eod=True, seed=5)


def group_of(lengths: list[int]) -> RowGroup:
    tokens = torch.zeros(len(lengths) * SAMPLING.num_rollouts, SAMPLING.max_new_tokens, dtype=torch.int64)
    prefixes = [np.ones(length, dtype=np.int64) for length in lengths]
    return RowGroup(prefixes, range(len(lengths)), SAMPLING, tokens, lambda: torch.empty(0))


def rollouts_of(places: list[int]) -> Rollouts:
    """Rows that tell whose they are."""
    tokens = torch.tensor([[[10 + place, k, 1] for k in range(2)] for place in places])
    metrics = {"rollout/padding_share": (float(len(places)), 10.0)}
    return Rollouts(tokens, torch.tensor([[3, 1 + place % 3] for place in places]), metrics)


def test_the_longest_come_first_and_equals_keep_their_order() -> None:
    assert longest_first([np.ones(length) for length in (3, 7, 3, 9, 7, 1)]) == [3, 1, 4, 0, 2, 5]


def test_padding_of_a_group_is_what_its_prefixes_leave_of_its_width() -> None:
    group = group_of([5, 9, 2])
    assert group.padding(1) == (4 + 0 + 7, 27)
    assert group.padding(4) == (7 + 3 + 10, 36), "sequence parallel needs a multiple"
    assert group_of([6, 6]).padding(1) == (0, 12)


@pytest.mark.parametrize(("wave", "groups"), [(12, 1), (12, 3), (5, 2), (3, 1), (1, 1), (7, 4)])
def test_padding_of_all_waves_is_bounded_by_the_longest_and_the_shortest(wave: int, groups: int) -> None:
    draw = random.Random(3)
    for _ in range(20):
        lengths = [draw.randint(1, 60) for _ in range(12)]
        order = longest_first([np.ones(length) for length in lengths])
        padding, largest = 0, 0
        for start in range(0, len(order), wave):
            own = [lengths[place] for place in order[start : start + wave]]
            for some in divide(len(own), groups):
                padding += group_of(own[some]).padding(1)[0]
                largest = max(largest, some.stop - some.start)
        assert padding <= (largest - 1) * (max(lengths) - min(lengths))


def test_waves_come_back_in_the_order_of_the_batch_and_are_told_in_runs() -> None:
    heard: list[tuple[int, Rollouts]] = []
    batch = InBatchOrder(6, SAMPLING, lambda first, rollouts: heard.append((first, rollouts)))
    for places, told in (([5, 0, 4], [(0, 1), (4, 2)]), ([2, 1, 3], [(1, 3)])):
        before = len(heard)
        batch.take(places, rollouts_of(places))
        assert [(first, len(rollouts.tokens)) for first, rollouts in heard[before:]] == told
    whole, wanted = batch.whole(), rollouts_of([0, 1, 2, 3, 4, 5])
    assert torch.equal(whole.tokens, wanted.tokens)
    assert torch.equal(whole.lengths, wanted.lengths)
    assert whole.metrics == {"rollout/padding_share": (6.0, 20.0)}
    for first, rollouts in heard:
        assert torch.equal(rollouts.tokens, wanted.tokens[first : first + len(rollouts.tokens)])
        assert torch.equal(rollouts.lengths, wanted.lengths[first : first + len(rollouts.tokens)])
