"""Operations that a step really took, against counts by hand and against the formulas of a plan.

Against the products of the model itself: tests/distributed/layout_operations.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_cost_flops import SMALL

from megatron_sip.cost.done import DoneWork, done_flops, rollout_work, row_work
from megatron_sip.cost.flops import Flops, StepWork, causal_pairs, forward_flops, plain_flops, step_flops

WORK = StepWork(prefix=1024, suffix=128, rollouts=16, batch=4)


def test_rollouts_by_hand() -> None:
    """A prefix of 3 tokens with rows of 1 and 4, one of 2 tokens with a row of 2."""
    found = rollout_work([3, 2], [[1, 4], [2]])
    # The first row has its one token from the prefix' pass. Of the second, 3 are fed, which see 4, 5 and 6 tokens.
    # Of the third one is fed, which sees 3. The last layer attends at the end of each prefix alone.
    assert found == DoneWork(
        tokens=3 + 3 + 2 + 1,
        pairs=(1 + 2 + 3) + (4 + 5 + 6) + (1 + 2) + 3,
        logits=(1 + 3) + (1 + 1),
        spared_tokens=2 + 1,
        spared_pairs=(1 + 2) + 1,
    )


def test_rows_by_hand() -> None:
    """Prefix 3, chosen 2, rejected 1; in the last layer the positions that predict see 3, 4 and 3 tokens."""
    one, confined = [[3, 2, 1]], {"with_prefix": False, "confined": True}
    shared = DoneWork(
        tokens=6, pairs=(1 + 2 + 3) + (4 + 5) + 4, logits=3, spared_tokens=3, spared_pairs=19 - (3 + 4 + 3)
    )
    assert row_work(one, **confined) == shared
    assert row_work(one * 3, **confined) == shared + shared + shared
    apart = row_work(one, copies=2, **confined)
    assert apart == DoneWork(tokens=9, pairs=19 + 6, logits=3, spared_tokens=6, spared_pairs=25 - 10)
    scored = row_work(one, with_prefix=True, confined=False)
    assert scored == replace(shared, logits=3 + 2, spared_tokens=0, spared_pairs=0)


@pytest.mark.parametrize("copies", [1, 2])
def test_rows_of_one_length_are_those_of_a_plan(copies: int) -> None:
    planned = step_flops(SMALL, replace(WORK, share_prefix=copies == 1)).reference
    assert (
        done_flops(SMALL, row_work([[1024, 128, 128]] * 4, copies=copies, with_prefix=False, confined=False)) == planned
    )
    confined = done_flops(SMALL, row_work([[1024, 128, 128]] * 4, copies=copies, with_prefix=False, confined=True))
    assert confined.head == planned.head
    # In one layer of six there are the 256 suffix tokens, and queries, keys and values of the others.
    left = 4 * copies * 1024 * 2 * (320 * 320 + 3 * 320 * 896)
    assert planned.linear - confined.linear == left
    wanted = 5 / 6 * planned.attention + 4 * 2 * causal_pairs(128, 1023) * 4 * 320
    assert confined.attention == pytest.approx(wanted)


def test_rollouts_of_one_length_are_those_of_a_plan_less_a_token_a_row_and_the_last_layer() -> None:
    found = done_flops(SMALL, rollout_work([1024] * 4, [[128] * 16] * 4))
    # A plan counts 128 tokens a row, which all see the prefix, and no logits of the prefix.
    a_row = forward_flops(SMALL, 1, 1024 + 128, 1)
    spared = Flops(linear=2 * (320 * 320 + 3 * 320 * 896) * 1023, attention=4 * 320 * causal_pairs(1023))
    wanted = step_flops(SMALL, WORK).rollouts + -64 * a_row + -4 * spared + forward_flops(SMALL, 0, 0, 4)
    assert found.linear == wanted.linear
    assert found.attention == pytest.approx(wanted.attention)
    assert found.head == wanted.head


def test_next_token_rows_are_plain_training() -> None:
    rows = row_work([[1152, 0, 0]] * 4, with_prefix=True, confined=False)
    assert 3 * done_flops(SMALL, rows) == plain_flops(SMALL, WORK)


def test_nothing_done_is_nothing() -> None:
    assert done_flops(SMALL, DoneWork()) == Flops()
    assert row_work([], with_prefix=False, confined=True) == rollout_work([], []) == DoneWork()
