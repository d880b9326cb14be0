"""Which cuts documents offer."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_sip.config.groups import DataConfig
from megatron_sip.data.cut import CutRule, nominal_position, plan_cuts, prefix_start, settle_position
from megatron_sip.errors import ConfigError


def _rule(**settings) -> CutRule:
    base = {"seq_length": 20, "suffix_length": 4, "min_prefix_length": 3}
    return CutRule.from_config(DataConfig(**{**base, **settings}))


def test_random_offers_one_cut_a_document_and_counts_the_rest():
    cuts, skipped = plan_cuts(np.array([0, 3, 6, 7, 50]), _rule())
    assert cuts.tolist() == [0, 0, 0, 1, 1]
    assert skipped == {"empty_document": 1, "document_below_minimum": 2, "document_without_room_for_a_cut": 0}


def test_documents_above_a_low_minimum_without_room_are_counted_apart():
    cuts, skipped = plan_cuts(np.array([0, 3, 6, 7]), _rule(min_document_length=5))
    assert cuts.tolist() == [0, 0, 0, 1]
    assert skipped == {"empty_document": 1, "document_below_minimum": 1, "document_without_room_for_a_cut": 1}
    cuts, skipped = plan_cuts(np.array([8, 12]), _rule(min_document_length=10))
    assert cuts.tolist() == [0, 1]
    assert skipped["document_below_minimum"] == 1


def test_walk_goes_suffix_after_suffix():
    rule = _rule(split_mode="walk")
    cuts, skipped = plan_cuts(np.array([6, 7, 10, 11, 50]), rule)
    assert cuts.tolist() == [0, 1, 1, 2, 11]
    assert skipped["tokens_in_walk_tails"] == 0 + 3 + 0 + 3
    assert [nominal_position(50, ordinal, 0.9, rule) for ordinal in range(3)] == [3, 7, 11]
    assert nominal_position(50, 10, 0.0, rule) + rule.suffix <= 50


def test_random_position_covers_exactly_what_has_room():
    rule = _rule()
    positions = {nominal_position(10, 0, uniform, rule) for uniform in np.linspace(0, 1, 500, endpoint=False)}
    assert positions == {3, 4, 5, 6}
    assert nominal_position(10, 0, np.nextafter(1.0, 0.0), rule) == 6


def test_prefix_is_the_last_tokens_before_the_cut():
    rule = _rule()
    assert rule.max_prefix == 16
    assert [prefix_start(position, rule) for position in (3, 16, 17, 40)] == [0, 0, 1, 24]
    assert prefix_start(40, _rule(max_prefix_length=5)) == 35


def test_position_moves_to_the_nearest_character_boundary_inside_the_room():
    rule = _rule()
    assert settle_position(5, 20, rule, lambda at: at in {4, 7}) == 7
    assert settle_position(5, 9, rule, lambda at: at in {4, 7}) == 4
    assert settle_position(3, 8, rule, lambda at: at in {1, 5, 9}) == 3
    assert settle_position(5, 20, rule, lambda at: False) == 5


@pytest.mark.parametrize(
    ("settings", "flags"),
    [
        ({"seq_length": 6}, ["--min-prefix-length", "--seq-length"]),
        ({"max_prefix_length": 17}, ["--max-prefix-length", "--suffix-length", "--seq-length"]),
        ({"max_prefix_length": 2}, ["--min-prefix-length", "--max-prefix-length"]),
        ({"suffix_length": 0}, ["--suffix-length"]),
        ({"min_prefix_length": 0}, ["--min-prefix-length"]),
    ],
)
def test_impossible_settings_name_their_flags(settings, flags):
    with pytest.raises(ConfigError) as caught:
        _rule(**settings)
    assert all(flag in str(caught.value) for flag in flags)
