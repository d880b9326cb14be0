"""The check of the cost model: reading the bench's files, fitting constants, errors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_sip.cost.check import Constants, check, fit, kinds_of_work, planned, work_of
from megatron_sip.cost.check_report import as_json, errors, grids
from megatron_sip.cost.flops import StepWork, step_flops
from megatron_sip.cost.hardware import Cluster, Efficiency
from megatron_sip.cost.measured import PARTS, MeasuredStep, read_measured
from megatron_sip.cost.sizes import ModelSizes
from megatron_sip.errors import ConfigError, DataError
from tools import plan
from tools.bench import step_report
from tools.bench.step_options import surroundings
from tools.bench.step_report import Result, Sample
from tools.bench.step_spec import DEFAULT_MODEL, Point, Spec

SMALL = ModelSizes(6, 320, 896, 8, 4, 40, 4096, untied=True)
RATE = 203e9
TRUE = Constants(
    {
        "rollout": {"prefill": 1.3, "linear layers and head": 1.8, "attention": 2.5, "layer call, s": 2e-4},
        "reference": {"linear layers and head": 1.2, "attention": 2.0, "layer call, s": 1e-3},
        "train": {"linear layers and head": 1.1, "attention": 3.0, "layer call, s": 3e-3},
        "optimizer": {"parameter, s": 4e-9},
        "other": {"step, s": 2e-3},
    }
)


def point(prefix: int, rollouts: int, batch: int, seconds: float = 1.0, judge: float = 0.0) -> dict[str, Any]:
    """A point as tools/bench/step.py writes it."""
    flops = step_flops(SMALL, StepWork(prefix, 128, rollouts, batch)).total
    return {
        "prefix": prefix,
        "suffix": 128,
        "k": rollouts,
        "batch": batch,
        "judge_seconds": judge,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "seconds_per_step": seconds,
        "parts": dict.fromkeys((*PARTS, "judge_wait"), seconds / 6),
        "floor_seconds": flops / RATE,
        "flops_per_step": flops,
    }


def around() -> dict[str, Any]:
    return {
        "model": vars(SMALL),
        "dtype": "fp32",
        "micro_batch_size": 1,
        "rollout_batch_size": None,
        "sequence_parallel": False,
        "shared_prefix": True,
    }


def written(path: Path, points: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps({**around(), "sweeps": {"k": points}}))
    return path


def true_steps(folder: Path, sizes: list[tuple[int, int, int]]) -> list[MeasuredStep]:
    """Steps that take what the true constants say."""
    bare = read_measured(written(folder / "bench.json", [point(*size) for size in sizes]))
    return [replace(step, seconds=TRUE.seconds(step)) for step in bare]


SIZES = [(1024, 16, 4), (1024, 2, 4), (256, 16, 4), (128, 4, 8), (1920, 8, 1), (512, 1, 16)]


def test_a_file_of_the_bench_is_read(tmp_path: Path) -> None:
    single = tmp_path / "one.json"
    single.write_text(json.dumps({**around(), **point(256, 16, 4, seconds=3.0), "unshared": {"ratio": 0.6}}))
    [step] = read_measured(single)
    assert step.model == SMALL
    assert step.rate == pytest.approx(RATE)
    assert (step.run.prefix_length, step.run.num_rollouts, step.run.global_batch_size) == (256, 16, 4)
    assert (step.run.dtype, step.run.element_bytes, step.ranks) == ("fp32", 4, 1)
    assert step.run.shared_prefix
    assert step.seconds == dict.fromkeys(PARTS, 0.5), "the wait for the judge is not predicted"
    apart = tmp_path / "apart.json"
    apart.write_text(json.dumps({**around(), "shared_prefix": False, "sweeps": {"k": [point(256, 16, 4)]}}))
    assert not read_measured(apart)[0].run.shared_prefix
    waits = written(tmp_path / "sweep.json", [point(256, 16, 4), point(256, 8, 4, judge=2.0)])
    assert [step.run.num_rollouts for step in read_measured(waits)] == [16]


def test_the_ranks_of_a_machine_share_its_rate(tmp_path: Path) -> None:
    layout = {**point(256, 16, 4), "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    [step] = read_measured(written(tmp_path / "layout.json", [layout]))
    assert step.rate == pytest.approx(RATE / 4)
    assert "TP 2 PP 2" in step.name
    assert work_of(step).train.dense > 0


def test_what_the_bench_writes_is_read(tmp_path: Path) -> None:
    spec = replace(Spec(model=DEFAULT_MODEL, tokenizer=""), dtype="bf16", rollout_batch_size=2, micro_batch_size=None)
    parts = {"rollout": 4.0, "judge_wait": 9.0, "reference": 1.0, "train": 3.0, "optimizer": 0.5, "other": 0.25}
    result = Result(Point(256, 128, 4, 8), 1, 1, 2e11, (Sample(17.75, parts, 1.0, 0.0),))
    single, sweep = tmp_path / "step.json", tmp_path / "sweep.json"
    head, found = surroundings(spec, SMALL, None, 0.0), step_report.as_json(SMALL, result)
    single.write_text(json.dumps({**head, **found}))
    sweep.write_text(json.dumps({**head, "sweeps": {"k": [found]}}))
    [step] = read_measured(single)
    assert read_measured(sweep) == [step]
    assert (step.model, step.rate, step.total) == (SMALL, pytest.approx(2e11), 8.75)
    assert (step.run.dtype, step.run.rollout_batch_size, step.run.micro_batch_size) == ("bf16", 2, 8)
    assert work_of(step).tokens == 4 * 128, "four waves"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "is no file of tools/bench/step.py"),
        ('{"model": {}}', "'judge_seconds'"),
        ('{"sweeps": {}}', "holds no step"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(DataError, match=message):
        read_measured(tmp_path / "bad.json")
    with pytest.raises(DataError, match="cannot read"):
        read_measured(tmp_path / "none.json")


def test_a_part_that_was_not_measured_is_no_part_of_no_seconds(tmp_path: Path) -> None:
    whole = point(256, 16, 4, seconds=3.0)
    parts = {name: value for name, value in whole["parts"].items() if name != "optimizer"}
    with pytest.raises(DataError, match="'optimizer'"):
        read_measured(written(tmp_path / "bench.json", [{**whole, "parts": parts}]))


def test_constants_are_found_again_and_predict_other_sizes(tmp_path: Path) -> None:
    steps = true_steps(tmp_path, SIZES)
    found = fit(steps[:4])
    for part, kinds in TRUE.values.items():
        assert found.values[part] == pytest.approx(kinds, rel=1e-6)
    checked = check(steps, found.seconds, steps[:4])
    assert [one.fitted for one in checked] == [True] * 4 + [False] * 2
    assert max(abs(one.error("whole")) for one in checked) < 1e-6


def test_a_size_that_was_measured_again_is_none_that_was_held_out(tmp_path: Path) -> None:
    steps = true_steps(tmp_path, SIZES)
    again = [replace(step, seconds={part: 1.1 * value for part, value in step.seconds.items()}) for step in steps]
    assert [one.fitted for one in check(again, TRUE.seconds, steps[:4])] == [True] * 4 + [False] * 2


def test_an_error_is_the_share_by_which_the_prediction_is_off(tmp_path: Path) -> None:
    steps = true_steps(tmp_path, SIZES)
    slower = [replace(step, seconds={part: 2 * value for part, value in step.seconds.items()}) for step in steps]
    told = errors(check(slower, TRUE.seconds))
    for part in ("whole", *PARTS):
        assert told[part] == {"median": pytest.approx(0.5), "largest": pytest.approx(0.5)}


def test_constants_are_not_below_nothing(tmp_path: Path) -> None:
    steps = true_steps(tmp_path, SIZES)
    bent = [
        replace(step, seconds={**step.seconds, "train": 1 / kinds_of_work(step)["train"]["attention"]})
        for step in steps
    ]
    assert min(fit(bent).values["train"].values()) >= 0


def test_too_few_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--fit-on holds 2 sizes, and rollout has 4 constants"):
        fit(true_steps(tmp_path, SIZES[:2]))


def test_without_a_fit_the_shares_of_the_flags_predict(tmp_path: Path) -> None:
    [step] = true_steps(tmp_path, SIZES[:1])
    efficiency = Efficiency(train_mfu=0.5, forward_mfu=0.25)
    seconds = planned(Cluster(), efficiency)(step)
    flops = step_flops(SMALL, step.run.work())
    assert seconds["train"] == pytest.approx(flops.train.total / (0.5 * RATE))
    assert seconds["reference"] == pytest.approx(flops.reference.total / (0.25 * RATE), rel=0.01)
    on_gpu = planned(Cluster(peak_tflops=RATE / 1e12 * 2), efficiency)(replace(step, gpu=True))
    assert on_gpu["train"] == pytest.approx(seconds["train"] / 2)
    assert on_gpu["other"] == pytest.approx(4 * SMALL.parameters / 50e9, rel=1e-3)


def test_tables_and_json_tell_fitted_sizes_apart(tmp_path: Path) -> None:
    steps = true_steps(tmp_path, SIZES)
    constants = fit(steps[:4])
    found = check(steps, constants.seconds, steps[:4])
    sizes, told, values = grids(found, constants)
    assert [row[0].endswith(" *") for row in sizes.rows] == [True] * 4 + [False] * 2
    assert [row[0] for row in told.rows] == ["4 sizes fitted on", "2 sizes not fitted on"]
    assert len(values.rows) == sum(map(len, TRUE.values.values()))
    data = json.loads(json.dumps(as_json(found, constants), allow_nan=False))
    assert data["errors"]["not_fitted"]["whole"]["largest"] < 1e-6


def test_the_command_line_fits_and_checks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = true_steps(tmp_path, SIZES)
    points = [
        {**point(*size), "parts": {**step.seconds, "judge_wait": 0.0}} for size, step in zip(SIZES, steps, strict=True)
    ]
    basis, other = written(tmp_path / "basis.json", points[:4]), written(tmp_path / "other.json", points[4:])
    out = tmp_path / "check.json"
    assert plan.main(["--check", str(other), "--fit-on", str(basis), "--json", str(out)]) == 0
    assert json.loads(out.read_text())["errors"]["not_fitted"]["whole"]["largest"] < 1e-6
    assert "2 sizes not fitted on" in capsys.readouterr().out
    assert plan.main(["--check", str(other)]) == 0
    assert "the shares that the flags give" in capsys.readouterr().out
    assert plan.main(["--fit-on", str(basis)]) == 2
    assert "--fit-on belongs to --check" in capsys.readouterr().err
