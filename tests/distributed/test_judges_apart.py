"""Several judges on two data parallel ranks: own servers, a screen, and what metrics and sample log say of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from fake_server import FakeServer
from forks import forked
from tiny_corpus import make_corpus
from tiny_run import DATA, MODEL, TRAINING


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_with_two_pairwise_judges_a_reward_model_and_a_screen(tmp_path: Path) -> None:
    data_path, tokenizer = make_corpus(tmp_path / "data")
    metrics, samples = tmp_path / "metrics.jsonl", tmp_path / "samples.jsonl"
    with FakeServer(models=("first",)) as first, FakeServer(models=("second",)) as second:
        first.label_logprobs = (math.log(0.6), math.log(0.2))  # whoever stands first has 3/4
        second.answer = lambda body: f"Conclusion: option {1 + len(body['messages'][0]['content']) % 2}"
        # Rank by what is written, so that there are pairs; below 0 it counts as unsafe.
        second.logits = lambda body: [float(sum(body["input"].encode()) % 7 - 3)]
        flags = [*MODEL, *DATA, *TRAINING, "--data-path", data_path, "--tokenizer-model", tokenizer]
        flags += ["--train-iters", "2", "--metrics-file", str(metrics), "--sample-log", str(samples)]
        flags += ["--judge-url", first.url, "--judge-reading", "logit", "--quality-weight", "1"]
        flags += ["--judge-set", f"quality-b.url={second.url}", "quality-b.kind=quality", "quality-b.reading=generate"]
        flags += ["quality-b.votes=2", f"reward.url={second.url}", "reward.weight=0.5"]
        flags += ["--screen-safety-below", "0.9", "--pool", "rollout"]
        done = forked(2, "-m", "megatron_sip.pretrain", *flags)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for line in records(metrics):
        for judge in ("quality", "quality-b", "reward", "classifier"):
            assert 0 <= line[f"scores/{judge}/rollout"] <= 1
        assert math.isclose(line["judge/position_bias/quality"], 0.25, abs_tol=1e-6)
        assert -0.5 <= line["judge/position_bias/quality-b"] <= 0.5
        assert line["judge/order_consistency/quality"] == 0.0
        assert "judge/order_consistency/quality-b" not in line, "it is asked in one order"
        assert line["judge/missing"] == 0
        # 4 cuts of 3 rollouts: reward and classifier ask about each. A pair left costs 2 + 2 questions.
        pairs, rest = divmod(line["judge/asked"] - 2 * 12, 4)
        assert rest == 0
        assert 0 <= pairs <= 12
        assert line["candidates/screened"] > 0
        assert pairs < 12
    assert "position bias: +0" in done.stdout
    [record, *_] = records(samples)
    assert record["models"] == {
        "quality": "first",
        "reward": "second",
        "classifier": "profanity-check",
        "quality-b": "second",
    }
    assert record["prompt_versions"]["quality"].startswith("quality-logit-")
    assert record["prompt_versions"]["quality-b"].startswith("quality-generate-")
    assert record["readings"]["reward"] == "classify text scale 1.0 offset 0.0"
    for candidate in record["candidates"]:
        given = [value for value in candidate["by_judge"].values() if value is not None]
        assert candidate["judge_min"] == min(given)
        assert math.isclose(candidate["judge_mean"], sum(given) / len(given))
