"""Every layout of ranks computes what one process computes, and what transformers computes in float64."""

from __future__ import annotations

from pathlib import Path

import oracle
import pytest
from forks import run_checks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, pairs and expectations; the single-process samples are written by the first check."""
    where = tmp_path_factory.mktemp("oracle")
    oracle.make(where)
    run_checks("check_layout.py", 1, str(where), "1", "1", "0", "4", str(where / "samples.pt"))
    return where


LAYOUTS = {
    "TP2": (2, 2, 1, 0, 2),
    "TP2 with sequence parallel": (2, 2, 1, 1, 8),
    "PP2": (2, 1, 2, 0, 1),
    "DP2": (2, 1, 1, 0, 4),
    "DP2 with single rows": (2, 1, 1, 0, 1),
    "PP3 over 4 layers": (3, 1, 3, 0, 2),
    "TP2 x PP2": (4, 2, 2, 0, 2),
    "TP2 x PP2 with sequence parallel": (4, 2, 2, 1, 2),
}
# What they add to the others is a combination, and they cost a minute on two cores.
NIGHTLY = ("PP3 over 4 layers", "TP2 x PP2 with sequence parallel")


@pytest.mark.parametrize(
    ("world_size", "tp", "pp", "sp", "micro"),
    [
        pytest.param(*layout, id=name, marks=[pytest.mark.nightly] if name in NIGHTLY else [])
        for name, layout in LAYOUTS.items()
    ],
)
def test_layout_equals_float64_and_one_process(
    folder: Path, world_size: int, tp: int, pp: int, sp: int, micro: int
) -> None:
    out = run_checks(
        "check_layout.py", world_size, str(folder), str(tp), str(pp), str(sp), str(micro), str(folder / "samples.pt")
    )
    assert out.count("passed") == world_size
