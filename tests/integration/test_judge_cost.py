"""What the real server is spared: by its prefix cache, which /metrics tells, and by our cache of answers."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from megatron_sip.config.groups import Config, JudgeConfig, PreferenceConfig
from megatron_sip.services.hub import PreferenceServices
from megatron_sip.services.rewriter import RewriteRequest
from megatron_sip.types import Answers, Missing, Pool, Question
from tools.bench.judge_server import arms, measure
from tools.bench.prose_pools import prose_pools
from tools.bench.vllm_metrics import fetch

pytestmark = pytest.mark.server

SENTENCES = (
    "The old lighthouse stood at the end of the pier and its keeper climbed the stairs every evening.",
    "Water boils at one hundred degrees at sea level, and sooner on a mountain where the air is thin.",
    "My grandmother baked bread on Saturdays while we played in the garden and waited for the smell.",
    "The film begins slowly, but after half an hour the story picks up speed and does not let go.",
    "Rome built roads that bound its provinces, and merchants travelled along them for many weeks.",
    "When the train arrived the passengers stepped down and looked for the people who waited there.",
)


def pools(count: int, candidates: int) -> list[Pool]:
    texts = [" ".join(SENTENCES[(start + n) % len(SENTENCES)] for n in range(12)) for start in range(len(SENTENCES))]
    return prose_pools(texts, count, candidates, prefix_words=120, suffix_words=30)


def test_prompts_of_one_pool_share_the_prefix_cache(judge_url: str) -> None:
    config = JudgeConfig(judge_url=(judge_url,), judge_concurrency=16, judge_timeout=300.0)
    by_name = {arm.name: arm for arm in arms(max_tokens=16, generated_pairs=1)}
    found = {name: asyncio.run(measure(by_name[name], pools(2, 4), config)) for name in ("unshared", "quality")}
    for row in found.values():
        assert row.verdicts == 2 * 4 * 3
        assert not row.missing
    before, shared = found["unshared"].hit_rate, found["quality"].hit_rate
    assert before is not None
    assert shared is not None
    # The chat template's own first words are shared even by prompts that begin with a code.
    assert before < 0.15
    assert shared > 0.4
    print(f"prefix cache hits: {before:.3f} without shared text, {shared:.3f} with it")


def test_a_second_pass_over_the_same_documents_asks_nobody(judge_url: str, tmp_path: Path) -> None:
    judge = JudgeConfig(
        judge_url=(judge_url,),
        judge_reading="logit",
        judge_timeout=300.0,
        quality_weight=0.0,
        safety_weight=1.0,
        factuality_weight=1.0,
        judge_cache=str(tmp_path),
    )
    config = Config(judge=judge, preference=PreferenceConfig(pool=("original", "rewrite")))
    documents = pools(3, 1)
    questions = [[Question("safety", 0), Question("factuality", 0)]] * len(documents)

    def one_pass(epoch: int) -> tuple[list[Answers], list[str | Missing], dict[str, float]]:
        """Verdicts, rewrites, and counts: calls, prompt tokens that the server saw, answers from the cache."""
        of_epoch = [Pool(pool.sample_index + 100 * epoch, *_texts(pool), pool.candidates) for pool in documents]
        requests = [RewriteRequest(pool.sample_index, pool.candidates[0].tokens, *_texts(pool)) for pool in of_epoch]
        with PreferenceServices(config, {}) as services:
            calls, seen = services.stats()["judge_calls"], fetch(judge_url)
            verdicts = services.submit_answers(of_epoch, questions).result(300)
            counted = {"calls": services.stats()["judge_calls"] - calls, "tokens": fetch(judge_url).since(seen).prompt}
            texts = services.submit_rewrites(requests, 200).result(300)
            return verdicts, texts, counted | {"from_cache": services.stats()["from_cache"]}

    verdicts, texts, counted = one_pass(0)
    assert not any(isinstance(value, Missing) for group in verdicts for value in group.values())
    assert counted["calls"] >= 6
    assert counted["tokens"] > 6 * 100
    assert counted["from_cache"] == 0
    again, same_texts, counted = one_pass(1)
    assert again == verdicts
    assert (counted["calls"], counted["tokens"]) == (0, 0)
    # The small model does not end every rewrite in time; what is missing is asked again.
    whole = {index: text for index, text in enumerate(texts) if not isinstance(text, Missing)}
    assert {index: same_texts[index] for index in whole} == whole
    assert counted["from_cache"] == 6 + len(whole)
    print(f"second pass: 0 calls for 6 verdicts; {len(whole)} of 3 rewrites from the cache")


def _texts(pool: Pool) -> tuple[str, str]:
    return pool.prefix_text, pool.original_text
