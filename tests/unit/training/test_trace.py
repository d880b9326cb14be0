"""Which steps are traced, and what is left of a trace that was cut short."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_sip.config.groups import Config, LoggingConfig
from megatron_sip.errors import ConfigError
from megatron_sip.parallel.regions import region
from megatron_sip.training.trace import StepTracer, Window


def tracer(folder: Path, rank: int = 0, **settings) -> StepTracer:
    logging = {"profile": True, "profile_step_start": 2, "profile_step_end": 4, **settings}
    return StepTracer(replace(Config(), logging=LoggingConfig(profile_dir=str(folder), **logging)), rank)


def run(steps: StepTracer, *iterations: int, fails_at: int | None = None) -> list[int]:
    """A loop like that of a run; the iterations behind which a trace was due."""
    due = []
    steps.prepare(iterations[0] - 1)
    try:
        for number in iterations:
            with steps.iteration(number), region("train"):
                torch.ones(2, 2) @ torch.ones(2, 2)
                if number == fails_at:
                    raise RuntimeError("in the midst of it")
            if steps.due(number):
                due.append(number)
                steps.write()
    finally:
        steps.write()
    return due


def traced(folder: Path) -> dict[str, set[str]]:
    """Our regions in each trace."""
    found = {}
    for file in sorted(folder.glob("*.pt.trace.json.gz")):
        with gzip.open(file) as packed:
            names = [event["name"] for event in json.load(packed)["traceEvents"]]
        found[file.name.removesuffix(".pt.trace.json.gz")] = {name for name in names if name.startswith("sip::")}
    return found


def test_the_window_counts_iterations_that_are_done() -> None:
    window = Window.from_config(LoggingConfig())
    assert [number for number in range(20) if window.holds(number)] == [11, 12]


def test_the_window_is_traced_and_nothing_else(tmp_path: Path) -> None:
    assert run(tracer(tmp_path / "t"), 1, 2, 3, 4, 5) == [4]
    assert traced(tmp_path / "t") == {"rank_0.iterations_3_4": {"sip::iteration 3", "sip::iteration 4", "sip::train"}}
    table = (tmp_path / "t" / "rank_0.iterations_3_4.txt").read_text()
    assert table.startswith("iterations 3 to 4 on rank 0\n")
    [train] = [line.split() for line in table.splitlines() if line.startswith("sip::train ")]
    assert train[1] == "2"
    assert float(train[2]) > 0
    assert "aten::mm" in table
    assert len(list((tmp_path / "t").iterdir())) == 2


@pytest.mark.parametrize(
    ("settings", "rank", "iterations"),
    [({}, 1, (1, 2, 3, 4)), ({"profile": False}, 0, (1, 2, 3, 4)), ({}, 0, (5, 6))],
    ids=["another rank", "switched off", "resumed behind the window"],
)
def test_nothing_is_traced(tmp_path: Path, settings, rank: int, iterations: tuple[int, ...]) -> None:
    run(tracer(tmp_path / "t", rank, **settings), *iterations)
    assert not (tmp_path / "t").exists()


def test_a_run_that_is_resumed_or_ends_within_the_window_traces_its_part(tmp_path: Path) -> None:
    run(tracer(tmp_path), 4, 5)
    run(tracer(tmp_path), 1, 2, 3)
    assert set(traced(tmp_path)) == {"rank_0.iterations_4_4", "rank_0.iterations_3_3"}


def test_an_error_ends_the_trace(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="in the midst"):
        run(tracer(tmp_path), 2, 3, fails_at=3)
    assert traced(tmp_path) == {"rank_0.iterations_3_3": {"sip::iteration 3", "sip::train"}}


def test_a_run_that_goes_back_is_traced_once(tmp_path: Path) -> None:
    assert run(tracer(tmp_path), 2, 3, 4, 2, 3, 4) == [4, 4]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_trace_of_an_earlier_run_is_set_aside(tmp_path: Path) -> None:
    for _ in range(2):
        run(tracer(tmp_path), 3, 4)
    assert len(traced(tmp_path)) == 1
    assert sorted(file.name for file in tmp_path.glob("*.1")) == [
        "rank_0.iterations_3_4.pt.trace.json.gz.1",
        "rank_0.iterations_3_4.txt.1",
    ]


def test_a_folder_that_cannot_be_written_is_told_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write a trace to .*/file .*--profile-dir"):
        tracer(tmp_path / "file").prepare(0)
