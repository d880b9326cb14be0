"""True steps of the method by the command line: with the real vLLM server, with a real model as policy, and each of
the other objectives with a scripted server."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from commands import Command, Outcome, run_commands
from fake_server import FakeServer
from forks import run_checks
from tiny_corpus import documents, make_corpus, write_corpus
from tiny_run import DATA, MODEL, TRAINING

from megatron_sip.services.prompts import REWRITE_END

HERE = Path(__file__).parent
LOG_2 = math.log(2)


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def finished(commands: list[Command], folder: Path) -> dict[str, list[Outcome]]:
    """The outcomes of commands that must succeed on both ranks."""
    outcomes = run_commands(commands, 2, folder)
    for name, ranks in outcomes.items():
        assert [rank.status for rank in ranks] == [0, 0], f"{name}: {ranks[0].stdout}{ranks[0].stderr}"
    return outcomes


@pytest.mark.server
def test_sip_steps_with_the_real_server(judge_url: str, tmp_path: Path) -> None:
    """Rollouts, rewrites and the original, three judges, two steps at TP 2; one more; and the second once more."""
    data_path, tokenizer = make_corpus(tmp_path / "data")
    saved, metrics, samples = tmp_path / "saved", tmp_path / "metrics.jsonl", tmp_path / "samples.jsonl"
    flags = [*MODEL, "--data-path", data_path, "--tokenizer-model", tokenizer, "--judge-url", judge_url]
    flags += (
        "--tensor-model-parallel-size 2 --sequence-parallel --seq-length 96 --suffix-length 24 --min-prefix-length 16 "
        "--global-batch-size 2 --micro-batch-size 1 --num-rollouts 2 --pool original rewrite rollout --lr 1e-3 "
        "--lr-decay-iters 3 --judge-reading logit --quality-weight 1 --likelihood-weight 1 --classifier-weight 1 "
        "--judge-timeout 240"
    ).split()
    fewer = "--pool original rollout --num-rollouts 1".split()
    own = ["--save", str(saved), "--metrics-file", str(metrics), "--sample-log", str(samples)]
    first = Command("two-steps", [*flags, *own, "--save-interval", "1", "--train-iters", "2"], str(saved))
    outcomes = finished([first], tmp_path / "first")
    again = tmp_path / "again"
    shutil.copytree(saved, again)
    (again / "latest_checkpointed_iteration.txt").write_text("1\n")
    repeated = ["--save", str(again), "--load", str(again), "--metrics-file", str(tmp_path / "again.jsonl")]
    commands = [
        # Two candidates need two verdicts instead of twelve.
        Command("one-more", [*flags, *fewer, *own, "--train-iters", "3", "--load", str(saved)], str(saved)),
        Command("again", [*flags, *repeated, "--train-iters", "2"], str(again)),
    ]
    outcomes |= finished(commands, tmp_path / "then")
    assert "at iteration 2 (4 samples consumed)" in outcomes["one-more"][0].stdout
    assert (saved / "latest_checkpointed_iteration.txt").read_text().split() == ["3"]

    steps = lines_of(metrics)
    assert [step["iteration"] for step in steps] == [1, 2, 3]
    for step in steps:
        assert step["pairs/valid"] == 2, "shares of a real model are never equal"
        assert step["judge/asked"] > step["judge/missing"]
        assert step["steps/skipped"] == 0
        assert step["time/judge_wait"] > 0
    assert steps[0]["loss"] == pytest.approx(LOG_2, abs=1e-5)
    assert sum(step["judge/missing"] for step in steps) == 0, "a likelihood and a share can always be read"

    records = lines_of(samples)
    assert len(records) == 6
    assert {record["sample_index"] for record in records} == set(range(6))
    kinds = [candidate["kind"] for record in records for candidate in record["candidates"]]
    assert kinds.count("original") == 6
    assert kinds.count("rollout") == 2 * 2 * 2 + 2
    absent = sum(step["candidates/missing"] for step in steps)
    assert kinds.count("rewrite") + absent == 4, "every rewrite is a candidate or counted as missing"
    for record in records:
        assert sum(candidate["chosen"] for candidate in record["candidates"]) == 1
        assert sum(candidate["rejected"] for candidate in record["candidates"]) == 1
        for candidate in record["candidates"]:
            assert set(candidate["by_judge"]) == {"quality", "likelihood", "classifier"}
            assert all(0 <= score <= 1 for score in candidate["by_judge"].values())
            assert candidate["score"] == pytest.approx(sum(candidate["by_judge"].values()))
    print(f"{kinds.count('rewrite')} of 4 rewrites were usable")

    # The server would answer otherwise; the journal answers as it did.
    (second,) = lines_of(tmp_path / "again.jsonl")
    asking = ("time/", "throughput/", "unix_time", "elapsed_ms", "judge/from_journal", "judge/prompts_trimmed")
    assert second["judge/from_journal"] == second["judge/asked"] + 2
    assert {k: v for k, v in second.items() if not k.startswith(asking)} == {
        k: v for k, v in steps[1].items() if not k.startswith(asking)
    }


SUFFIXES = [
    32,
    # The method's own length takes minutes on two cores.
    pytest.param(128, marks=[pytest.mark.nightly, pytest.mark.timeout(2400)]),
]


@pytest.mark.server
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_sip_steps_on_smollm2(judge_url: str, smollm2: Path, tmp_path: Path, suffix: int) -> None:
    """The real SmolLM2-135M as policy at TP 2, prefixes of 64 tokens, K = 2, scored by its own likelihood and more."""
    data_path = write_corpus(tmp_path, str(smollm2), documents(8, 30, seed=3))
    metrics = tmp_path / "metrics.jsonl"
    flags = ["--load", str(smollm2), "--tokenizer-model", str(smollm2), "--data-path", data_path]
    flags += ["--metrics-file", str(metrics), "--judge-url", judge_url]
    flags += (
        f"--seq-length {64 + suffix} --suffix-length {suffix} --min-prefix-length 64 --max-prefix-length 64 "
        "--tensor-model-parallel-size 2 --pad-query-groups --global-batch-size 2 --micro-batch-size 1 --num-rollouts 2 "
        "--train-iters 2 --lr 1e-5 "
        "--quality-weight 0 --likelihood-weight 1 --classifier-weight 1 --judge-timeout 240"
    ).split()
    out = run_checks(str(HERE / "check_smollm2_sip.py"), 2, *flags, timeout=300 if suffix == 32 else 2000)
    assert out.count("padding as it should be") == 2
    assert "the reference policy starts as a copy of the policy" in out
    first, second = lines_of(metrics)
    assert first["pairs/valid"] == second["pairs/valid"] == 2
    assert first["judge/missing"] == second["judge/missing"] == 0
    # Policy and reference are equal before any update, so the loss is log 2 whatever the pairs are.
    assert first["loss"] == pytest.approx(LOG_2, abs=1e-6)
    assert first["rewards/margins"] == pytest.approx(0.0, abs=1e-6)
    assert abs(second["loss"] - LOG_2) > 1e-6, "the policy has moved, the reference has not"
    assert first["lengths/chosen"] == first["lengths/rejected"] == suffix
    assert first["grad_norm"] > 0
    # A pretrained model writes far more likely text than a fresh one, whose tokens cost ln(49152) = 10.8 each.
    assert -first["logps/chosen"] / suffix < 6


def write_answer(body: dict[str, Any]) -> str:
    """The scripted server: a rewrite for the rewriter, for the judge a verdict that depends on the texts."""
    prompt = body["messages"][0]["content"]
    if REWRITE_END in prompt:
        return "The gentle baker gives warm bread to everybody in the small village again."
    return f"Reasons. \nConclusion: option {1 + sum(prompt.encode()) % 2}"


OBJECTIVES = {
    "rf-nll": "--quality-weight 1 --pool original rewrite rollout --judge-votes 2",
    "sft-rewrite": "",
    "sft-rollout": "",
    "dpo-rewrite-over-rollout": "",
}


def test_the_other_objectives_take_a_step(tmp_path: Path) -> None:
    """One step each of the baselines that ask a judge or a rewriter, at TP 2, in one launch."""
    data_path, tokenizer = make_corpus(tmp_path / "data")
    base = [*MODEL, *DATA, *TRAINING, "--data-path", data_path, "--tokenizer-model", tokenizer]
    base += ["--tensor-model-parallel-size", "2", "--train-iters", "1", "--lr-decay-iters", "1"]
    base += ["--distributed-timeout-minutes", "1"]
    with FakeServer(answer=write_answer) as server:
        commands = []
        for objective, more in OBJECTIVES.items():
            flags = ["--objective", objective, "--judge-url", server.url, *more.split()]
            flags += ["--metrics-file", str(tmp_path / f"{objective}.jsonl")]
            flags += ["--sample-log", str(tmp_path / f"{objective}-samples.jsonl")]
            commands.append(Command(objective, [*base, *flags], str(tmp_path / "data")))
        outcomes = run_commands(commands, 2, tmp_path / "cases")
    steps = {}
    for objective, ranks in outcomes.items():
        assert [rank.status for rank in ranks] == [0, 0], f"{objective}: {ranks[0].stdout}{ranks[0].stderr}"
        (steps[objective],) = lines_of(tmp_path / f"{objective}.jsonl")
        assert steps[objective]["steps/skipped"] == 0
        assert steps[objective]["grad_norm"] > 0

    for objective in ("sft-rewrite", "sft-rollout", "dpo-rewrite-over-rollout"):
        assert steps[objective]["pairs/valid"] == 4
        assert steps[objective]["judge/asked"] == 0, "no judge is asked"
    assert steps["rf-nll"]["pairs/valid"] > 0
    # 5 candidates, 10 pairs with two votes each, and 5 answers of the classifier, for each of 4 prefixes.
    assert steps["rf-nll"]["judge/asked"] == 4 * (2 * 10 + 5)
    assert steps["sft-rewrite"]["chosen/share_rewrite"] == 1
    assert steps["sft-rollout"]["chosen/share_rollout"] == 1
    assert steps["dpo-rewrite-over-rollout"]["chosen/share_rewrite"] == 1
    assert steps["dpo-rewrite-over-rollout"]["loss"] == pytest.approx(LOG_2, abs=1e-5)
    # A fresh model knows nothing: about ln(320) for each token of what is imitated.
    for objective in ("rf-nll", "sft-rewrite", "sft-rollout"):
        assert steps[objective]["loss"] == pytest.approx(math.log(320), abs=0.5)
    for record in lines_of(tmp_path / "dpo-rewrite-over-rollout-samples.jsonl"):
        (rejected,) = [candidate["kind"] for candidate in record["candidates"] if candidate["rejected"]]
        assert rejected == "rollout"
