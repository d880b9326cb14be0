"""The whole loop by its command line, without a server: a deterministic local classifier scores the candidates."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from pathlib import Path

import pytest
from forks import forked
from spawn import complaint
from tiny_corpus import make_corpus
from tiny_run import DATA, MODEL, TRAINING


class Runs:
    """Launches of the product on one small corpus."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.data_path, self.tokenizer = make_corpus(root / "data")

    def __call__(self, name: str, world_size: int, *flags: str) -> list[dict]:
        """Run with `flags`; the metrics of every iteration."""
        log = self.root / f"{name}.jsonl"
        result = forked(
            world_size,
            *("-m", "megatron_sip.pretrain", "--data-path", self.data_path, "--tokenizer-model", self.tokenizer),
            *(*MODEL, *DATA, *TRAINING, "--metrics-file", str(log), "--save", str(self.root / name), *flags),
        )
        assert result.returncode == 0, complaint(result)
        self.output = result.stdout
        return [json.loads(line) for line in log.read_text().splitlines()]

    def copy_at(self, source: str, target: str, iteration: int) -> str:
        """A copy of a run's folder that stands at an earlier checkpoint."""
        shutil.copytree(self.root / source, self.root / target)
        (self.root / target / "latest_checkpointed_iteration.txt").write_text(f"{iteration}\n")
        return str(self.root / target)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("loop"))


@pytest.fixture(scope="module")
def unbroken(runs: Runs) -> list[dict]:
    """Six steps of online DPO at TP2 with a checkpoint at the third, of which one rank records a trace."""
    trace = ("--profile", "--profile-step-start", "2", "--profile-step-end", "3", "--profile-ranks", "1")
    flags = ("--tensor-model-parallel-size", "2", "--save-interval", "3", "--peak-tflops", "0.1")
    lines = runs("unbroken", 2, *flags, *trace)
    assert "iteration        6/" in runs.output
    assert "| throughput per GPU (TFLOP/s/GPU): " in runs.output
    return lines


def without_times(lines: list[dict]) -> list[dict]:
    """The metrics that must repeat bit for bit."""
    changing = ("time/", "throughput/", "unix_time", "elapsed_ms", "judge/from_journal")
    return [{key: value for key, value in line.items() if not key.startswith(changing)} for line in lines]


def test_online_dpo_trains_pairs(unbroken: list[dict]) -> None:
    assert [line["iteration"] for line in unbroken] == [1, 2, 3, 4, 5, 6]
    assert sum(line["pairs/valid"] for line in unbroken) > 12
    first = next(line for line in unbroken if line["pairs/valid"])
    # Policy and reference are equal at first, so the loss is log 2 whatever the pairs are.
    assert first["loss"] == pytest.approx(0.6931472, abs=1e-5)
    assert first["rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    assert all(line["consumed_samples"] == 4 * line["iteration"] for line in unbroken)
    assert any(line["rewards/margins"] > 0 for line in unbroken[1:])
    for line in unbroken:
        assert 0 < line["throughput/mfu"] == pytest.approx(line["throughput/tflops_per_gpu"] / 0.1)


def test_a_trace_shows_the_parts_of_the_step(runs: Runs, unbroken: list[dict]) -> None:
    folder = runs.root / "unbroken" / "profile"
    name = "rank_1.iterations_3_3"
    assert sorted(file.name for file in folder.iterdir()) == [f"{name}.pt.trace.json.gz", f"{name}.txt"]
    with gzip.open(folder / f"{name}.pt.trace.json.gz") as file:
        events = [event for event in json.load(file)["traceEvents"] if event.get("dur") is not None]
    parts = {event["name"]: event for event in events if event["name"].startswith("sip::")}
    inside = ("rollout", "judge", "train", "reference", "forward_backward", "optimizer", "save")
    assert parts.keys() >= {"sip::iteration 3", *(f"sip::{part}" for part in inside)}
    whole = parts["sip::iteration 3"]
    for part in inside:
        event = parts[f"sip::{part}"]
        assert whole["ts"] <= event["ts"], part
        assert event["ts"] + event["dur"] <= whole["ts"] + whole["dur"] + 1, part
    assert any(event["name"] == "aten::mm" for event in events)
    table = (folder / f"{name}.txt").read_text()
    assert "sip::optimizer" in table
    assert "aten::" in table


def test_resume_is_bitwise_equal_at_the_same_layout(runs: Runs, unbroken: list[dict]) -> None:
    folder = runs.copy_at("unbroken", "resumed", 3)
    lines = runs("resumed", 2, "--tensor-model-parallel-size", "2", "--load", folder)
    assert without_times(lines) == without_times(unbroken[3:])


def test_resume_at_another_layout_goes_on(runs: Runs, unbroken: list[dict]) -> None:
    folder = runs.copy_at("unbroken", "resharded", 3)
    # With memory for a part of the four prefixes at a time.
    memory = ("--rollout-memory-gib", "0.00018")
    lines = runs("resharded", 2, "--pipeline-model-parallel-size", "2", "--load", folder, *memory)
    assert "rollouts in 2 waves of up to 2 prefixes" in runs.output
    for line, wanted in zip(lines, unbroken[3:], strict=True):
        assert line["consumed_samples"] == wanted["consumed_samples"]
        assert line["loss"] == pytest.approx(wanted["loss"], rel=1e-4)


def test_resume_with_another_schedule_goes_on_and_says_so(runs: Runs, unbroken: list[dict]) -> None:
    folder = runs.copy_at("unbroken", "extended", 3)
    flags = ("--tensor-model-parallel-size", "2", "--load", folder, "--lr-decay-iters", "12")
    lines = runs("extended", 2, *flags)
    assert "lr_decay_steps was 6 and is 12" in runs.output
    assert lines[0]["loss"] == unbroken[3]["loss"]
    assert lines[0]["learning_rate"] > unbroken[3]["learning_rate"]


def test_other_data_settings_refuse_to_resume(runs: Runs, unbroken: list[dict]) -> None:
    folder = runs.copy_at("unbroken", "refused", 3)
    result = forked(
        1,
        *("-m", "megatron_sip.pretrain", "--data-path", runs.data_path, "--tokenizer-model", runs.tokenizer),
        *(*MODEL, *DATA, *TRAINING, "--load", folder, "--save", folder, "--suffix-length", "12"),
    )
    assert result.returncode != 0
    assert "--suffix-length was 16 and is 12" in result.stderr
    assert (runs.root / "refused" / "latest_checkpointed_iteration.txt").read_text() == "3\n"


def ntp_operations(vocab_size: int) -> float:
    """Of three passes of four rows of 96 tokens, in four layers of 4 heads and 2 groups of 8, and the head."""
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64
    return 3 * 4 * (2 * 4 * layer * 96 + 4 * 4 * 32 * (96 * 97 // 2) + 2 * 32 * vocab_size * 95)


def test_next_token_prediction_and_rf_nll_share_the_loop(runs: Runs) -> None:
    """The first run has no end but its time limit: it saves what it trained and leaves well."""
    base = ("--tensor-model-parallel-size", "2", "--sequence-parallel", "--lr-decay-iters", "4")
    limit = ("--train-iters", "1000000", "--exit-duration-in-mins", "0.15")
    ntp = runs("ntp", 2, *base, *limit, "--objective", "ntp", "--lr", "1e-2")
    assert ntp[-1]["loss"] < ntp[0]["loss"]
    operations = ntp_operations(int(re.search(r"vocab_size: (\d+)", runs.output)[1]))
    for line in ntp:
        done = 1e12 * line["throughput/tflops_per_gpu"] * 2 * line["elapsed_ms"] / 1000
        assert done == pytest.approx(operations)
    last = ntp[-1]["iteration"]
    assert f"> stopping after iteration {last}: --exit-duration-in-mins" in runs.output
    assert f"> checkpoint of iteration {last} saved to " in runs.output
    assert (runs.root / "ntp" / "latest_checkpointed_iteration.txt").read_text() == f"{last}\n"
    flags = ("--train-iters", "4", "--objective", "rf-nll", "--load", str(runs.root / "ntp"), "--finetune")
    rf_nll = runs("rf-nll", 2, *base, *flags)
    assert sum(line["pairs/valid"] for line in rf_nll) > 8
