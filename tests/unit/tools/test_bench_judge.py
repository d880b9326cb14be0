"""The measurement of the client: it goes the way of a verdict, and its figures agree with each other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.bench.judge import main
from tools.bench.judge_client import DEPTHS


def test_every_depth_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "cost.json"
    assert main(["client", "--in-flight", "4", "--calls", "60", "--json", str(file)]) == 0
    costs = json.loads(file.read_text())["client"]
    assert [cost["depth"] for cost in costs] == list(DEPTHS)
    for cost in costs:
        assert cost["calls"] >= 60
        assert cost["in_flight"] == 4
        assert cost["calls_per_cpu_second"] == pytest.approx(1e6 / cost["cpu_us"])
        assert 0 < cost["calls_per_second"] < 100_000
    for cost in costs[:2]:
        # Each of the calls under way takes its turn: latency times rate is what is in flight.
        assert 0 < cost["latency_ms_median"] <= cost["latency_ms_p99"]
        assert cost["latency_ms_median"] * cost["calls_per_second"] / 1000 < 2 * 4
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 2 + len(DEPTHS)


@pytest.mark.parametrize("wrong", [["--calls", "0"], ["--in-flight", "0"]])
def test_impossible_numbers_are_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["client", *wrong]) == 1
    assert "at least 1" in capsys.readouterr().err
