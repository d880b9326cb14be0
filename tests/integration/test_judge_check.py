"""tools/judge_check.py against the real vLLM server with the real SmolLM2-135M-Instruct."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from test_vllm_services import PAIRS

from megatron_sip.evaluation.judge_check import ALL_SETS
from megatron_sip.evaluation.judge_pairs import shuffled_words
from tools import judge_check

pytestmark = pytest.mark.server


def test_a_dozen_pairs_by_logit_and_likelihood(judge_url: str, smollm2: Path, tmp_path: Path) -> None:
    records = [{"set": "salad", "prefix": prefix, "good": good, "bad": bad} for prefix, good, bad in PAIRS]
    for number, (prefix, good, _) in enumerate(PAIRS):
        bad = shuffled_words(good, np.random.default_rng(number))
        assert bad is not None
        records.append({"set": "shuffled", "prefix": prefix, "good": good, "bad": bad})
    pairs, out = tmp_path / "pairs.jsonl", tmp_path / "check.json"
    pairs.write_text("".join(json.dumps(record) + "\n" for record in records))
    flags = ["--pairs", str(pairs), "--judge-url", judge_url, "--readings", "logit", "likelihood", "--json", str(out)]
    assert judge_check.main([*flags, "--judge-concurrency", "4"]) == 0
    report = json.loads(out.read_text())
    assert report["model"] == smollm2.name
    found = {(result["reading"], result["set"]): result for result in report["results"]}
    readings = ("quality logit, one order", "quality logit, both orders", "likelihood")
    assert {reading for reading, _ in found} == set(readings)
    for reading in readings:
        result = found[reading, ALL_SETS]
        assert (result["records"], result["unanswered"], result["missing"]) == (12, 0, {})
        assert result["cost"]["spent"]["unmetered"] == 0
        assert result["cost"]["seconds"]["low"] is not None
    one, both, likelihood = (found[reading, ALL_SETS]["cost"]["spent"] for reading in readings)
    # One token is written for each question, and a prompt holds more than its two options.
    assert (one["answer_tokens"], both["answer_tokens"], likelihood["answer_tokens"]) == (12, 24, 24)
    assert 24 * 60 < both["prompt_tokens"] < 24 * 400
    assert both["prompt_tokens"] == pytest.approx(2 * one["prompt_tokens"], rel=0.05)
    # A language model prefers prose to its own words shuffled; that the likelihood does is the least to ask.
    assert found["likelihood", ALL_SETS]["accuracy"]["mean"] >= 10 / 12
    assert found["quality logit, both orders", "salad"]["accuracy"]["mean"] >= 4 / 6
