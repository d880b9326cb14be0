"""Layers over pipeline stages."""

from __future__ import annotations

import pytest

from megatron_sip.config.stages import largest_stage, uneven_ends


@pytest.mark.parametrize(
    ("layers", "stages", "ends"),
    [
        (32, 4, None),
        (30, 4, (7, 7)),
        (32, 3, (11, 10)),
        (4, 3, (1, 1)),
        (5, 4, (2, 1)),
        (3, 2, (2, 1)),
        (16, 3, (5, 5)),
    ],
)
def test_ends_leave_equal_stages_between_them(layers: int, stages: int, ends: tuple[int, int] | None) -> None:
    assert uneven_ends(layers, stages) == ends


def test_every_stage_has_a_layer_and_none_is_lost() -> None:
    for stages in range(1, 9):
        for layers in range(stages, 81):
            ends = uneven_ends(layers, stages)
            if ends is None:
                assert layers % stages == 0
                continue
            rest, between = layers - sum(ends), stages - 2
            assert min(ends) >= 1
            assert rest == 0 if between == 0 else rest % between == 0 and rest // between >= 1
            assert largest_stage(layers, stages) >= -(-layers // stages)


def test_fewer_layers_than_stages_are_refused() -> None:
    with pytest.raises(ValueError, match="3 layers cannot fill 4 stages"):
        uneven_ends(3, 4)
