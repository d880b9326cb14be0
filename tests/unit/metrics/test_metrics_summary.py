from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from megatron_sip.errors import DataError
from megatron_sip.metrics.sinks import JsonlSink
from megatron_sip.metrics.summary import print_summary, read_run, sparkline

ROOT = Path(__file__).resolve().parents[3]


def _write(path: Path, losses: list[float]) -> Path:
    sink = JsonlSink(str(path))
    for step, loss in enumerate(losses, start=1):
        metrics = {"loss": loss, "elapsed_ms": 2000.0, "judge/missing": 2.0, "pairs/tie": 1.0, "learning_rate": 5e-6}
        metrics |= {
            "time/rollout": 0.5,
            "time/train": 1.5,
            "chosen/share_rollout": step / 10,
            "scores/quality/rollout": 1,
        }
        if step > 1:
            metrics["rewards/accuracies"] = 0.25 * step
        sink.log(step, metrics)
    sink.close()
    return path


def test_sparkline_by_hand():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, 0, 4, 4], 2) == "▁█"
    assert sparkline([1, 1, 1], 5) == "▁▁▁"
    assert sparkline([0, None, math.nan, 8], 4) == "▁ !█"
    assert sparkline([], 4) == ""
    with pytest.raises(ValueError, match="width"):
        sparkline([1], 0)


def test_summary_has_first_last_and_seconds(tmp_path: Path):
    run = read_run(_write(tmp_path / "sip.jsonl", [0.75, math.nan, 0.5, 0.25]))
    stream = io.StringIO()
    print_summary([run], Console(file=stream, width=160))
    lines = stream.getvalue().splitlines()

    def row(name: str) -> list[str]:
        [line] = [line for line in lines if line.startswith(f"│ {name} ")]
        return [cell.strip() for cell in line.strip("│").split("│")]

    assert row("loss")[:5] == ["loss", "0.7500", "0.2500", "0.2500", "0.7500"]
    assert row("loss")[5] == "█!▅▁"
    assert row("rewards/accuracies")[1:3] == ["0.5000", "1.0000"]
    assert row("learning_rate")[1] == "5.000e-06"
    assert row("scores/quality/rollout")[1] == "1.0000"
    assert row("time/rollout (s per iteration)")[1:] == ["0.500", "25 %"]
    assert row("whole iteration (s)")[1] == "2.000"
    assert row("judge/missing (total)")[1] == "8"
    assert row("pairs/tie (total)")[1] == "4"


def test_bad_files_are_named(tmp_path: Path):
    with pytest.raises(DataError, match="cannot read"):
        read_run(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="no metrics"):
        read_run(tmp_path / "empty.jsonl")
    (tmp_path / "odd.jsonl").write_text(json.dumps({"iteration": 1, "loss": "low"}) + "\n")
    with pytest.raises(DataError, match="'low' is not a number"):
        read_run(tmp_path / "odd.jsonl")
    (tmp_path / "other.jsonl").write_text(json.dumps({"loss": 1.0}) + "\n")
    with pytest.raises(DataError, match="no iteration"):
        read_run(tmp_path / "other.jsonl")


def _tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "report.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_tool_compares_two_runs_and_draws_a_picture(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = _write(tmp_path / "a" / "metrics.jsonl", [0.75, 0.5])
    second = _write(tmp_path / "b" / "metrics.jsonl", [0.75, 0.25])
    done = _tool(str(first), str(second), "--svg", str(tmp_path / "out" / "report.svg"))
    assert done.returncode == 0, done.stderr
    assert "last values" in done.stdout
    assert "-0.2500" in done.stdout
    picture = (tmp_path / "out" / "report.svg").read_text()
    assert picture.lstrip().startswith("<svg")
    assert "-0.2500" in picture


def test_tool_says_what_is_wrong_in_one_line(tmp_path: Path):
    done = _tool(str(tmp_path / "none.jsonl"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot read")
    assert done.stderr.count("\n") == 1
