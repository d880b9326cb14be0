"""Calls and tokens against docs/judges.md and the plans themselves, and what servers take for them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from megatron_sip.cost.hardware import Cluster
from megatron_sip.cost.judging import (
    JudgeQuestions,
    JudgeServers,
    busy_seconds,
    judge_seconds,
    judge_work,
    prompt_rate,
    quality_calls,
    run_work,
    servers_needed,
    token_seconds,
)
from megatron_sip.preference.adaptive import AdaptiveSettings
from megatron_sip.preference.scoring import Distinct, plan_scoring
from megatron_sip.preference.spec import JudgeSpec
from megatron_sip.types import Candidate, CandidateKind

ASK = JudgeQuestions()
SERVERS, H100 = JudgeServers(), Cluster()
ALONE = {"quality_weight": 0.0}
# docs/judges.md, "What a judge costs": batch 256, 17 candidates, P = 1024, S = 128: calls a prefix, millions of
# prompt and of answer tokens a step.
DOCUMENTED = [
    ({"judge_votes": 5}, 680, 266.9, 52.2),
    ({}, 136, 53.4, 10.4),
    ({"scoring": "adaptive"}, 136, 53.4, 10.4),
    ({"scoring": "pivot"}, 16, 6.3, 1.2),
    ({"judge_reading": "logit"}, 272, 101.9, 0.07),
    ({"judge_reading": "logit", "scoring": "pivot"}, 32, 12.0, 0.01),
    ({**ALONE, "safety_weight": 1.0, "judge_votes": 5}, 85, 6.9, 6.5),
    ({**ALONE, "safety_weight": 1.0}, 17, 1.4, 1.3),
    ({**ALONE, "safety_weight": 1.0, "judge_reading": "logit"}, 17, 1.3, 0.004),
    ({**ALONE, "factuality_weight": 1.0}, 17, 6.8, 1.3),
    ({**ALONE, "factuality_weight": 1.0, "judge_reading": "logit"}, 17, 6.8, 0.004),
]


@pytest.mark.parametrize(("changes", "calls", "prompt", "answer"), DOCUMENTED)
def test_calls_and_tokens_are_those_of_the_page(changes: dict, calls: int, prompt: float, answer: float) -> None:
    work = judge_work(replace(ASK, **changes), 1024, 128, 16)
    assert work.calls == calls
    assert work.prompt_tokens * 256 / 1e6 == pytest.approx(prompt, abs=0.051)
    assert work.answer_tokens * 256 / 1e6 == pytest.approx(answer, rel=0.05 if answer > 1 else 0.5)


def test_what_a_prefix_cache_leaves_is_that_of_the_page() -> None:
    written = judge_work(ASK, 1024, 128, 16)
    read = judge_work(replace(ASK, judge_reading="logit"), 1024, 128, 16)
    assert written.computed_tokens == pytest.approx(36e3, rel=0.02)
    assert read.computed_tokens == pytest.approx(71e3, rel=0.02)
    votes = judge_work(replace(ASK, judge_votes=5), 1024, 128, 16)
    assert votes.computed_tokens == written.computed_tokens, "votes of one question share all"


@pytest.mark.parametrize("method", ["all-pairs", "pivot"])
@pytest.mark.parametrize("size", [2, 5, 17])
def test_calls_are_those_that_the_plans_ask(method: str, size: int) -> None:
    pool = [Candidate(CandidateKind.ROLLOUT, (index,), str(index), rollout_index=index) for index in range(size)]
    unique = Distinct(tuple(range(size)), tuple(range(size)))
    judge = JudgeSpec("quality", pairwise=True, weight=1.0, votes=3)
    plan = plan_scoring(method, pool, unique, [judge], seed=1, sample_index=0)
    asked = replace(ASK, scoring=method, judge_votes=3)
    assert quality_calls(asked, size)[0] == len(plan.next_round({}))


@pytest.mark.parametrize(("size", "rounds"), [(17, 4), (3, 4), (17, 2), (2, 4)])
def test_adaptive_asks_its_budget_in_its_rounds(size: int, rounds: int) -> None:
    edges = AdaptiveSettings(rounds=rounds).edges(size, JudgeSpec("quality", pairwise=True, weight=1.0))
    calls, distinct, waits = quality_calls(replace(ASK, scoring="adaptive", adaptive_rounds=rounds), size)
    assert (calls, waits) == (edges[-1], len(edges) - 1)
    assert distinct <= size * (size - 1)


def test_the_paper_asks_196_thousand_calls_a_step() -> None:
    safety = replace(ASK, judge_votes=5, safety_weight=1.0)
    assert judge_work(safety, 1024, 128, 16).calls * 256 == pytest.approx(196e3, rel=0.01)


def test_an_interval_and_a_rewriter() -> None:
    base = judge_work(ASK, 1024, 128, 16)
    every = run_work(replace(ASK, judge_interval=4, pool=("original", "rewrite")), 1024, 128, 16, batch=2)
    # Two candidates make a pair; the rewriter is asked in the steps between too.
    assert [work.calls for work in (every.asked, every.between)] == [2 * (1 + 1), 2]
    assert every.mean(lambda work: work.answer_tokens) == 2 * (300 / 4 + 128)
    rewritten = judge_work(replace(ASK, pool=("rewrite", "rollout")), 1024, 128, 16)
    assert rewritten.calls == base.calls + 1
    assert rewritten.answer_tokens == base.answer_tokens + 128
    assert judge_work(replace(ASK, pool=("rollout",)), 1024, 128, 1).calls == 0, "one candidate is not judged"


def test_a_server_reads_prompts_at_its_share_of_the_peak() -> None:
    assert prompt_rate(SERVERS, H100) == pytest.approx(989e12 * 0.3 / (2 * 5.1e9))
    assert prompt_rate(replace(SERVERS, judge_prompt_rate=123.0), H100) == 123.0


def test_a_full_batch_of_experts_reads_all_weights_and_a_single_row_a_few() -> None:
    one, full = (token_seconds(SERVERS, H100, rows, 0) - 2e-3 for rows in (1, 256))
    assert one == pytest.approx(65.3e9 * (5.1 / 116.8) / (3.35e12 * 0.6))
    assert full == pytest.approx(65.3e9 / (3.35e12 * 0.6), rel=1e-3)
    dense = replace(SERVERS, judge_parameters=8e9, judge_active_parameters=8e9, judge_weight_gb=16)
    assert token_seconds(dense, H100, 1, 0) == pytest.approx(16e9 / (3.35e12 * 0.6) + 2e-3)


def test_servers_share_the_work_until_the_answers_alone_remain() -> None:
    work = judge_work(ASK, 1024, 128, 16) * 256
    times = [judge_seconds(work, SERVERS, H100, count) for count in (1, 2, 8, 32, 128, 1024, 30_720)]
    assert times == sorted(times, reverse=True)
    assert times[0] / times[1] == pytest.approx(2.0, rel=0.01)
    floor = 299 * token_seconds(SERVERS, H100, 1.0, 0)
    assert floor < times[-1] < 1.2 * floor


def test_measured_rates_take_the_place_of_the_model() -> None:
    work = judge_work(ASK, 1024, 128, 16) * 256
    known = replace(SERVERS, judge_prompt_rate=1e5, judge_answer_rate=5e3)
    expected = work.computed_tokens / (4 * 1e5) + work.answer_tokens / (4 * 5e3)
    assert judge_seconds(work, known, H100, 4) == pytest.approx(expected)


def test_servers_needed_are_the_fewest() -> None:
    work = judge_work(ASK, 1024, 128, 16) * 256
    for within in (15.0, 60.0, 1e5):
        count = servers_needed(work, SERVERS, H100, within)
        assert count is not None
        assert judge_seconds(work, SERVERS, H100, count) <= within
        assert count == 1 or judge_seconds(work, SERVERS, H100, count - 1) > within
    assert servers_needed(work, SERVERS, H100, 0.5) is None, "an answer alone takes longer"
    assert servers_needed(work * 0, SERVERS, H100, 0.5) == 0


def test_adaptive_rounds_wait_for_answers_one_after_the_other() -> None:
    four, one = (
        judge_work(replace(ASK, scoring="adaptive", adaptive_rounds=rounds), 1024, 128, 16) * 256 for rounds in (4, 1)
    )
    many = 100_000
    read = four.computed_tokens / (many * prompt_rate(SERVERS, H100))
    ratio = (judge_seconds(four, SERVERS, H100, many) - read) / (judge_seconds(one, SERVERS, H100, many) - read)
    assert ratio == pytest.approx(4.0)


def test_work_at_full_load_is_the_least_that_judging_costs() -> None:
    work = judge_work(ASK, 1024, 128, 16) * 256
    busy = busy_seconds(work, SERVERS, H100)
    for count in (1, 60, 120, 500):
        assert busy <= count * judge_seconds(work, SERVERS, H100, count) * (1 + 1e-9)
    assert busy_seconds(work * 0, SERVERS, H100) == 0
    assert math.isclose(busy_seconds(work * 3, SERVERS, H100), 3 * busy)
