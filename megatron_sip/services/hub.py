"""Judges and rewriter of one run behind a plain, synchronous interface for the rank that asks."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, TypeVar, cast

from megatron_sip.config.groups import Config
from megatron_sip.config.judge_set import active_judges
from megatron_sip.errors import ConfigError
from megatron_sip.preference.scoring import JudgeSpec, distinct
from megatron_sip.services.background import BackgroundLoop
from megatron_sip.services.build import (
    build_judge,
    build_servers,
    judge_specs,
    needs_rewriter,
    rewriter_settings,
)
from megatron_sip.services.client import ServiceClient
from megatron_sip.services.journal import Journal, Recalled
from megatron_sip.services.journal_records import Entry, Key, Source, Value, verdict_keys
from megatron_sip.services.judges import Judge
from megatron_sip.services.model_server import ModelServer
from megatron_sip.services.rewriter import Rewriter, RewriteRequest, rewrite_key
from megatron_sip.types import Answers, Missing, Pool, Question

T = TypeVar("T")
V = TypeVar("V", bound=Value)
logger = logging.getLogger(__name__)


class PreferenceServices:
    """Everything that scores or rewrites text, with its own background loop.

    Constructing checks settings only (ConfigError); `start` talks to the servers. All methods are called from one
    thread; the futures they return are filled by the background thread. Only judges of weight above 0 exist.
    """

    def __init__(self, config: Config, environ: Mapping[str, str] | None = None) -> None:
        self._config = config
        self._rewrite_server: ModelServer | None = None
        self._judges: dict[str, Judge] = {}
        self._rewriter: Rewriter | None = None
        self._loop: BackgroundLoop | None = None
        self._journal: Journal | None = None
        self._from_journal = 0
        self._seconds = {"judge_seconds": 0.0, "rewriter_seconds": 0.0}
        self._asked: Counter[str] = Counter()
        self._missing: Counter[str] = Counter()
        self._specs = judge_specs(config)
        names = {spec.name for spec in self._specs}
        judges = [settings for settings in active_judges(config.judge) if settings.name in names]
        self._intervals = {settings.name: settings.interval for settings in judges}
        self._servers = build_servers(judges, config.judge, environ)
        # Twice what is in flight: the next prompts are ready, but not all of a step's prompts lie in memory.
        slots = sum(server.client.settings.concurrency for server in self._distinct_servers())
        self._limit = 2 * max(slots, config.judge.judge_concurrency)
        if needs_rewriter(config):
            own = bool(config.rewriter.rewriter_url)
            self._rewrite_server = ModelServer(
                ServiceClient(rewriter_settings(config), environ), None if own else config.judge.judge_max_context
            )
            self._rewriter = Rewriter(
                self._rewrite_server, config.rewriter.rewriter_temperature, config.rewriter.rewriter_top_p
            )
        for settings in judges:
            self._judges[settings.name] = build_judge(settings, self._servers.get(settings.name))

    def judges(self, iteration: int | None = None) -> list[JudgeSpec]:
        """The judges to plan for; with `iteration`, those of that iteration (--judge-, --likelihood-interval)."""
        if iteration is None:
            return list(self._specs)
        return [spec for spec in self._specs if iteration % self._intervals[spec.name] == 0]

    @property
    def judge_model(self) -> str | None:
        """Name of the model behind the first judge that has a server; None without one. RuntimeError before `start`."""
        return next((server.info.model for server in self._servers.values()), None)

    def sources(self) -> dict[str, Source]:
        """Who answers, by the judge's name: model, version of the words, reading. RuntimeError before `start`."""
        return {name: Source(name, judge.model, judge.version, judge.settings) for name, judge in self._judges.items()}

    def asked_of(self) -> dict[str, dict[str, str]]:
        """Who scores and rewrites, each by service name, for the sample log; RuntimeError before `start`."""
        sources = self.sources()
        told = {
            "prompt_versions": {name: source.version for name, source in sources.items()},
            "models": {name: source.model for name, source in sources.items()},
            "readings": {name: source.settings for name, source in sources.items()},
        }
        if self._rewriter is not None:
            told["prompt_versions"][self._rewriter.name] = self._rewriter.version
            told["models"][self._rewriter.name] = self._rewriter.model
        return told

    def _distinct_servers(self) -> list[ModelServer]:
        """The judges' servers, each once."""
        return list(dict.fromkeys(self._servers.values()))

    def start(self) -> None:
        """Connect to the servers and check model, key and labels. Raises ServiceError with the way out."""
        self._loop = BackgroundLoop()
        try:
            self._loop.submit(self._start()).result()
        except BaseException:
            self.close()
            raise

    async def _start(self) -> None:
        for server in self._distinct_servers():
            await server.start()
        if self._rewrite_server is not None:
            await self._rewrite_server.start()
        for judge in self._judges.values():
            await judge.start()

    def submit_answers(self, pools: Sequence[Pool], questions: Sequence[Sequence[Question]]) -> Future[list[Answers]]:
        """Ask all questions at once. `questions[i]` speak of the distinct candidates of `pools[i]`.

        The future gives one `Answers` per pool, with an entry for every question.
        """
        if len(pools) != len(questions):
            raise ValueError(f"{len(pools)} pools but {len(questions)} lists of questions")
        return self._submit(self._answer_all(list(pools), [list(group) for group in questions]))

    def submit_rewrites(self, requests: Sequence[RewriteRequest], max_tokens: int) -> Future[list[str | Missing]]:
        """Rewrite each original; `max_tokens` are tokens of the rewriter."""
        if self._rewriter is None:
            raise ConfigError("no rewriter is configured: neither --pool nor --objective asks for rewrites")
        return self._submit(self._rewrite_all(self._rewriter, list(requests), max_tokens))

    @property
    def asks(self) -> bool:
        """Whether there is anybody to ask: a judge or a rewriter."""
        return bool(self._judges) or self._rewriter is not None

    def use_journal(self, journal: Journal) -> None:
        """From now on look answers up in `journal` before anybody is asked, and write down what is new. Closes it."""
        self._journal = journal

    def recall(self, next_sample: int) -> Recalled | None:
        """Read the journal anew for the samples from `next_sample` on: the run stands at a checkpoint again.

        None without a journal. CheckpointError where it cannot be read.
        """
        return None if self._journal is None else self._journal.recall(next_sample)

    def checkpointed(self, oldest_sample: int) -> None:
        """A checkpoint is durable: the journal drops what none that is kept can need.

        `oldest_sample` is the first sample that the oldest kept checkpoint has not trained. CheckpointError where the
        disk refuses.
        """
        if self._journal is not None:
            self._journal.checkpointed(oldest_sample)

    def void(self, first_sample: int) -> None:
        """Give up what is under way, and take back what the journal holds of `first_sample` and later ones.

        CheckpointError where the disk refuses.
        """
        if self._journal is not None:
            self._submit(cancel_others()).result()
            self._journal.void(first_sample)

    def stats(self) -> dict[str, float]:
        """Counts and seconds since the start: calls, attempts, prompt trims, questions, missing by reason."""
        totals: dict[str, float] = dict(self._seconds)
        rewriters = [] if self._rewrite_server is None else [self._rewrite_server]
        for label, servers in (("judge", self._distinct_servers()), ("rewriter", rewriters)):
            if servers:
                totals[f"{label}_calls"] = sum(server.client.calls for server in servers)
                totals[f"{label}_attempts"] = sum(server.client.attempts for server in servers)
                totals[f"{label}_prompt_trims"] = sum(server.trims for server in servers)
        totals["from_journal"] = self._from_journal
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
            if self._journal is not None:
                self._journal.close()

    def __enter__(self) -> PreferenceServices:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _close(self) -> None:
        # First end the calls, then their connections: a call must not find its connections gone.
        await cancel_others()
        for server in self._distinct_servers():
            await server.client.close()
        if self._rewrite_server is not None:
            await self._rewrite_server.client.close()

    def _submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        if self._loop is None:
            coroutine.close()
            raise RuntimeError("PreferenceServices is not started, or already closed")
        return self._loop.submit(coroutine)

    async def _answer_all(self, pools: list[Pool], questions: list[list[Question]]) -> list[Answers]:
        began = time.monotonic()
        uniques = [distinct_pool(pool) for pool in pools]
        asked = [(pool, question) for pool, group in zip(uniques, questions, strict=True) for question in group]
        sources = self.sources()
        keys: list[Key] = []
        for pool, group in zip(uniques, questions, strict=True):
            keys += verdict_keys(pool, group, sources)
            await asyncio.sleep(0)  # a large round must not hold up the calls that are under way

        def ask(index: int) -> Coroutine[Any, Any, float | Missing]:
            pool, question = asked[index]
            return self._judges[question.judge].ask(pool, question)

        verdicts = iter(await self._recorded(keys, ask))
        answers = [{question: next(verdicts) for question in group} for group in questions]
        for group_answers in answers:
            for question, verdict in group_answers.items():
                self._count(question.judge, verdict)
        self._seconds["judge_seconds"] += time.monotonic() - began
        return answers

    async def _rewrite_all(
        self, rewriter: Rewriter, requests: list[RewriteRequest], max_tokens: int
    ) -> list[str | Missing]:
        began = time.monotonic()
        source = Source(rewriter.name, rewriter.model, rewriter.version, rewriter.settings(max_tokens))

        def ask(index: int) -> Coroutine[Any, Any, str | Missing]:
            return rewriter.rewrite(requests[index].prefix_text, requests[index].original_text, max_tokens)

        texts = await self._recorded([rewrite_key(request, source) for request in requests], ask)
        for text in texts:
            self._count(rewriter.name, text)
        self._seconds["rewriter_seconds"] += time.monotonic() - began
        return texts

    async def _recorded(self, keys: Sequence[Key], ask: Callable[[int], Coroutine[Any, Any, V]]) -> list[V]:
        """The value of each key: from the journal, or `ask(index)`, which is written down before anybody uses it."""
        known = await self._journal.lookup(keys) if self._journal else {}
        absent = [index for index, key in enumerate(keys) if key not in known]
        values = dict(zip(absent, await run_bounded((ask(index) for index in absent), self._limit), strict=True))
        if self._journal:
            entries: list[Entry] = [(keys[index], value) for index, value in values.items()]
            await self._journal.append(entries)
        self._from_journal += len(keys) - len(absent)
        # A key names its service, and so the kind of its value.
        return [values[index] if index in values else cast(V, known[key]) for index, key in enumerate(keys)]

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


async def cancel_others() -> None:
    """End all that runs in this event loop besides the caller."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def distinct_pool(pool: Pool) -> Pool:
    """`pool` with each token sequence once, which is what question indices speak of."""
    members = distinct(pool.candidates).members
    return replace(pool, candidates=tuple(pool.candidates[member] for member in members))
