"""Judges and rewriter of one run behind a plain, synchronous interface for the rank that asks."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, TypeVar

from megatron_sip.config.groups import Config, JudgeConfig
from megatron_sip.errors import ConfigError
from megatron_sip.preference.scoring import JudgeSpec, distinct
from megatron_sip.services.background import BackgroundLoop
from megatron_sip.services.client import ServiceClient
from megatron_sip.services.endpoint import ClientSettings
from megatron_sip.services.judges import FactualityJudge, Judge, QualityJudge, Reading, SafetyJudge
from megatron_sip.services.likelihood import LikelihoodJudge
from megatron_sip.services.model_server import ModelServer
from megatron_sip.services.rewriter import Rewriter
from megatron_sip.services.toxicity import ClassifierJudge, ToxicityModel, load_profanity_check, load_toxic_bilstm
from megatron_sip.types import Answers, Missing, Pool, Question

T = TypeVar("T")
logger = logging.getLogger(__name__)

CHAT_JUDGES = ("quality", "safety", "factuality")
REWRITING_OBJECTIVES = ("sft-rewrite", "dpo-rewrite-over-rollout")
SCORING_OBJECTIVES = ("online-dpo", "rf-nll")


class PreferenceServices:
    """Everything that scores or rewrites text, with its own background loop.

    Constructing checks settings only (ConfigError); `start` talks to the servers. All methods are called from one
    thread; the futures they return are filled by the background thread. Only judges of weight above 0 exist.
    """

    def __init__(self, config: Config, environ: Mapping[str, str] | None = None) -> None:
        self._config = config
        self._judge_server: ModelServer | None = None
        self._rewrite_server: ModelServer | None = None
        self._judges: dict[str, Judge] = {}
        self._rewriter: Rewriter | None = None
        self._loop: BackgroundLoop | None = None
        self._seconds = {"judge_seconds": 0.0, "rewriter_seconds": 0.0}
        self._asked: Counter[str] = Counter()
        self._missing: Counter[str] = Counter()
        # Twice what is in flight: the next prompts are ready, but not all of a step's prompts lie in memory.
        self._limit = 2 * config.judge.judge_concurrency
        self._specs = judge_specs(config)
        names = [spec.name for spec in self._specs]
        if any(name in CHAT_JUDGES or name == "likelihood" for name in names):
            self._judge_server = ModelServer(
                ServiceClient(judge_settings(config.judge), environ), config.judge.judge_max_context
            )
        if needs_rewriter(config):
            own = bool(config.rewriter.rewriter_url)
            self._rewrite_server = ModelServer(
                ServiceClient(rewriter_settings(config), environ), None if own else config.judge.judge_max_context
            )
            self._rewriter = Rewriter(
                self._rewrite_server, config.rewriter.rewriter_temperature, config.rewriter.rewriter_top_p
            )
        for name in names:
            self._judges[name] = build_judge(name, config.judge, self._judge_server)

    def judges(self, iteration: int | None = None) -> list[JudgeSpec]:
        """The judges to plan for; with `iteration`, those of that iteration (--judge-, --likelihood-interval)."""
        if iteration is None:
            return list(self._specs)
        interval = judge_intervals(self._config.judge)
        return [spec for spec in self._specs if iteration % interval.get(spec.name, 1) == 0]

    @property
    def judge_model(self) -> str | None:
        """Name of the model that the judge's server serves; None without such a judge. RuntimeError before `start`."""
        return None if self._judge_server is None else self._judge_server.info.model

    def start(self) -> None:
        """Connect to the servers and check model, key and labels. Raises ServiceError with the way out."""
        self._loop = BackgroundLoop()
        try:
            self._loop.submit(self._start()).result()
        except BaseException:
            self.close()
            raise

    async def _start(self) -> None:
        for server in (self._judge_server, self._rewrite_server):
            if server is not None:
                await server.start()
        for judge in self._judges.values():
            await judge.start()

    def submit_answers(self, pools: Sequence[Pool], questions: Sequence[Sequence[Question]]) -> Future[list[Answers]]:
        """Ask all questions at once. `questions[i]` speak of the distinct candidates of `pools[i]`.

        The future gives one `Answers` per pool, with an entry for every question.
        """
        if len(pools) != len(questions):
            raise ValueError(f"{len(pools)} pools but {len(questions)} lists of questions")
        return self._submit(self._answer_all(list(pools), [list(group) for group in questions]))

    def submit_rewrites(self, items: Sequence[tuple[str, str]], max_tokens: int) -> Future[list[str | Missing]]:
        """Rewrite each (prefix text, original text); `max_tokens` are tokens of the rewriter."""
        if self._rewriter is None:
            raise ConfigError("no rewriter is configured: neither --pool nor --objective asks for rewrites")
        return self._submit(self._rewrite_all(self._rewriter, list(items), max_tokens))

    def stats(self) -> dict[str, float]:
        """Counts and seconds since the start: calls, attempts, prompt trims, questions, missing by reason."""
        totals: dict[str, float] = dict(self._seconds)
        for label, server in (("judge", self._judge_server), ("rewriter", self._rewrite_server)):
            if server is not None:
                totals[f"{label}_calls"] = server.client.calls
                totals[f"{label}_attempts"] = server.client.attempts
                totals[f"{label}_prompt_trims"] = server.trims
        totals |= {f"asked/{name}": count for name, count in self._asked.items()}
        totals |= {f"missing/{name}": count for name, count in self._missing.items()}
        return totals

    def close(self) -> None:
        """Cancel what is under way, close all connections and end the thread."""
        loop, self._loop = self._loop, None
        if loop is None:
            return
        try:
            loop.submit(self._close()).result(timeout=10)
        except TimeoutError:
            logger.warning("the connections to judge and rewriter did not close within 10 s; they end with the process")
        finally:
            loop.close()

    def __enter__(self) -> PreferenceServices:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _close(self) -> None:
        # First end the calls, then their connections: a call must not find its connections gone.
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        for server in (self._judge_server, self._rewrite_server):
            if server is not None:
                await server.client.close()

    def _submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        if self._loop is None:
            coroutine.close()
            raise RuntimeError("PreferenceServices is not started, or already closed")
        return self._loop.submit(coroutine)

    async def _answer_all(self, pools: list[Pool], questions: list[list[Question]]) -> list[Answers]:
        began = time.monotonic()
        uniques = [distinct_pool(pool) for pool in pools]
        jobs = (
            self._judges[question.judge].ask(pool, question)
            for pool, group in zip(uniques, questions, strict=True)
            for question in group
        )
        verdicts = iter(await run_bounded(jobs, self._limit))
        answers = [{question: next(verdicts) for question in group} for group in questions]
        for group_answers in answers:
            for question, verdict in group_answers.items():
                self._count(question.judge, verdict)
        self._seconds["judge_seconds"] += time.monotonic() - began
        return answers

    async def _rewrite_all(
        self, rewriter: Rewriter, items: list[tuple[str, str]], max_tokens: int
    ) -> list[str | Missing]:
        began = time.monotonic()
        jobs = (rewriter.rewrite(prefix, original, max_tokens) for prefix, original in items)
        texts = await run_bounded(jobs, self._limit)
        for text in texts:
            self._count(rewriter.name, text)
        self._seconds["rewriter_seconds"] += time.monotonic() - began
        return texts

    def _count(self, service: str, outcome: object) -> None:
        self._asked[service] += 1
        if isinstance(outcome, Missing):
            self._missing[f"{service}/{outcome.reason.value}"] += 1


async def run_bounded(jobs: Iterable[Coroutine[Any, Any, T]], limit: int) -> list[T]:
    """Results of all jobs in their order, at most `limit` at a time; a job is made when its turn comes.

    The first exception ends all.
    """
    results: dict[int, T] = {}
    numbered = enumerate(jobs)

    async def work() -> None:
        for index, job in numbered:  # shared: one event loop, and no await between taking and starting
            results[index] = await job

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(limit):
                group.create_task(work())
    except ExceptionGroup as several:
        raise several.exceptions[0] from several
    return [results[index] for index in range(len(results))]


def distinct_pool(pool: Pool) -> Pool:
    """`pool` with each token sequence once, which is what question indices speak of."""
    members = distinct(pool.candidates).members
    return replace(pool, candidates=tuple(pool.candidates[member] for member in members))


def judge_specs(config: Config) -> list[JudgeSpec]:
    """What a scoring plan needs to know of the judges with weight above 0, in a fixed order.

    A logit verdict is asked once in each option order; a generated one `judge_votes` times. Empty for an objective
    that scores nothing.
    """
    judge = config.judge
    if config.training.objective not in SCORING_OBJECTIVES:
        return []
    logit = judge.judge_reading == "logit"
    votes = 1 if logit else judge.judge_votes
    specs = [
        JudgeSpec("quality", pairwise=True, weight=judge.quality_weight, votes=votes, both_orders=logit),
        JudgeSpec("safety", pairwise=False, weight=judge.safety_weight, votes=votes),
        JudgeSpec("factuality", pairwise=False, weight=judge.factuality_weight, votes=votes),
        JudgeSpec("likelihood", pairwise=False, weight=judge.likelihood_weight),
        JudgeSpec("classifier", pairwise=False, weight=judge.classifier_weight),
    ]
    return [spec for spec in specs if spec.weight > 0]


def judge_intervals(judge: JudgeConfig) -> dict[str, int]:
    """Iterations between two uses of each judge; one that is not named is used in all of them."""
    return {**dict.fromkeys(CHAT_JUDGES, judge.judge_interval), "likelihood": judge.likelihood_interval}


def needs_rewriter(config: Config) -> bool:
    """Whether the run asks for rewrites."""
    objective = config.training.objective
    return objective in REWRITING_OBJECTIVES or (
        objective in SCORING_OBJECTIVES and "rewrite" in config.preference.pool
    )


def judge_settings(judge: JudgeConfig) -> ClientSettings:
    """The judge's client settings."""
    return ClientSettings(
        urls=judge.judge_url,
        model=judge.judge_model,
        key_variables=("JUDGE_API_KEY",),
        concurrency=judge.judge_concurrency,
        timeout=judge.judge_timeout,
        retries=judge.judge_retries,
        allow_insecure=judge.allow_insecure_judge,
        trust_env_proxy=judge.judge_trust_env_proxy,
    )


def rewriter_settings(config: Config) -> ClientSettings:
    """The rewriter's client settings; its servers and model default to the judge's."""
    own = bool(config.rewriter.rewriter_url)
    shared = judge_settings(config.judge)
    return replace(
        shared,
        urls=config.rewriter.rewriter_url or shared.urls,
        model=config.rewriter.rewriter_model or (None if own else shared.model),
        key_variables=("REWRITER_API_KEY", "JUDGE_API_KEY"),
        url_flag="--rewriter-url" if own else "--rewriter-url (or --judge-url)",
        model_flag="--rewriter-model",
    )


def build_judge(name: str, judge: JudgeConfig, server: ModelServer | None) -> Judge:
    """The judge called `name`; all but the classifier need a server."""
    if name == "classifier":
        return ClassifierJudge(load_classifier(judge))
    if server is None:
        raise ValueError(f"judge {name} needs a server")
    if name == "likelihood":
        return LikelihoodJudge(server)
    reading = Reading(
        kind=judge.judge_reading,
        temperature=judge.judge_temperature,
        top_p=judge.judge_top_p,
        max_tokens=judge.judge_max_tokens,
        reasoning_effort=judge.judge_reasoning_effort,
    )
    chat_judges: dict[str, Callable[[ModelServer, Reading], Judge]] = {
        "quality": QualityJudge,
        "safety": SafetyJudge,
        "factuality": FactualityJudge,
    }
    return chat_judges[name](server, reading)


def load_classifier(judge: JudgeConfig) -> ToxicityModel:
    """The classifier of --classifier. ConfigError where its files are missing."""
    if judge.classifier == "profanity-check":
        return load_profanity_check()
    if judge.classifier_path is None:
        raise ConfigError(
            "--classifier toxic-bilstm needs --classifier-path, the folder of its weights and tokenizer; "
            "`python tools/get_demo_data.py` fetches them"
        )
    return load_toxic_bilstm(judge.classifier_path)
