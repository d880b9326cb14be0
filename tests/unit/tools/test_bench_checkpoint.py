"""The measurement of what checkpoints cost: every figure that the documents quote comes from what was written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.bench.checkpoint import _stall_row, main
from tools.bench.checkpoint_files import PAIRS, spikes


def test_each_part_of_one_process_measures_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.json"
    parts = ("--parts", "journal", "checksum", "audit", "spikes", "--folder", str(tmp_path), "--json", str(file))
    assert main([*parts, "--repeats", "5", "--checksum-mb", "2", "--spike-steps", "200"]) == 0
    found = json.loads(file.read_text())
    votes, probabilities = found["journal"]
    assert 10 < votes["bytes an answer"] < probabilities["bytes an answer"] < 60
    assert all(float(value) > 0 for row in found["journal"] for name, value in row.items() if name != "answers")
    assert found["checksum"][0]["GB/s (median of 5)"] > 0
    assert found["audit"][0]["ms (median of 5)"] > 0
    assert [row["pairs in a batch"] for row in found["spikes"]] == list(PAIRS)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]
    assert "load average" in capsys.readouterr().out


def test_the_simulation_is_seeded() -> None:
    assert spikes(300, 1) == spikes(300, 1) != spikes(300, 2)


def test_a_slowdown_is_that_of_the_steps_beside_a_save() -> None:
    times = {"quiet": [0.1, 0.1, 0.3], "during": [0.2], "stall": [0.5, 0.2], "processor": [0.1], "durable": [1.0]}
    row = _stall_row("asynchronous", times, 3_000_000)
    assert (row["slowdown"], row["MB a rank"], row["step without, ms"]) == (2.0, 3, 100.0)
    assert row["stall, ms"] == "200 to 200, median 200, the first 500"
    assert "slowdown" not in _stall_row("synchronous", times | {"during": []}, 3_000_000)


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--parts", "audit", "--folder", str(tmp_path / "nowhere")]) == 1
    assert capsys.readouterr().err.startswith("checkpoint: ")
