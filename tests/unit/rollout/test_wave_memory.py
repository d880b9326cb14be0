"""What a wave of rollouts takes, by hand, and the waves that fit. Real tensors: tests/distributed/rollout_memory.py."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_sip.rollout.wave_memory import StageSizes, WaveShape, even_wave, most_prefixes, wave_bytes

SIZES = StageSizes(layers=2, hidden=64, heads=4, groups=2, head_width=16, ffn=160, columns=1000, tp=1, element=4)
SHAPE = WaveShape(width=100, rollouts=8, tokens=20)
BLOCK = 128 * (4 + 2 * 8)


def test_what_each_part_takes() -> None:
    found = wave_bytes(SIZES, SHAPE, 3)
    assert found.prefixes == 2 * 2 * 2 * 16 * 4 * 300
    assert found.rows == 2 * 2 * 2 * 16 * 4 * 24 * 20
    assert found.drawn == 24 * 20 * (8 + 8)
    assert found.prefill == 300 * 4 * (4 * 64 + 5 * 160)
    # fp32 logits and probabilities, and a block of them with its sums.
    assert found.step == 24 * (1000 * (4 + 4) + BLOCK)
    assert found.peak == found.prefixes + found.drawn + max(found.prefill, found.rows + found.step)


def test_what_draws_a_token_takes() -> None:
    def of_a_row(sizes: StageSizes = SIZES, **changes: float) -> float:
        return wave_bytes(sizes, replace(SHAPE, **changes), 1).step / 8

    wide = replace(SIZES, columns=4000)
    assert of_a_row(wide, temperature=0.0) == 4000 * 4
    assert of_a_row(wide) == 4000 * (4 + 4) + BLOCK
    assert of_a_row(wide, temperature=0.7) == 4000 * (4 + 4 + 4) + BLOCK, "divided before they are exponentials"
    assert of_a_row(top_p=0.9) == 1000 * (4 + 4 + 4 * 8 + 1)
    assert of_a_row(replace(wide, element=2)) == 4000 * (2 + 4 + 4) + BLOCK
    # Half of the columns, which are gathered for a nucleus alone.
    half = replace(wide, columns=2000, tp=2)
    assert of_a_row(half) == 2000 * (4 + 4) + BLOCK
    assert of_a_row(half, top_p=0.9) == 2000 * 4 + 4000 * (2 * 4 + 4 + 4 * 8 + 1)


def test_groups_share_the_room_of_a_pass() -> None:
    whole, halves = wave_bytes(SIZES, SHAPE, 4), wave_bytes(SIZES, replace(SHAPE, pipelined=2), 4)
    assert (halves.prefill, halves.step) == (whole.prefill / 2, whole.step / 2)
    assert (halves.prefixes, halves.rows, halves.drawn) == (whole.prefixes, whole.rows, whole.drawn)
    assert wave_bytes(SIZES, replace(SHAPE, pipelined=2), 5).step == whole.step / 4 * 3, "the larger of both"


def test_a_stage_without_the_head_has_no_logits() -> None:
    found = wave_bytes(replace(SIZES, columns=0), SHAPE, 1)
    assert 0 < found.step < wave_bytes(SIZES, SHAPE, 1).step


@pytest.mark.parametrize("prefixes", [1, 2, 5, 12])
def test_the_largest_wave_that_fits_is_taken(prefixes: int) -> None:
    budget = wave_bytes(SIZES, SHAPE, prefixes).peak
    assert most_prefixes(SIZES, SHAPE, budget, 100) == prefixes
    assert most_prefixes(SIZES, SHAPE, budget - 1, 100) == prefixes - 1
    assert most_prefixes(SIZES, SHAPE, budget, 1) == 1


@pytest.mark.parametrize(("prefixes", "most", "size"), [(9, 8, 5), (8, 8, 8), (7, 3, 3), (7, 4, 4), (4, 1, 1)])
def test_waves_are_as_equal_as_they_can_be(prefixes: int, most: int, size: int) -> None:
    assert even_wave(prefixes, most) == size
