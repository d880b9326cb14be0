"""The step bench: its arithmetic by hand, and one real run at sizes that take seconds."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from rich.console import Console

from megatron_sip.cost.flops import step_flops
from megatron_sip.cost.sizes import ModelSizes, model_sizes
from tools.bench import step, step_report, step_sweep
from tools.bench.scripted_judge import ScriptedJudge
from tools.bench.step_curves import panel, sweep_table
from tools.bench.step_inputs import EOD, make_tokenizer, picks, random_cuts
from tools.bench.step_measure import Bench, arm_environment
from tools.bench.step_options import model_of
from tools.bench.step_report import PrefixSample, Result, Sample
from tools.bench.step_spec import DEFAULT_MODEL, Point, Spec

POINT = Point(prefix=1024, suffix=128, rollouts=16, batch=4)
TINY = (
    "--prefix 24 --suffix 8 --k 2 --batch 2 --num-layers 2 --hidden-size 32 --ffn-hidden-size 64 "
    "--num-attention-heads 4 --num-query-groups 2 --vocab-size 320 --threads 1 --repeats 2 --matmul-sizes 64"
).split()


def sizes() -> ModelSizes:
    return model_sizes(DEFAULT_MODEL)


def sample(seconds: float, wait: float = 0.0, others: float = 0.0) -> Sample:
    """A step of which half is rollouts, a tenth the optimizer, and `wait` the judge."""
    rest = seconds - wait
    parts = {"rollout": 0.5 * rest, "judge_wait": wait, "reference": 0.1 * rest}
    return Sample(seconds, {**parts, "train": 0.3 * rest, "optimizer": 0.1 * rest, "other": 0.0}, 1.0, others)


def result(point: Point = POINT, **changes) -> Result:
    samples = tuple(sample(seconds, point.judge_seconds) for seconds in (10.0, 8.0, 9.0))
    return Result(**{"point": point, "tensor": 1, "pipeline": 1, "rate": 2e11, "sip": samples, **changes})


def test_the_default_model_is_that_of_the_targets() -> None:
    assert sizes().parameters == 9_629_760


def test_medians_ratios_and_floor_by_hand() -> None:
    hf = {
        "dynamic": tuple(sample(seconds) for seconds in (40.0, 20.0, 35.0)),
        "static": tuple(sample(seconds) for seconds in (30.0, 27.0, 90.0)),
    }
    prefix = (PrefixSample(1.0, 2.0), PrefixSample(1.1, 2.0), PrefixSample(9.0, 10.0))
    found = step_report.as_json(sizes(), result(hf_by_cache=hf, prefix=prefix, save=(0.2, 0.4, 0.3)))
    assert found["seconds_per_step"] == 9.0
    assert found["parts"]["rollout"] == 4.5
    assert found["speedup_vs_hf"] == pytest.approx(30 / 9)
    assert found["hf"]["parts"]["train"] == pytest.approx(9.0)
    assert (found["hf"]["cache"], found["hf"]["seconds_by_cache"]) == ("static", {"dynamic": 35.0, "static": 30.0})
    assert found["save_seconds"] == 0.3
    assert found["floor_seconds"] == pytest.approx(step_flops(sizes(), POINT.work()).total / 2e11)
    assert sum(found["floor_parts"].values()) == pytest.approx(found["floor_seconds"])
    assert found["times_floor"] == pytest.approx(9.0 / found["floor_seconds"])
    assert found["rollout_tokens_per_second"] == pytest.approx(4 * 16 * 128 / 4.5)
    assert found["unshared"]["ratio"] == pytest.approx(0.55)
    # 1280 of 2304 tokens; attention and head leave a little more.
    assert 1280 / 2304 < found["unshared"]["ratio_of_operations"] < 0.6
    assert [one["seconds"] for one in found["repeats"]] == [10.0, 8.0, 9.0]
    json.dumps(found)


def test_the_floor_of_the_targets_is_about_what_was_seen() -> None:
    """At 203 GFLOP/s 3.3 s at P = 1024 and K = 16."""
    assert step_flops(sizes(), POINT.work()).total / 203e9 == pytest.approx(3.3, abs=0.2)


def test_what_was_not_compared_is_null() -> None:
    found = step_report.as_json(sizes(), result())
    names = ("speedup_vs_hf", "hf", "unshared", "save_seconds", "step_over_longer_of_policy_and_judge")
    assert [found[name] for name in names] == [None] * 5


def test_a_judge_in_turn_is_measured_against_the_longer_of_both() -> None:
    # The policy works 7, 5, 6 s around a judge of 3 s: 9 s over 6 s.
    assert step_report.over_longer(result(Point(8, 8, 2, 2, judge_seconds=3.0))) == pytest.approx(1.5)
    slow = result(Point(8, 8, 2, 2, judge_seconds=7.0))
    assert step_report.over_longer(slow) == pytest.approx(9 / 7)


def test_a_policy_that_answers_slow_down_is_measured_against_itself_alone() -> None:
    """The sweep "judge": 5, 4 and 6 s alone, and 10, 6 and 9 s in the same repeats beside a judge of 1 s that it never
    waits for: 2, 1.5 and 1.5 times as long."""
    times = {0.0: (5.0, 4.0, 6.0), 1.0: (10.0, 6.0, 9.0)}
    alone, beside = (
        result(Point(8, 8, 2, 2, judge_seconds=judge), sip=tuple(map(sample, seconds)))
        for judge, seconds in times.items()
    )
    assert step_report.over_longer(beside) == 1.0, "within itself nothing is seen of it"
    found = step_sweep.beside_alone([alone, beside])
    assert [step_report.over_longer(one) for one in found] == [None, pytest.approx(1.5)]


def test_the_sweep_over_the_judge_measures_the_policy_alone_in_every_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[float], int]] = []

    class Bench:
        matmul_rates, gpu = {"64": 1e9}, None

        def __enter__(self) -> Bench:
            return self

        def __exit__(self, *_: object) -> None:
            """Nothing runs."""

        def measure(self, points: list[Point], repeats: int) -> list[Result]:
            asked.append(([point.judge_seconds for point in points], repeats))
            return [result(point, sip=(sample(2.0 + point.judge_seconds, point.judge_seconds),)) for point in points]

    flags = ["--sweep", "judge", "--judge-values", "0.5", "4", "--repeats", "3"]
    sweep = step_sweep.Sweep(step_sweep.build_parser().parse_args(flags), Spec(model=DEFAULT_MODEL, tokenizer=""))
    monkeypatch.setattr(sweep, "_bench", lambda _spec: Bench())
    found = sweep.results()["judge"]
    assert asked == [([0.0], 1), ([0.0, 1.0, 8.0], 3)]
    assert [step_report.over_longer(one) for one in found] == [None, 1.5, 1.25]


def test_points_are_measured_there_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(Spec(model=DEFAULT_MODEL, tokenizer=""), (), save=False, steps=1, say=lambda _: None)
    asked: list[int] = []

    def step(_name: str, point: Point, _steps: int) -> Sample:
        asked.append(point.prefix)
        return sample(float(point.prefix))

    monkeypatch.setattr(bench, "_step", step)
    monkeypatch.setattr(bench, "_arms", {}, raising=False)
    monkeypatch.setattr(bench, "_measure_matmul", lambda *_: bench._rates.update({"64": 1e9}))
    found = bench.measure([Point(prefix, 8, 2, 2) for prefix in (160, 320, 480)], 3)
    assert asked[3:] == [160, 320, 480, 480, 320, 160, 160, 320, 480], "the first three warm up"
    assert [[one.seconds for one in point.sip] for point in found] == [[160.0] * 3, [320.0] * 3, [480.0] * 3]


def test_what_makes_times_unsure_is_said() -> None:
    assert step_report.warnings_of([result(sip=(sample(1.0), sample(1.05)))], 0.1) == []
    busy = result(sip=(sample(1.0, others=0.9), sample(1.5)), hf_by_cache={"static": (sample(3.0),)})
    said = step_report.warnings_of([busy], 2.0)
    assert len(said) == 3
    assert "load average was 2.00" in said[0]
    assert "0.9 processors" in said[1]
    assert "40 % apart" in said[2]


def test_tables_show_every_part() -> None:
    console = Console(width=200, record=True)
    console.print(step_report.table(sizes(), result(hf_by_cache={"dynamic": (sample(30.0),)})))
    judged = result(Point(8, 8, 2, 2, judge_seconds=3.0))
    compared = result(hf_by_cache={"static": (sample(27.0),)}, prefix=(PrefixSample(1.1, 2.0),))
    console.print(sweep_table("k", sizes(), [result(), judged, compared]))
    shown = console.export_text()
    for word in ("rollout", "judge wait", "optimizer", "hf / sip", "whole, median of 3", "step / longer", "1.50"):
        assert word in shown
    for word in ("hf / step", "3.00", "shared / unshared", "0.550"):
        assert word in shown
    assert len(step_report.remarks(sizes(), judged)) == 2


def test_curves_have_a_point_for_each_size() -> None:
    points = [step_report.as_json(sizes(), result(Point(64, 8, k, 2))) for k in (1, 2, 4)]
    lines = {line.label: line.points for line in panel("k", points).lines}
    assert set(lines) == {"step", "floor", "rollouts", "reference and train"}
    assert [x for x, _ in lines["step"]] == [1.0, 2.0, 4.0]
    assert [line.label for line in panel("layout", points[:1]).lines] == ["TP1 PP1"]


def test_layouts_share_the_threads() -> None:
    spec = Spec(model=DEFAULT_MODEL, tokenizer="", threads=4)
    assert spec.with_layout(2, 1).threads == 2
    assert spec.with_layout(2, 2).threads == 1
    assert spec.with_layout(2, 2).all_threads == min(4, max(1, os.cpu_count() or 1))
    assert Spec(model=DEFAULT_MODEL, tokenizer="", threads=2).with_layout(2, 2).threads == 1
    assert Spec.from_json(spec.to_json()) == spec


def test_ranks_sleep_at_barriers_and_threads_of_one_process_do_as_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert arm_environment(2, ranks=2)["OMP_WAIT_POLICY"] == "PASSIVE"
    assert "OMP_WAIT_POLICY" not in arm_environment(2, ranks=1)
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


def test_inputs_are_seeded_and_differ_by_step(tmp_path: Path) -> None:
    cuts, again, later = (random_cuts(POINT, 512, number, 1) for number in (3, 3, 4))
    assert all((a.prefix == b.prefix).all() for a, b in zip(cuts, again, strict=True))
    assert not (cuts[0].prefix == later[0].prefix).all()
    assert [cut.sample_index for cut in [*cuts, *later]] == list(range(12, 20))
    assert all((cut.prefix != EOD).all() and len(cut.suffix) == 128 for cut in cuts)
    best = {max(range(17), key=picks(1, sample, 17).__getitem__) for sample in range(100)}
    assert len(best) > 10, "any candidate can be the best"


@pytest.mark.parametrize("vocab_size", [257, 320, 4096])
def test_the_tokenizer_has_a_word_for_every_token(tmp_path: Path, vocab_size: int) -> None:
    from megatron_sip.data.tokenizer import Tokenizer

    make_tokenizer(tmp_path, vocab_size)
    tokenizer = Tokenizer(str(tmp_path))
    assert (tokenizer.vocab_size, tokenizer.eod) == (vocab_size, EOD)
    assert tokenizer.decode(range(1, vocab_size))


def test_a_small_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--vocab-size"):
        make_tokenizer(tmp_path, 200)


def test_a_preset_gives_the_sizes_and_flags_win() -> None:
    parser = step.build_parser()
    model = model_of(parser.parse_args(["--model-preset", "llama3.2-1b", "--num-layers", "2"]))
    assert (model.num_layers, model.hidden_size, model.vocab_size) == (2, 2048, 128256)
    assert model_of(parser.parse_args([])).kv_channels == 40


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--batch", "3", "--micro-batch-size", "2"], "--micro-batch-size"),
        (["--sequence-parallel"], "--tensor-model-parallel-size"),
        (["--model-preset", "llama-1.4b"], "--vocab-size"),
        (["--hidden-size", "33"], "--num-attention-heads"),
    ],
)
def test_flags_that_do_not_fit_are_one_line(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert step.main(flags) == 1
    said = capsys.readouterr().err
    assert said.startswith("step: ")
    assert words in said


def test_a_layout_is_two_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert step_sweep.main(["--sweep", "layout", "--layout-values", "2"]) == 1
    assert "TPxPP" in capsys.readouterr().err


def test_a_judge_takes_its_time_for_all_questions_together() -> None:
    import asyncio
    import time

    from megatron_sip.types import Candidate, CandidateKind, Pool, Question

    judge = ScriptedJudge(seed=1)
    judge.start_anew(0.02)
    pool = Pool(0, "", "", tuple(Candidate(CandidateKind.ROLLOUT, (index,), "a", index) for index in range(5)))

    async def ask_all() -> list:
        return await asyncio.gather(*(judge.ask(pool, Question(judge.name, index)) for index in range(5)))

    began = time.monotonic()
    assert asyncio.run(ask_all()) == picks(1, 0, 5)
    assert 0.1 <= time.monotonic() - began < 1.0


def test_a_real_run_measures_every_arm_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "step.json"
    judge = ["--judge-seconds", "0.3", "--judge-lag", "1", "--steps", "2"]
    status = step.main([*TINY, "--compare", "hf", "unshared", *judge, "--json", str(file)])
    shown = capsys.readouterr()
    assert status == 0, shown.err
    found = json.loads(file.read_text())
    assert (found["prefix"], found["suffix"], found["k"], found["batch"]) == (24, 8, 2, 2)
    assert set(found["parts"]) == set(step_report.PARTS)
    for arm in (found, found["hf"]):
        assert len(arm["repeats"]) == 2
        for repeat in arm["repeats"]:
            assert all(seconds > 0 for name, seconds in repeat["parts"].items() if name != "other")
            assert sum(repeat["parts"].values()) == pytest.approx(repeat["seconds"])
    assert found["hf"]["parts"]["judge_wait"] >= 0.3
    assert set(found["hf"]["seconds_by_cache"]) == {"dynamic", "static"}
    # Six questions of a twentieth of a second each: no step is faster than its judge, though none waits for all of it.
    assert found["seconds_per_step"] > 0.28
    assert found["speedup_vs_hf"] == pytest.approx(found["hf"]["seconds_per_step"] / found["seconds_per_step"])
    # The wait of a step may be a little shorter than the judge's time, of which the step before had a share.
    assert 0.9 < found["step_over_longer_of_policy_and_judge"] < 10
    assert found["unshared"]["ratio"] > 0
    assert found["save_seconds"] > 0
    assert {"python", "torch", "megatron-core", "transformers"} <= set(found["versions"])
    assert found["threads"] == 1
    for word in ("judge wait", "hf / sip", "GFLOP/s", "load average"):
        assert word in shown.out
    assert [path.name for path in tmp_path.iterdir()] == ["step.json"]
