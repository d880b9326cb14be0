"""What holds for all unit tests."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _no_width_of_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that run side by side are told the width of the terminal; what is printed shall not depend on it."""
    monkeypatch.delenv("COLUMNS", raising=False)
