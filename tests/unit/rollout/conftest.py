"""Weights for rollout servers, and no long pauses."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_rollouts import changed, make_llama

from megatron_sip.rollout import fleet as fleet_module


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_module, "PAUSE_SECONDS", 0.05)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """The weights a server starts with, those of the first push, and those of the second."""
    root = tmp_path_factory.mktemp("weights")
    start = make_llama(root / "start", num_hidden_layers=2)
    first = changed(start, root / "first", 1e-2)
    return start, first, changed(first, root / "second", 1e-6)
