"""Lets the tests of this folder import their helpers by name, and share a launch."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from runs import Runs  # only now is its folder on the path


@pytest.fixture(scope="session")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The CASES of all collected modules that have some, run one after another in one launch of two ranks."""
    modules = {item.module.__name__: item.module for item in request.session.items if isinstance(item, pytest.Function)}
    runs = Runs(tmp_path_factory.mktemp("runs"))
    runs.launch(2, *(case for _, module in sorted(modules.items()) for case in getattr(module, "CASES", ())))
    return runs
