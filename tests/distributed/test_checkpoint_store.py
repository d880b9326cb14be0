"""The checkpoint store with ranks: `check_checkpoint_store.py` holds the checks, bundled into two launches."""

from __future__ import annotations

from pathlib import Path

import pytest
from forks import run_checks


@pytest.mark.parametrize("tp", [2, 1], ids=["shards", "copies"])
def test_checkpoint_store(tmp_path: Path, tp: int) -> None:
    assert "checkpoint store ok" in run_checks("check_checkpoint_store.py", 2, str(tmp_path), str(tp))
