"""Which samples come next behind jumped ones."""

from __future__ import annotations

import random

import pytest

from megatron_sip.data.cursor import count, indices_in, merged, next_sample, ranges_of, sample_indices


def by_counting(consumed: int, number: int, jumped: set[int]) -> list[int]:
    """The definition: walk over all indices that are not jumped."""
    free = [index for index in range(1000) if index not in jumped]
    return free[consumed : consumed + number]


def test_without_jumps_the_index_is_the_count() -> None:
    assert sample_indices(12, 4, ()) == [12, 13, 14, 15]
    assert next_sample(0, ()) == 0


@pytest.mark.parametrize(
    ("consumed", "number", "jumped", "wanted"),
    [
        (20, 4, ((24, 36),), [20, 21, 22, 23]),  # the last batch before the range
        (24, 4, ((24, 36),), [36, 37, 38, 39]),  # the first behind it
        (28, 4, ((24, 36),), [40, 41, 42, 43]),
        (21, 6, ((24, 36),), [21, 22, 23, 36, 37, 38]),  # another batch size: nothing is lost on either side
        (0, 3, ((0, 2), (3, 4)), [2, 4, 5]),
        (5, 0, ((0, 2),), []),
    ],
)
def test_batches_around_a_jump(consumed: int, number: int, jumped: tuple, wanted: list[int]) -> None:
    assert sample_indices(consumed, number, jumped) == wanted


def test_equals_counting_on_random_ranges() -> None:
    draw = random.Random(3)
    for _ in range(500):
        starts = [draw.randrange(60) for _ in range(draw.randrange(5))]
        jumped = merged((start, start + draw.randrange(9)) for start in starts)
        consumed, number = draw.randrange(60), draw.randrange(12)
        wanted = by_counting(consumed, number, set(indices_in(jumped)))
        assert sample_indices(consumed, number, jumped) == wanted, (consumed, number, jumped)


def test_batches_of_changing_sizes_take_every_sample_once() -> None:
    jumped = ((8, 16), (17, 19))
    taken: list[int] = []
    for size in (4, 4, 3, 3, 8, 8):
        taken += sample_indices(len(taken), size, jumped)
    assert taken == by_counting(0, 30, set(indices_in(jumped)))


def test_a_later_jump_leaves_the_past_as_it_was() -> None:
    before, after = ((8, 12),), ((8, 12), (40, 48))
    assert sample_indices(0, 36, before) == sample_indices(0, 36, after)
    assert next_sample(36, before) == 40
    assert next_sample(36, after) == 48


def test_whole_batches_that_were_jumped_keep_batches_aligned() -> None:
    """Walk mode deals cuts by aligned batches; its batch size never changes, and jumps are whole batches."""
    jumped = merged([(12, 16), (16, 20), (32, 36)])
    assert [next_sample(4 * step, jumped) % 4 for step in range(12)] == [0] * 12


def test_ranges() -> None:
    assert merged([(5, 7), (1, 2), (6, 9), (2, 3), (4, 4)]) == ((1, 3), (5, 9))
    assert ranges_of([3, 1, 2, 7]) == ((1, 4), (7, 8))
    assert indices_in(((1, 4), (7, 8))) == [1, 2, 3, 7]
    assert count(((1, 4), (7, 8))) == 4
    with pytest.raises(ValueError, match="no range"):
        merged([(3, 2)])
    with pytest.raises(ValueError, match="at least 0"):
        sample_indices(-1, 2, ())
