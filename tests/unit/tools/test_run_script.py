"""tests/run.sh with stand-ins for its programs: which stages run, what is summed, and which status it ends with."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
# What the stand-in for pytest prints and returns for each folder; `tests/.` is the nightly run.
RESULTS = """
case "$3 $5" in
    "tests/unit alone"*) echo "1 passed in 3.00s" ;;
    "tests/unit "*) echo "10 passed, 1 skipped in 2.00s" ;;
    "tests/distributed "*) echo "1 failed, 4 passed in 9.10s (0:00:09)"; exit ${DISTRIBUTED_STATUS:-0} ;;
    "tests/integration "*) echo "3 passed, 2 errors in 1.00s"; exit ${INTEGRATION_STATUS:-0} ;;
    "tests/. nightly") echo "2 passed, 20 deselected in 5.00s" ;;
    *) echo "unexpected: $*"; exit 9 ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with the real run.sh and .ci/run, and programs that only print."""
    for folder in ("tests", ".ci", "tools", "bin", ".venv/bin"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "run.sh", tmp_path / "tests" / "run.sh")
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci" / "run")
    programs = {
        "tools/setup.sh": 'echo "set-up of $*"; exit ${SETUP_STATUS:-0}',
        ".venv/bin/python": RESULTS,
        ".venv/bin/ruff": 'echo "ruff $*"; exit ${RUFF_STATUS:-0}',
        ".venv/bin/mypy": "echo mypy",
        "bin/nvidia-smi": "exit 1",
    }
    for name, text in programs.items():
        (tmp_path / name).write_text("#!/usr/bin/env bash\n" + text + "\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    return tmp_path


def _run(checkout: Path, *arguments: str, script: str = "tests/run.sh", **environment: str) -> tuple[int, list[str]]:
    path = f"{checkout / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(checkout / script), *arguments],
        env={"PATH": path} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout.splitlines()


def _stages(lines: list[str]) -> list[str]:
    return [line.removeprefix("== ").split(":")[0] for line in lines if line.startswith("== ") and ":" in line]


def test_all_stages_in_order_and_one_sum(checkout: Path) -> None:
    status, lines = _run(checkout, script=".ci/run")
    assert status == 0
    assert _stages(lines) == [
        "set-up",
        "ruff check",
        "ruff format",
        "mypy",
        "unit tests",
        "unit tests, alone",
        "distributed tests",
        "integration tests",
        "gpu tests",
    ]
    assert "set-up of trainer judge dev" in lines
    assert "ruff format --check ." in lines
    assert lines[-1].startswith("1 failed, 2 error, 18 passed, 1 skipped in ")


def test_fast_is_the_unit_tests_alone(checkout: Path) -> None:
    status, lines = _run(checkout, "--fast")
    assert status == 0
    assert _stages(lines) == ["set-up", "unit tests", "unit tests, alone"]
    assert "set-up of trainer dev" in lines


def test_nightly_comes_on_top(checkout: Path) -> None:
    status, lines = _run(checkout, "--nightly")
    assert status == 0
    assert _stages(lines)[-1] == "nightly trials"
    assert "20 deselected" in lines[-1]


@pytest.mark.parametrize(
    ("variable", "stage"),
    [
        ("RUFF_STATUS", "ruff check"),
        ("DISTRIBUTED_STATUS", "distributed tests"),
        ("INTEGRATION_STATUS", "integration tests"),
    ],
)
def test_one_failed_stage_fails_the_run_and_stops_no_other(checkout: Path, variable: str, stage: str) -> None:
    status, lines = _run(checkout, **{variable: "1"})
    assert status == 1
    assert any(line.startswith(f"== {stage}: FAILED (exit status 1)") for line in lines)
    assert lines[-1].startswith("FAILED:")
    assert stage in lines[-1]
    assert "integration tests" in _stages(lines)


def test_a_stage_without_tests_fails(checkout: Path) -> None:
    status, lines = _run(checkout, INTEGRATION_STATUS="5")
    assert status == 1
    assert any("no test was collected in tests/integration" in line for line in lines)


def test_a_failed_set_up_stops_at_once(checkout: Path) -> None:
    status, lines = _run(checkout, SETUP_STATUS="3")
    assert status == 1
    assert _stages(lines) == ["set-up"]


def test_an_unknown_argument_is_named(checkout: Path) -> None:
    status, lines = _run(checkout, "--quick")
    assert status == 2
    assert "unknown argument --quick" in lines[0]
