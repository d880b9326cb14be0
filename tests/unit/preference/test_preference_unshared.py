"""Two rows a pair, by hand."""

from __future__ import annotations

import pytest
import torch

from megatron_sip.loss.segments import of_pairs, segment_sums
from megatron_sip.preference.layout import position_ids, scored_tokens
from megatron_sip.preference.unshared import scored_in_two_rows, two_rows
from megatron_sip.types import PreferenceBatch


def two_pairs() -> PreferenceBatch:
    """Prefix 11 12 13, chosen 21 22, rejected 31 32 33; prefix 14, chosen 23, rejected 34 35, not valid."""
    return PreferenceBatch(
        tokens=torch.tensor([[11, 12, 13, 21, 22, 31, 32, 33], [14, 23, 34, 35, 0, 0, 0, 0]]),
        prefix_length=torch.tensor([3, 1]),
        chosen_length=torch.tensor([2, 1]),
        rejected_length=torch.tensor([3, 2]),
        valid=torch.tensor([1.0, 0.0]),
        sample_index=torch.tensor([7, 8]),
    )


def test_each_suffix_has_a_row_with_the_prefix() -> None:
    rows = two_rows(two_pairs())
    assert rows.tokens.tolist() == [
        [11, 12, 13, 21, 22, 0],
        [11, 12, 13, 31, 32, 33],
        [14, 23, 0, 0, 0, 0],
        [14, 34, 35, 0, 0, 0],
    ]
    assert rows.layout().tolist() == [[3, 2, 0], [3, 3, 0], [1, 1, 0], [1, 2, 0]]
    assert rows.valid.tolist() == [1.0, 1.0, 0.0, 0.0]
    assert rows.sample_index.tolist() == [7, 7, 8, 8]
    assert position_ids(rows.layout(), rows.width)[1].tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(("multiple", "width"), [(1, 6), (4, 8), (8, 8)])
def test_the_width_is_a_multiple_and_padding_is_empty(multiple: int, width: int) -> None:
    rows = two_rows(two_pairs(), multiple)
    assert rows.width == width
    beyond = torch.arange(width)[None, :] >= rows.layout().sum(1)[:, None]
    assert not rows.tokens[beyond].any()


@pytest.mark.parametrize("with_prefix", [False, True])
def test_the_same_tokens_are_scored_and_summed_for_the_same_pair(with_prefix: bool) -> None:
    batch = two_pairs()
    shared, rows = scored_tokens(batch, with_prefix=with_prefix), two_rows(batch)
    own = scored_in_two_rows(rows, with_prefix=with_prefix)
    assert sorted(own.target.tolist()) == sorted(shared.target.tolist())
    # What predicts a token is the token before it in its own row.
    predicting = rows.tokens[own.row, own.source].tolist()
    assert dict(zip(own.target.tolist(), predicting, strict=True)) == {
        **{21: 13, 22: 21, 31: 13, 32: 31, 33: 32, 23: 14, 34: 14, 35: 34},
        **({12: 11, 13: 12} if with_prefix else {}),
    }
    sums = of_pairs(segment_sums(own.target.double(), own, rows.rows))
    wanted = segment_sums(shared.target.double(), shared, batch.rows)
    for name in ("chosen", "rejected", "prefix"):
        assert getattr(sums, name).tolist() == getattr(wanted, name).tolist()
