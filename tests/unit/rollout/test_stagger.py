"""The order in which groups of rows pass the pipeline stages."""

from __future__ import annotations

from itertools import pairwise

import pytest

from megatron_sip.rollout.groups import divide
from megatron_sip.rollout.stagger import Pass, Stagger

PLANS = [Stagger(stages, groups, steps) for stages in (1, 2, 3, 4) for groups in (1, 2, 3, 4, 7) for steps in (1, 2, 5)]


def turns_of(plan: Stagger) -> list[dict[Pass, int]]:
    """By stage, the turn of each pass."""
    return [
        {found: turn for turn in range(plan.turns) if (found := plan.at(turn, stage))} for stage in range(plan.stages)
    ]


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_every_stage_has_every_pass_when_what_it_needs_is_there(plan: Stagger) -> None:
    found = turns_of(plan)
    for stage in found:
        assert list(stage) == [Pass(step, group) for step in range(plan.steps) for group in range(plan.groups)]
    for before, behind in pairwise(found):
        assert all(behind[item] == turn + 1 for item, turn in before.items()), "hidden states are used at once"
    for item, turn in found[0].items():
        if item.step:
            assert turn > found[-1][Pass(item.step - 1, item.group)], "a token is drawn before it is continued"


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_what_is_sent_is_received_in_the_same_turn(plan: Stagger) -> None:
    last, hidden, tokens = plan.stages - 1, 0, 0
    for turn in range(plan.turns):
        all_of = [plan.behind(turn, stage) for stage in range(plan.stages)]
        for sender, receiver in pairwise(all_of):
            assert sender.hidden_out == receiver.hidden_in
            hidden += sender.hidden_out is not None
        assert all_of[0].hidden_in is all_of[last].hidden_out is None
        assert [part.tokens_out for part in all_of[:last]] == [None] * last
        assert [part.tokens_in for part in all_of[1:]] == [None] * last
        if last:
            assert all_of[last].tokens_out == all_of[0].tokens_in
            tokens += all_of[0].tokens_in is not None
    assert hidden == last * plan.groups * plan.steps
    assert tokens == (plan.groups * (plan.steps - 1) if last else 0)


@pytest.mark.parametrize(
    ("stages", "groups", "turns"),
    [(1, 1, 16), (2, 1, 32), (2, 2, 33), (4, 4, 67), (4, 1, 64), (2, 5, 81)],
)
def test_turns_of_a_block(stages: int, groups: int, turns: int) -> None:
    """One group takes a turn for each stage and token; as many as stages keep all busy but at the ends."""
    assert Stagger(stages, groups, 16).turns == turns


@pytest.mark.parametrize(
    ("prefixes", "groups", "sizes"),
    [(8, 1, [8]), (8, 2, [4, 4]), (8, 3, [2, 3, 3]), (3, 8, [1, 1, 1]), (7, 4, [1, 2, 2, 2])],
)
def test_prefixes_are_divided_evenly(prefixes: int, groups: int, sizes: list[int]) -> None:
    found = divide(prefixes, groups)
    assert [one.stop - one.start for one in found] == sizes
    assert [row for one in found for row in range(prefixes)[one]] == list(range(prefixes))
