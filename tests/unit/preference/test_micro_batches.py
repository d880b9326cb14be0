"""Micro-batches of rows of similar length, by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_sip.preference.micro_batches import MicroRows, by_length, padding, places

TOTALS = (10, 30, 20, 40)


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


@pytest.mark.parametrize(("rows", "size"), [(3, 2), (4, 0), (0, 1)])
def test_rows_that_do_not_split_are_refused(rows: int, size: int) -> None:
    with pytest.raises(ValueError, match=f"{rows} rows do not split into micro-batches of {size}"):
        by_length(torch.ones(rows, 1, 3, dtype=torch.int64), size)
