"""What judges are asked about one prefix, in calls and tokens, and what their servers take for a step.

Calls and tokens follow docs/judges.md. A server is bound as decoding is anywhere: each token of an answer reads the
weights once for all calls in flight, and the keys and values of each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from megatron_sip.config.groups import PreferenceConfig
from megatron_sip.config.judge_groups import JudgeConfig
from megatron_sip.cost.assumed import assumed, setting
from megatron_sip.cost.hardware import Cluster
from megatron_sip.preference.adaptive import AdaptiveSettings
from megatron_sip.preference.spec import JudgeSpec

_INSTRUCTIONS = {
    ("quality", "generate"): 253,
    ("quality", "logit"): 184,
    ("safety", "generate"): 191,
    ("safety", "logit"): 175,
    ("factuality", "generate"): 281,
    ("factuality", "logit"): 272,
    ("rewriter", "generate"): 226,
}
"""Tokens of instructions and chat template (docs/judges.md, counted with the SmolLM2 tokenizer)."""
_BEHIND_SHARED = {"generate": 110, "logit": 120}
"""Of these, the tokens behind what the prompts of a pool share: a pair's markers and reminder."""


@dataclass(frozen=True)
class JudgeQuestions:
    """What is asked. The flags are the trainer's; a weight above 0 is all that counts of it."""

    pool: tuple[str, ...] = setting(PreferenceConfig.pool, "kinds of candidates: original, rewrite, rollout")
    quality_weight: float = setting(JudgeConfig.quality_weight, "pairwise quality judge")
    safety_weight: float = setting(JudgeConfig.safety_weight, "pointwise safety judge")
    factuality_weight: float = setting(JudgeConfig.factuality_weight, "pointwise factuality judge")
    judge_reading: Literal["generate", "logit"] = setting(JudgeConfig.judge_reading, "how a verdict is read")
    judge_votes: int = setting(JudgeConfig.judge_votes, "votes of a question")
    judge_option_order: Literal["auto", "random", "both"] = setting(
        JudgeConfig.judge_option_order, "which option is shown first"
    )
    judge_interval: int = setting(JudgeConfig.judge_interval, "judges are asked every so many steps")
    scoring: Literal["all-pairs", "adaptive", "pivot"] = setting(PreferenceConfig.scoring, "which pairs are asked")
    adaptive_budget: int | None = setting(PreferenceConfig.adaptive_budget, "calls of a pairwise judge for a prefix")
    adaptive_rounds: int = setting(PreferenceConfig.adaptive_rounds, "rounds of --scoring adaptive")
    judge_answer_tokens: int = assumed(300, "tokens of a written verdict", "docs/judges.md's example; measure yours")
    judge_lag: int = setting(0, "1: train on the batch before while this one is judged")

    def candidates(self, rollouts: int) -> int:
        """Candidates of a pool, all taken to be distinct."""
        return sum(kind in self.pool for kind in ("original", "rewrite")) + rollouts * ("rollout" in self.pool)


@dataclass(frozen=True)
class JudgeServers:
    """The judge's model and what a server of it does."""

    judge_servers: int | None = setting(None, "servers; none: as many as make the run cost the fewest GPU-hours")
    judge_gpus_per_server: int = assumed(1, "GPUs of a server", "gpt-oss-120b fits one of 80 GB")
    judge_parameters: float = assumed(116.8e9, "parameters of the judge", "gpt-oss-120b, arXiv 2508.10925")
    judge_active_parameters: float = assumed(5.1e9, "parameters that a token passes", "gpt-oss-120b, the same")
    judge_weight_gb: float = assumed(65.3, "weights of the judge, 10^9 bytes", "gpt-oss-120b in MXFP4, the same")
    judge_cache_kb: float = assumed(36.9, "keys and values of a token, 10^3 bytes", "its 18 layers of full attention")
    judge_rows: int = assumed(256, "calls in flight of a server", "ours: their own tokens fit beside the weights")
    judge_prefill_mfu: float = assumed(0.30, "share of the peak while reading prompts", "ours: mixture of experts")
    judge_decode_mfu: float = assumed(0.30, "share of the peak while writing", "ours")
    judge_bandwidth_share: float = assumed(0.60, "share of the memory bandwidth while writing", "ours")
    judge_token_overhead_ms: float = assumed(2.0, "further milliseconds of each token of an answer", "ours")
    judge_prompt_rate: float | None = setting(None, "measured prompt tokens/s of a server that are computed")
    judge_answer_rate: float | None = setting(None, "measured answer tokens/s of a server at full load")


@dataclass(frozen=True)
class JudgeWork:
    """What is asked about one prefix: calls, tokens of prompts, those of them that a prefix cache leaves to compute,
    tokens of answers, and how often answers are waited for."""

    calls: float
    prompt_tokens: float
    computed_tokens: float
    answer_tokens: float
    rounds: int

    def __mul__(self, times: float) -> JudgeWork:
        return JudgeWork(
            self.calls * times,
            self.prompt_tokens * times,
            self.computed_tokens * times,
            self.answer_tokens * times,
            self.rounds,
        )

    def __add__(self, other: JudgeWork) -> JudgeWork:
        """Both at once."""
        return JudgeWork(
            self.calls + other.calls,
            self.prompt_tokens + other.prompt_tokens,
            self.computed_tokens + other.computed_tokens,
            self.answer_tokens + other.answer_tokens,
            max(self.rounds, other.rounds),
        )


@dataclass(frozen=True)
class RunWork:
    """What the steps of a run ask: every `interval`-th of them `asked`, the others `between`."""

    asked: JudgeWork
    between: JudgeWork
    interval: int

    def mean(self, of: Callable[[JudgeWork], float]) -> float:
        """Over the steps. Judging lags behind by one step at most, so no step takes up what another has left over."""
        return (of(self.asked) + (self.interval - 1) * of(self.between)) / self.interval


def quality_calls(questions: JudgeQuestions, size: int) -> tuple[int, int, int]:
    """(calls, distinct prompts, rounds) of the pairwise judge for a pool of `size`; for adaptive the whole budget."""
    logit = questions.judge_reading == "logit"
    if size < 2:
        return 0, 0, 0
    if questions.scoring == "adaptive":
        spec = JudgeSpec(
            "quality", pairwise=True, weight=1.0, repeats=1 if logit else PreferenceConfig.adaptive_repeats
        )
        settings = AdaptiveSettings(rounds=questions.adaptive_rounds, budget=questions.adaptive_budget)
        edges = settings.edges(size, spec)
        return edges[-1], min(edges[-1], size * (size - 1)), len(edges) - 1
    order = questions.judge_option_order
    orders = 2 if order == "both" or (order == "auto" and logit) else 1
    pairs = size - 1 if questions.scoring == "pivot" else size * (size - 1) // 2
    return pairs * orders * (1 if logit else questions.judge_votes), pairs * orders, 1


def judge_work(questions: JudgeQuestions, prefix: int, suffix: int, rollouts: int) -> JudgeWork:
    """All judges and the rewriter, for one prefix of an iteration in which they are asked."""
    size, reading = questions.candidates(rollouts), questions.judge_reading
    votes = 1 if reading == "logit" else questions.judge_votes
    # The one token of a logit verdict comes out of the pass over the prompt.
    answer = questions.judge_answer_tokens if reading == "generate" else 1
    calls, prompts, rounds = quality_calls(questions, size) if questions.quality_weight > 0 else (0, 0, 0)
    head = _INSTRUCTIONS["quality", reading]
    total = float(calls * (head + prefix + 2 * suffix))
    computed = (head + prefix + size * suffix + prompts * (suffix + _BEHIND_SHARED[reading])) if calls else 0.0
    for name, weight, context in (
        ("safety", questions.safety_weight, 0),
        ("factuality", questions.factuality_weight, prefix + suffix),
    ):
        if weight > 0 and size > 1:
            head = _INSTRUCTIONS[name, reading]
            calls, rounds = calls + votes * size, max(rounds, 1)
            total += votes * size * (head + context + suffix)
            computed += head + context + size * (suffix + _BEHIND_SHARED[reading])
    verdicts = JudgeWork(calls, total, computed, calls * answer, rounds)
    return verdicts + rewrite_work(questions, prefix, suffix)


def rewrite_work(questions: JudgeQuestions, prefix: int, suffix: int) -> JudgeWork:
    """The rewriter alone, for one prefix."""
    if "rewrite" not in questions.pool:
        return JudgeWork(0, 0, 0, 0, 0)
    prompt = _INSTRUCTIONS["rewriter", "generate"] + prefix + suffix
    return JudgeWork(1, prompt, prompt, suffix, 1)


def run_work(questions: JudgeQuestions, prefix: int, suffix: int, rollouts: int, batch: int) -> RunWork:
    """What the steps of a run ask, of `batch` prefixes each."""
    asked, between = judge_work(questions, prefix, suffix, rollouts), rewrite_work(questions, prefix, suffix)
    return RunWork(asked * batch, between * batch, questions.judge_interval)


def prompt_rate(servers: JudgeServers, cluster: Cluster) -> float:
    """Prompt tokens that one server computes in a second."""
    if servers.judge_prompt_rate is not None:
        return servers.judge_prompt_rate
    peak = 1e12 * cluster.peak_tflops * servers.judge_gpus_per_server
    return peak * servers.judge_prefill_mfu / (2 * servers.judge_active_parameters)


def token_seconds(servers: JudgeServers, cluster: Cluster, rows: float, context: float) -> float:
    """Seconds in which one server writes a token of each of `rows` answers behind `context` tokens.

    Of a mixture of experts as much is read as the rows' tokens choose, which is nearly all of it at full load.
    """
    gpus = servers.judge_gpus_per_server
    active = servers.judge_active_parameters / servers.judge_parameters
    read = 1e9 * servers.judge_weight_gb * (1 - (1 - active) ** rows)
    cached = 1e3 * servers.judge_cache_kb * rows * context
    memory = (read + cached) / (1e12 * cluster.memory_bandwidth_tb * servers.judge_bandwidth_share * gpus)
    peak = 1e12 * cluster.peak_tflops * servers.judge_decode_mfu * gpus
    return max(memory, 2 * servers.judge_active_parameters * rows / peak) + 1e-3 * servers.judge_token_overhead_ms


def judge_seconds(work: JudgeWork, servers: JudgeServers, cluster: Cluster, count: float) -> float:
    """Seconds that `count` servers take for the `work` of a step, its rounds one after the other.

    With few calls for each server the batch shrinks, and what is left is the time of one answer in each round.
    """
    if work.calls == 0:
        return 0.0
    read = work.computed_tokens / (count * prompt_rate(servers, cluster))
    if servers.judge_answer_rate is not None:
        return read + work.answer_tokens / (count * servers.judge_answer_rate)
    rounds = max(1, work.rounds)
    answer = work.answer_tokens / work.calls
    calls = work.calls / rounds
    rows = max(1.0, min(float(servers.judge_rows), calls / count))
    turns = max(1.0, calls / (count * rows))
    context = work.prompt_tokens / work.calls + answer / 2
    return read + rounds * turns * (answer - 1) * token_seconds(servers, cluster, rows, context)


def busy_seconds(work: JudgeWork, servers: JudgeServers, cluster: Cluster) -> float:
    """Seconds of one server at full load for the `work` of a step: what judging costs however it is spread."""
    if work.calls == 0:
        return 0.0
    full = work.calls / (max(1, work.rounds) * servers.judge_rows)
    return full * judge_seconds(work, servers, cluster, full)


def servers_needed(work: JudgeWork, servers: JudgeServers, cluster: Cluster, within: float) -> int | None:
    """The fewest servers that judge a step `within` so many seconds; None where the answers alone take longer."""
    if work.calls == 0:
        return 0
    most = max(1, math.ceil(work.calls))
    if judge_seconds(work, servers, cluster, most) > within:
        return None
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if judge_seconds(work, servers, cluster, middle) <= within else (middle, high)
    return high
