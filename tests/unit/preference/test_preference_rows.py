"""Rows, their positions and their scored tokens, by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_sip.preference.collate import collate, ntp_batch
from megatron_sip.preference.layout import CHOSEN, PREFIX, REJECTED, position_ids, scored_tokens
from megatron_sip.types import Candidate, CandidateKind, Cut, NoPair, NoPairReason, Pair, PreferenceBatch

NOTHING = NoPair(NoPairReason.TIE)


def cut(sample: int, prefix: list[int], suffix: list[int]) -> Cut:
    return Cut(sample, 0, len(prefix), np.array(prefix, dtype=np.int64), np.array(suffix, dtype=np.int64))


def pair(chosen: tuple[int, ...], rejected: tuple[int, ...] | None) -> Pair:
    lost = None if rejected is None else Candidate(CandidateKind.ROLLOUT, rejected, "", 0)
    return Pair(Candidate(CandidateKind.ORIGINAL, chosen, ""), lost)


def segments(batch: PreferenceBatch, row: int) -> tuple[list[int], list[int], list[int]]:
    """What collate put into a row, read back by the lengths."""
    p, c, r = batch.layout()[row].tolist()
    ids = batch.tokens[row].tolist()
    assert set(ids[p + c + r :]) <= {0}
    return ids[:p], ids[p : p + c], ids[p + c : p + c + r]


def two_rows() -> PreferenceBatch:
    """Row 0: prefix 11 12 13, chosen 21 22, rejected 31 32 33. Row 1: prefix 14, chosen 23, rejected 34 35."""
    first = (cut(7, [11, 12, 13], [21, 22]), pair((21, 22), (31, 32, 33)))
    second = (cut(8, [14], [23]), pair((23,), (34, 35)))
    return collate([first, second])


def test_rows_round_trip_in_order() -> None:
    batch = two_rows()
    assert (batch.rows, batch.width) == (2, 8)
    assert segments(batch, 0) == ([11, 12, 13], [21, 22], [31, 32, 33])
    assert segments(batch, 1) == ([14], [23], [34, 35])
    assert batch.valid.tolist() == [1.0, 1.0]
    assert batch.valid.dtype == torch.float32
    assert batch.sample_index.tolist() == [7, 8]


@pytest.mark.parametrize(("multiple", "width"), [(1, 8), (3, 9), (8, 8), (16, 16)])
def test_width_is_a_multiple(multiple: int, width: int) -> None:
    item = (cut(7, [11, 12, 13], [21, 22]), pair((21, 22), (31, 32, 33)))
    assert collate([item], width_multiple=multiple).width == width
    assert ntp_batch([cut(0, [1, 2, 3], [4, 5, 6, 7, 8])], multiple).width == width


def test_a_long_prefix_loses_its_start() -> None:
    batch = collate([(cut(0, [1, 2, 3, 4], [9]), pair((9,), (8,)))], max_prefix=2)
    assert segments(batch, 0) == ([3, 4], [9], [8])


def test_a_row_without_a_pair_is_short_and_invalid() -> None:
    long = cut(3, list(range(1, 101)), list(range(101, 229)))
    batch = collate([(long, NOTHING), (cut(4, [1], [2]), pair((2,), (3,)))])
    assert segments(batch, 0) == ([99, 100], [101], [101])
    assert batch.valid.tolist() == [0.0, 1.0]
    assert batch.width == 4
    assert segments(collate([(long, NOTHING), (cut(4, [1], [2]), pair((2,), None))]), 0) == ([99, 100], [101], [])
    alone = collate([(cut(5, [6], [7]), NOTHING)])
    assert segments(alone, 0) == ([6], [7], [])


def test_next_token_rows_are_all_prefix() -> None:
    batch = ntp_batch([cut(0, [1, 2], [3]), cut(1, [4], [5])])
    assert segments(batch, 0) == ([1, 2, 3], [], [])
    assert segments(batch, 1) == ([4, 5], [], [])
    assert batch.valid.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("item", "options", "message"),
    [
        ((cut(0, [], [1]), pair((1,), (2,))), {}, "at least one token"),
        ((cut(0, [1], [1]), pair((), (2,))), {}, "at least one token"),
        ((cut(0, [1], [1]), pair((1,), ())), {}, "at least one token"),
        ((cut(0, [], [1]), NOTHING), {}, "at least one token"),
        ((cut(0, [1], [1]), pair((1,), (2,))), {"width_multiple": 0}, "width_multiple"),
        ((cut(0, [1], [1]), pair((1,), (2,))), {"max_prefix": 0}, "max_prefix"),
    ],
)
def test_rows_that_cannot_be_are_refused(item, options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collate([item], **options)
    with pytest.raises(ValueError, match="at least one row"):
        collate([])


def test_pairs_of_different_objectives_do_not_mix() -> None:
    with pytest.raises(ValueError, match="different objectives"):
        collate([(cut(0, [1], [2]), pair((2,), (3,))), (cut(1, [1], [2]), pair((2,), None))])


def test_both_suffixes_start_at_the_prefix_length() -> None:
    batch = two_rows()
    #        prefix | chosen | rejected | padding
    expected = [[0, 1, 2, 3, 4, 3, 4, 5], [0, 1, 1, 2, 0, 0, 0, 0]]
    assert position_ids(batch.layout(), batch.width).tolist() == expected
    plain = torch.tensor([[4, 0, 0], [2, 2, 0]])
    assert position_ids(plain, 5).tolist() == [[0, 1, 2, 3, 0], [0, 1, 2, 3, 0]]


def test_scored_tokens_by_hand() -> None:
    scored = scored_tokens(two_rows(), with_prefix=True)
    # (row, segment, source, target): the first token of both suffixes comes from the prefix's last position.
    expected = [
        (0, CHOSEN, 2, 21),
        (0, CHOSEN, 3, 22),
        (0, REJECTED, 2, 31),
        (0, REJECTED, 5, 32),
        (0, REJECTED, 6, 33),
        (0, PREFIX, 0, 12),
        (0, PREFIX, 1, 13),
        (1, CHOSEN, 0, 23),
        (1, REJECTED, 0, 34),
        (1, REJECTED, 2, 35),
    ]
    columns = (scored.row, scored.segment, scored.source, scored.target)
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == expected
    assert all(column.dtype == torch.int64 for column in columns)
    bare = scored_tokens(two_rows(), with_prefix=False)
    assert bare.target.tolist() == [21, 22, 31, 32, 33, 23, 34, 35]


def test_scored_tokens_of_rows_without_a_pair_stay() -> None:
    batch = collate([(cut(0, [1, 2, 3], [4]), NOTHING), (cut(1, [5], [6]), pair((6,), (7,)))])
    scored = scored_tokens(batch, with_prefix=False)
    assert scored.row.tolist() == [0, 0, 1, 1]
    assert scored.source.tolist() == [1, 1, 0, 0]
    assert scored.target.tolist() == [4, 4, 6, 7]


def test_scored_tokens_of_next_token_rows() -> None:
    batch = ntp_batch([cut(0, [1, 2], [3]), cut(1, [4], [5])])
    scored = scored_tokens(batch, with_prefix=True)
    assert scored.source.tolist() == [0, 1, 0]
    assert scored.target.tolist() == [2, 3, 5]
    assert scored_tokens(batch, with_prefix=False).row.numel() == 0


def test_a_row_that_is_taken_scores_the_same_tokens_as_the_whole() -> None:
    batch = two_rows()
    taken = batch.take([1], 4)
    assert segments(taken, 0) == ([14], [23], [34, 35])
    assert (taken.width, taken.sample_index.tolist()) == (4, [8])
    whole, second = scored_tokens(batch, with_prefix=True), scored_tokens(taken, with_prefix=True)
    mine = whole.row == 1
    assert whole.target[mine].tolist() == second.target.tolist()
    assert whole.source[mine].tolist() == second.source.tolist()


def test_a_suffix_without_a_prefix_is_refused() -> None:
    zero, one = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.int64)
    batch = PreferenceBatch(torch.ones(1, 2, dtype=torch.int64), zero, one, one, torch.ones(1), zero)
    with pytest.raises(ValueError, match="without a prefix"):
        scored_tokens(batch, with_prefix=False)
