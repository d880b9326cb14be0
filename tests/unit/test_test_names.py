"""Files of tests have names of their own: pytest imports them by name alone, and the nightly trials collect all."""

from __future__ import annotations

from collections import Counter
from pathlib import Path


def test_no_two_files_of_tests_have_the_same_name() -> None:
    names = Counter(file.name for file in Path(__file__).parents[1].rglob("test_*.py"))
    assert names
    assert [name for name, count in names.items() if count > 1] == []
