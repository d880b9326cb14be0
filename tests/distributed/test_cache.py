"""Two leaders with one cache and rewrites ahead: another run finds what depends on the documents, and trains alike."""

from __future__ import annotations

import pytest
from commands import Outcome, run_commands
from fake_server import FakeServer
from test_journal import Fickle, Runs

AHEAD = 3
STEPS = 6
SIZE = 4
OF_DOCUMENT = 1 + 2
"""Kept of a sample: its rewrite, and the original against it in both orders."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def outcomes(runs: Runs) -> dict[str, list[Outcome]]:
    """The same run twice in folders of its own, with one cache; and once more at another layout."""
    flags = ["--judge-cache", str(runs.root / "answers"), "--rewrite-ahead", str(AHEAD)]
    with FakeServer() as server:
        server.fault_every_time = Fickle(last=10**9)
        return run_commands(
            [
                runs.command("first", "first", server.url, *flags),
                runs.command("second", "second", server.url, *flags),
                runs.command("layout", "layout", server.url, *flags, "--tensor-model-parallel-size", "2"),
            ],
            2,
            runs.root / "cases",
        )


def test_another_run_is_spared_what_depends_on_the_documents(runs: Runs, outcomes: dict[str, list[Outcome]]) -> None:
    for name in ("first", "second", "layout"):
        assert [rank.status for rank in outcomes[name]] == [0, 0], outcomes[name][0].stderr
        assert "goes on without the cache" not in outcomes[name][0].stderr
    first = runs.metrics("first")
    assert sum(line["judge/from_cache"] for line in first.values()) == 0
    for name in ("second", "layout"):
        again = runs.metrics(name)
        assert sum(line["judge/from_cache"] for line in again.values()) == STEPS * SIZE * OF_DOCUMENT
        assert {line["judge/asked"] for line in again.values()} == {line["judge/asked"] for line in first.values()}
        # The rewrites of the iterations ahead are counted where they come.
        ahead = [again[step]["judge/from_cache"] for step in sorted(again)]
        assert ahead[0] >= SIZE * OF_DOCUMENT
        texts = {sample: rewrites(line) for sample, line in runs.samples(name).items()}
        assert texts == {sample: rewrites(line) for sample, line in runs.samples("first").items()}


def rewrites(line: dict[str, object]) -> list[str]:
    """The texts of the rewrites among the candidates of a sample."""
    candidates = line["candidates"]
    assert isinstance(candidates, list)
    found = [str(one["text"]) for one in candidates if one["kind"] == "rewrite"]
    assert found
    return found


def test_the_run_ahead_is_bounded_by_the_end(runs: Runs, outcomes: dict[str, list[Outcome]]) -> None:
    """Every batch was trained once, in order, and nothing beyond the last was asked for."""
    assert sorted(runs.metrics("first")) == list(range(1, STEPS + 1))
    assert sorted(runs.samples("first")) == list(range(STEPS * SIZE))
    assert set().union(*runs.journal("first")) == set(range(STEPS * SIZE)) - gone(runs)


def gone(runs: Runs) -> set[int]:
    """Samples whose segments no checkpoint needs any more."""
    held = set().union(*runs.journal("first"))
    return set(range(min(held)))
