"""Micro-batches of rows of similar length, by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_sip.preference.arrange import arrange
from megatron_sip.preference.micro_batches import MicroRows, by_length, padding, places
from megatron_sip.types import PreferenceBatch

TOTALS = (10, 30, 20, 40)


def batch_of(lengths: list[tuple[int, int, int]]) -> PreferenceBatch:
    """Rows of these lengths; the tokens of the first are 100, 101 and so on, of the second 200, 201 and so on."""
    layout, width = torch.tensor(lengths), max(map(sum, lengths))
    place = torch.arange(width)[None, :]
    return PreferenceBatch(
        tokens=torch.where(place < layout.sum(1)[:, None], 100 * torch.arange(1, len(lengths) + 1)[:, None] + place, 0),
        prefix_length=layout[:, 0],
        chosen_length=layout[:, 1],
        rejected_length=layout[:, 2],
        valid=torch.ones(len(lengths)),
        sample_index=torch.arange(len(lengths)),
    )


def single_rows(totals: tuple[int, ...]) -> torch.Tensor:
    """A row a pair, with suffixes of 2 and 3."""
    return torch.tensor([[[total - 5, 2, 3]] for total in totals])


def test_rows_of_similar_length_go_together_the_longest_first() -> None:
    layout = single_rows(TOTALS)
    micros = by_length(layout, 2)
    assert micros == (MicroRows((3, 1), 40), MicroRows((2, 0), 20))
    assert padding(layout, micros) == (20, 120)
    assert [micro.width for micro in by_length(layout, 1)] == [40, 30, 20, 10]
    assert padding(layout, by_length(layout, 1)) == (0, 100)
    assert padding(layout, by_length(layout, 4)) == (60, 160)


def test_what_comes_in_the_order_of_the_micro_batches_goes_back_to_that_of_the_batch() -> None:
    micros = by_length(single_rows(TOTALS), 2)
    values = torch.tensor([TOTALS[pair] for micro in micros for pair in micro.pairs])
    assert values.tolist() == [40, 30, 20, 10]
    assert values[places(micros)].tolist() == list(TOTALS)


def test_widths_are_multiples() -> None:
    layout = single_rows((10, 31, 20, 40))
    micros = by_length(layout, 1, width_multiple=4)
    assert [micro.width for micro in micros] == [40, 32, 20, 12]
    assert padding(layout, micros) == (3, 104)


def test_rows_with_the_same_lengths_are_neighbours_in_the_order_of_the_batch() -> None:
    layout = torch.tensor([[[4, 2, 2]], [[5, 1, 2]], [[4, 2, 2]], [[5, 1, 2]]])
    assert [micro.pairs for micro in by_length(layout, 2)] == [(0, 2), (1, 3)]


def test_two_rows_of_a_pair_stay_together() -> None:
    layout = torch.tensor([[[4, 2, 0], [4, 8, 0]], [[9, 1, 0], [9, 2, 0]]])
    micros = by_length(layout, 1)
    assert micros == (MicroRows((0,), 12), MicroRows((1,), 11))
    assert padding(layout, micros) == (7, 46)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_padding_is_bounded_whatever_the_lengths(size: int) -> None:
    """At most (size - 1) x (longest - shortest) for all rows, and never more than in the order of the batch."""
    generator = np.random.default_rng(3)
    for rows in (8, 64):
        totals = tuple(int(total) for total in generator.integers(128, 1921, rows))
        padded, positions = padding(single_rows(totals), by_length(single_rows(totals), size))
        assert padded <= (size - 1) * (max(totals) - min(totals))
        assert positions - padded == sum(totals)
        in_order = sum(size * max(totals[start : start + size]) for start in range(0, rows, size))
        assert positions <= in_order


LENGTHS = [(2, 1, 1), (5, 2, 1), (3, 1, 2), (1, 3, 3)]


def test_a_pair_is_read_as_one_row() -> None:
    arranged = arrange(batch_of(LENGTHS), 2, shares_prefix=True)
    assert (arranged.each, arranged.widths, arranged.padding()) == (1, {8, 6}, (3, 28))
    assert [micro.pairs for micro in arranged.micros] == [(1, 3), (2, 0)]
    assert arranged.places().tolist() == [3, 0, 2, 1]
    first, second = (rows.tokens.tolist() for _, rows in arranged.split())
    assert first == [[200, 201, 202, 203, 204, 205, 206, 207], [400, 401, 402, 403, 404, 405, 406, 0]]
    assert second == [[300, 301, 302, 303, 304, 305], [100, 101, 102, 103, 0, 0]]


def test_a_pair_is_read_as_two_rows_side_by_side() -> None:
    arranged = arrange(batch_of(LENGTHS), 2, shares_prefix=False)
    assert (arranged.each, arranged.widths, arranged.padding()) == (2, {7, 4}, (8, 44))
    # The longer rows of the pairs have 3, 7, 5 and 4 tokens.
    assert [micro.pairs for micro in arranged.micros] == [(1, 2), (3, 0)]
    (_, first), (_, second) = arranged.split()
    assert first.tokens[:2].tolist() == [[200, 201, 202, 203, 204, 205, 206], [200, 201, 202, 203, 204, 207, 0]]
    assert second.tokens[:2].tolist() == [[400, 401, 402, 403], [400, 404, 405, 406]]


@pytest.mark.parametrize(("rows", "size"), [(3, 2), (4, 0), (0, 1)])
def test_rows_that_do_not_split_are_refused(rows: int, size: int) -> None:
    with pytest.raises(ValueError, match=f"{rows} rows do not split into micro-batches of {size}"):
        by_length(torch.ones(rows, 1, 3, dtype=torch.int64), size)
