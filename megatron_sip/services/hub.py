"""Judges and rewriter of one run behind a plain, synchronous interface for the rank that asks."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal, TypeVar, cast, get_args

from megatron_sip.config.groups import Config
from megatron_sip.config.judge_set import active_judges
from megatron_sip.errors import ConfigError
from megatron_sip.preference.scoring import JudgeSpec, distinct_pool
from megatron_sip.services.background import BackgroundLoop, cancel_others
from megatron_sip.services.build import build_judge, build_servers, judge_specs, needs_rewriter, open_cache
from megatron_sip.services.cache import AnswerCache
from megatron_sip.services.cache_names import Asker, Name, rewrite_name, verdict_names
from megatron_sip.services.client import ServiceClient
from megatron_sip.services.journal import Journal, Recalled
from megatron_sip.services.journal_records import Key, Source, Value, verdict_keys
from megatron_sip.services.judges import Judge
from megatron_sip.services.model_server import ModelServer
from megatron_sip.services.queueing import InTurn, Place
from megatron_sip.services.rewriter import Rewriter, RewriteRequest, rewrite_key
from megatron_sip.services.rounds import Rewrites, Rounds, gathered, run_rounds
from megatron_sip.services.settings import rewriter_settings
from megatron_sip.services.single_flight import SingleFlight
from megatron_sip.types import Answers, Missing, Pool, Question

T = TypeVar("T")
V = TypeVar("V", bound=Value)
Role = Literal["judge", "rewriter"]
ROLES: tuple[Role, ...] = get_args(Role)
logger = logging.getLogger(__name__)


class PreferenceServices:
    """Everything that scores or rewrites text, with its own background loop.

    Constructing checks settings only (ConfigError); `start` talks to the servers. All methods are called from one
    thread at a time; the futures they return are filled by the background thread. Only judges of weight above 0 exist.
    """

    def __init__(self, config: Config, environ: Mapping[str, str] | None = None) -> None:
        self._config = config
        self._rewrite_server: ModelServer | None = None
        self._judges: dict[str, Judge] = {}
        self._rewriter: Rewriter | None = None
        self._loop: BackgroundLoop | None = None
        self._journal: Journal | None = None
        self._cache: AnswerCache | None = None
        self._spared: Counter[str] = Counter()
        self._flights = SingleFlight()
        self._seconds = {"judge_seconds": 0.0, "rewriter_seconds": 0.0}
        self._asked: Counter[str] = Counter()
        self._missing: Counter[str] = Counter()
        self._specs = judge_specs(config)
        names = {spec.name for spec in self._specs}
        judges = [settings for settings in active_judges(config.judge) if settings.name in names]
        self._intervals = {settings.name: settings.interval for settings in judges}
        self._servers = build_servers(judges, config.judge, environ)
        # Twice what is in flight: the next prompts are ready, but not all of a step's prompts lie in memory.
        slots = sum(server.client.settings.concurrency for server in self._servers_of("judge"))
        limit = 2 * max(slots, config.judge.judge_concurrency)
        self._verdict_turns, self._rewrite_turns = InTurn(limit), InTurn(limit)
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

    def _servers_of(self, *roles: Role) -> list[ModelServer]:
        """The judges' servers, each once, and the rewriter's if there is one."""
        judges = dict.fromkeys(self._servers.values()) if "judge" in roles else ()
        rewriter = self._rewrite_server if "rewriter" in roles else None
        return [*judges, *([] if rewriter is None else [rewriter])]

    def start(self) -> None:
        """Open the cache, connect to the servers and check model, key and labels.

        Raises:
            ConfigError: the cache cannot be used.
            ServiceError: a server cannot, or goes away meanwhile, whatever --judge-failure says; with the way out.
        """
        self._loop = BackgroundLoop()
        try:
            self._cache = open_cache(self._config.judge)
            self._loop.submit(self._start()).result()
        except BaseException:
            self.close()
            raise

    async def _start(self) -> None:
        servers = self._servers_of(*ROLES)
        with ExitStack() as starting:
            # A server that dies between the check and the first questions must not keep whoever starts for ever.
            for server in servers:
                starting.enter_context(server.client.in_a_hurry())
            for server in servers:
                await server.start()
            for judge in self._judges.values():
                await judge.start()

    def submit_answers(self, pools: Sequence[Pool], questions: Sequence[Sequence[Question]]) -> Future[list[Answers]]:
        """Ask all questions at once. `questions[i]` speak of the distinct candidates of `pools[i]`.

        The future gives one `Answers` per pool, with an entry for every question.
        """
        if len(pools) != len(questions):
            raise ValueError(f"{len(pools)} pools but {len(questions)} lists of questions")
        asked, place = [list(group) for group in questions], self._verdict_turns.place()
        return self._submit(self._answer_all(list(pools), asked, place))

    def submit_rounds(
        self, begin: Callable[[Rewrites | None], Rounds[T]], rewrites: Future[Rewrites] | None, spared: Counter[str]
    ) -> Future[T]:
        """Ask in rounds, in the background to the end; what was submitted before is asked first. The rounds' result.

        `begin` makes the rounds in a thread once `rewrites`, if any, are there. `spared` takes the counts of `stats`
        of what nobody was asked for: `from_journal`, `from_cache`. It is whole when the future is done.
        """
        place = self._verdict_turns.place()
        return self._submit(run_rounds(begin, rewrites, partial(self._answer_all, place=place, spared=spared)))

    def all_of(self, futures: Sequence[Future[T]]) -> Future[list[T]]:
        """The results of futures of this object, in their order; cancelling it cancels them."""
        return self._submit(gathered(futures))

    def submit_rewrites(
        self, requests: Sequence[RewriteRequest], max_tokens: int, spared: Counter[str] | None = None
    ) -> Future[Rewrites]:
        """Rewrite each original; `max_tokens` are tokens of the rewriter, `spared` is as in `submit_rounds`."""
        if self._rewriter is None:
            raise ConfigError("no rewriter is configured: neither --pool nor --objective asks for rewrites")
        place = self._rewrite_turns.place()
        return self._submit(self._rewrite_all(self._rewriter, list(requests), max_tokens, place, spared))

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
        """Counts and seconds since the start: calls, attempts, copies, tokens, trims, questions, missing by reason.

        `shared` counts questions for which nobody was asked because an equal one was under way.
        """
        totals: dict[str, float] = dict(self._seconds)
        for label in ROLES:
            if servers := self._servers_of(label):
                totals[f"{label}_calls"] = sum(server.client.calls for server in servers)
                totals[f"{label}_attempts"] = sum(server.client.attempts for server in servers)
                totals[f"{label}_hedges"] = sum(server.client.hedges for server in servers)
                totals[f"{label}_prompt_tokens"] = sum(server.client.usage.prompt_tokens for server in servers)
                totals[f"{label}_answer_tokens"] = sum(server.client.usage.answer_tokens for server in servers)
                totals[f"{label}_unmetered"] = sum(server.client.usage.unmetered for server in servers)
                totals[f"{label}_prompt_trims"] = sum(server.trims for server in servers)
        totals |= {name: self._spared[name] for name in ("from_journal", "from_cache")}
        totals["shared"] = self._flights.shared
        # Copies: the background thread may count a rewrite meanwhile.
        totals |= {f"asked/{name}": count for name, count in dict(self._asked).items()}
        totals |= {f"missing/{name}": count for name, count in dict(self._missing).items()}
        return totals

    def waits_for(self, role: Role | None = None) -> str | None:
        """What keeps calls to judges, rewriter or (None) either waiting, naming the servers; None where nothing."""
        servers = self._servers_of(*(ROLES if role is None else (role,)))
        return next((note for server in servers if (note := server.client.waits_for) is not None), None)

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
            if self._cache is not None:
                self._cache.close()

    def __enter__(self) -> PreferenceServices:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _close(self) -> None:
        # First end the calls, then their connections: a call must not find its connections gone.
        await cancel_others()
        for server in self._servers_of(*ROLES):
            await server.client.close()

    def _submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        if self._loop is None:
            coroutine.close()
            raise RuntimeError("PreferenceServices is not started, or already closed")
        return self._loop.submit(coroutine)

    async def _answer_all(
        self, pools: list[Pool], questions: list[list[Question]], place: Place, spared: Counter[str] | None = None
    ) -> list[Answers]:
        began = time.monotonic()
        uniques = [distinct_pool(pool) for pool in pools]
        asked = [(pool, question) for pool, group in zip(uniques, questions, strict=True) for question in group]
        askers = {name: asker_of(judge) for name, judge in self._judges.items()}
        sources = {name: asker.source for name, asker in askers.items()}
        keys: list[Key] = []
        names: list[Name | None] = []
        for pool, group in zip(uniques, questions, strict=True):
            keys += verdict_keys(pool, group, sources)
            names += verdict_names(pool, group, askers)
            await asyncio.sleep(0)  # a large round must not hold up the calls that are under way

        def ask(index: int) -> Coroutine[Any, Any, float | Missing]:
            pool, question = asked[index]
            return self._judges[question.judge].ask(pool, question)

        verdicts = iter(await self._recorded(keys, names, ask, place, spared))
        answers = [{question: next(verdicts) for question in group} for group in questions]
        for group_answers in answers:
            for question, verdict in group_answers.items():
                self._count(question.judge, verdict)
        self._seconds["judge_seconds"] += time.monotonic() - began
        return answers

    async def _rewrite_all(
        self,
        rewriter: Rewriter,
        requests: list[RewriteRequest],
        max_tokens: int,
        place: Place,
        spared: Counter[str] | None,
    ) -> Rewrites:
        began = time.monotonic()
        source = Source(rewriter.name, rewriter.model, rewriter.version, rewriter.settings(max_tokens))
        asker = Asker(source, rewriter.prompting, settled=False)

        def ask(index: int) -> Coroutine[Any, Any, str | Missing]:
            return rewriter.rewrite(requests[index].prefix_text, requests[index].original_text, max_tokens)

        keys = [rewrite_key(request, source) for request in requests]
        names = [rewrite_name(request.prefix_text, request.original_text, asker) for request in requests]
        texts = await self._recorded(keys, names, ask, place, spared)
        for text in texts:
            self._count(rewriter.name, text)
        self._seconds["rewriter_seconds"] += time.monotonic() - began
        return texts

    async def _recorded(
        self,
        keys: Sequence[Key],
        names: Sequence[Name | None],
        ask: Callable[[int], Coroutine[Any, Any, V]],
        place: Place,
        spared: Counter[str] | None,
    ) -> list[V]:
        """The value of each key: from the journal, else the cache, else `ask(index)`.

        What comes from the cache or is asked is written to the journal before anybody uses it: a step shall repeat
        though the cache may have dropped its answers. What is asked waits for its turn at `place`.
        """
        known = await self._journal.lookup(keys) if self._journal else {}
        absent = [index for index, key in enumerate(keys) if key not in known]
        values = cast("dict[int, V]", await self._from_disk(absent, names))
        left = [index for index in absent if index not in values]
        counts = {"from_journal": len(keys) - len(absent), "from_cache": len(values)}
        answered: dict[int, V] = {}

        async def answer(index: int) -> None:
            answered[index] = await self._once(names[index], partial(ask, index))

        try:
            await place.run(map(answer, left))
        except BaseException:
            # Given up midway: nobody shall be asked twice for an answer, and what is missing may be there next time.
            answered = {index: value for index, value in answered.items() if not isinstance(value, Missing)}
            raise
        finally:
            values |= answered
            if self._journal:
                await self._journal.append([(keys[index], values[index]) for index in absent if index in values])
        await self._to_disk(left, names, values)
        for totals in (self._spared, spared):
            if totals is not None:
                totals.update(counts)
        # A key names its service, and so the kind of its value.
        return [values[index] if index in values else cast(V, known[key]) for index, key in enumerate(keys)]

    async def _from_disk(self, indices: Sequence[int], names: Sequence[Name | None]) -> dict[int, float | str]:
        """What the cache holds of these, by index."""
        named = {index: name for index in indices if (name := names[index]) is not None}
        if self._cache is None or not named:
            return {}
        found = await self._cache.lookup(list(named.values()))
        return {index: found[name] for index, name in named.items() if name in found}

    async def _to_disk(self, indices: Sequence[int], names: Sequence[Name | None], values: Mapping[int, Value]) -> None:
        """Keep these in the cache, but for what is missing: it may be there the next time."""
        if self._cache is not None:
            answers = [(names[index], values[index]) for index in indices]
            await self._cache.store(
                [(name, value) for name, value in answers if name is not None and not isinstance(value, Missing)]
            )

    async def _once(self, name: Name | None, ask: Callable[[], Coroutine[Any, Any, V]]) -> V:
        """The answer, shared with an equal question that is under way."""
        return await ask() if name is None else cast(V, await self._flights.run(name, ask))

    def _count(self, service: str, outcome: object) -> None:
        self._asked[service] += 1
        if isinstance(outcome, Missing):
            self._missing[f"{service}/{outcome.reason.value}"] += 1


def asker_of(judge: Judge) -> Asker:
    """Who `judge` is, as far as it shapes an answer; its server is started."""
    return Asker(Source(judge.name, judge.model, judge.version, judge.settings), judge.prompting, judge.settled)
