"""The hub with the persistent cache, against a server that never answers the same question the same way twice."""

from __future__ import annotations

import math
import random
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from aiohttp import web
from fake_server import FakeServer, chat_body, labels_body, respond, status

from megatron_sip.config.groups import Config, JudgeConfig, PreferenceConfig
from megatron_sip.errors import ConfigError
from megatron_sip.services.cache import FILE
from megatron_sip.services.hub import PreferenceServices
from megatron_sip.services.journal import Journal
from megatron_sip.services.prompts import REWRITE_END
from megatron_sip.services.rewriter import RewriteRequest
from megatron_sip.types import Answers, Candidate, CandidateKind, Missing, Pool, Question

KINDS = (CandidateKind.ORIGINAL, CandidateKind.REWRITE, CandidateKind.ROLLOUT)
POINTWISE = [Question(judge, place) for judge in ("safety", "factuality", "likelihood") for place in range(3)]
QUESTIONS = [*POINTWISE, *(Question("quality", one, two) for one in range(3) for two in range(3) if one != two)]
OF_DOCUMENT = [question for question in QUESTIONS if 2 not in question]


@pytest.fixture
def server() -> Iterator[FakeServer]:
    """Draws what it answers anew for each call."""
    draw = random.Random(1)

    async def fickle(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if "prompt" in body:
            rows = [None, *({str(token): {"logprob": -draw.random()}} for token in body["prompt"][1:])]
            answer = {"choices": [{"text": "x", "finish_reason": "length", "prompt_logprobs": rows}]}
            return await respond(answer)(request)
        text = body["messages"][0]["content"]
        if REWRITE_END in text:
            return await respond(chat_body(f"a better text {draw.random()}"))(request)
        if "logprob_token_ids" not in body:
            safe = draw.random() < 0.5
            return await respond(chat_body(f"Decision: {'safe' if safe else 'unsafe'}"))(request)
        shares = [draw.random() for _ in body["logprob_token_ids"]]
        names = [f"token_id:{token}" for token in body["logprob_token_ids"]]
        entries = [
            {"token": name, "logprob": math.log(share / sum(shares))} for name, share in zip(names, shares, strict=True)
        ]
        return await respond(labels_body(entries))(request)

    with FakeServer() as running:
        running.fault_every_time = fickle
        yield running


def config_of(server: FakeServer, cache: Path | None, **judge: object) -> Config:
    fields = {"judge_reading": "logit", "likelihood_weight": 1.0, "safety_weight": 1.0, "factuality_weight": 1.0}
    fields |= {"judge_retries": 0, "judge_timeout": 5.0, "judge_url": (server.url,)}
    fields |= {"judge_cache": None if cache is None else str(cache), **judge}
    return Config(judge=JudgeConfig(**fields), preference=PreferenceConfig(pool=("original", "rewrite", "rollout")))  # type: ignore[arg-type]


def pool(sample: int, document: int = 0) -> Pool:
    texts = (f"the original {document}", f"a rewrite {document}", f"a rollout of sample {sample}")
    candidates = tuple(
        Candidate(kind, (document, n), text) for n, (kind, text) in enumerate(zip(KINDS, texts, strict=True))
    )
    return Pool(sample, f"document {document}", texts[0], candidates)


def request(sample: int, document: int = 0) -> RewriteRequest:
    return RewriteRequest(sample, (document, 0), f"document {document}", f"the original {document}")


def ask(services: PreferenceServices, pools: list[Pool], questions: list[Question] = QUESTIONS) -> list[Answers]:
    return services.submit_answers(pools, [questions] * len(pools)).result(20)


def rewrite(services: PreferenceServices, *requests: RewriteRequest) -> list[str | Missing]:
    return services.submit_rewrites(list(requests), 9).result(20)


@contextmanager
def journalled(config: Config, folder: Path) -> Iterator[PreferenceServices]:
    with PreferenceServices(config, {}) as services:
        services.use_journal(Journal(folder, 0))
        services.recall(0)
        yield services


def calls(server: FakeServer) -> int:
    return len(server.requests)


def test_another_run_and_another_sample_find_what_depends_on_the_document(server: FakeServer, tmp_path: Path) -> None:
    config = config_of(server, tmp_path)
    with PreferenceServices(config, {}) as services:
        [first] = ask(services, [pool(0)])
        texts = rewrite(services, request(0))
        assert services.stats()["from_cache"] == 0
    asked = calls(server)
    with PreferenceServices(config, {}) as services:
        [second] = ask(services, [pool(7)])
        assert rewrite(services, request(7)) == texts
        assert services.stats()["from_cache"] == len(OF_DOCUMENT) + 1
    assert {question: second[question] for question in OF_DOCUMENT} == {q: first[q] for q in OF_DOCUMENT}
    of_rollout = [question for question in QUESTIONS if 2 in question]
    assert all(first[question] != second[question] for question in of_rollout), "rollouts are judged anew"
    assert calls(server) == asked + len(of_rollout)


def test_a_sampled_judge_keeps_the_votes_on_originals_only(server: FakeServer, tmp_path: Path) -> None:
    config = config_of(
        server, tmp_path, judge_reading="generate", likelihood_weight=0.0, factuality_weight=0.0, quality_weight=0.0
    )
    votes = [Question("safety", place, None, vote) for place in range(3) for vote in range(20)]
    with PreferenceServices(config, {}) as services:
        [first] = ask(services, [pool(0)], votes)
        [second] = ask(services, [pool(0)], votes)
        assert services.stats()["from_cache"] == 20
    for place, same in ((0, True), (1, False), (2, False)):
        mine = [(first[vote], second[vote]) for vote in votes if vote.first == place]
        assert all(one == other for one, other in mine) is same
    assert len({first[vote] for vote in votes if vote.first == 0}) == 2, "each vote is a draw of its own"


def test_missing_is_asked_again(server: FakeServer, tmp_path: Path) -> None:
    config = config_of(server, tmp_path)
    fickle = server.fault_every_time
    with PreferenceServices(config, {}) as services:
        server.fault_every_time = status(400)
        [answers] = ask(services, [pool(0)], OF_DOCUMENT)
        assert all(isinstance(value, Missing) for value in [*answers.values(), *rewrite(services, request(0))])
        server.fault_every_time = fickle
        [answers] = ask(services, [pool(0)], OF_DOCUMENT)
        assert not any(isinstance(value, Missing) for value in [*answers.values(), *rewrite(services, request(0))])
        assert services.stats()["from_cache"] == 0


def test_the_journal_comes_first_and_holds_what_the_cache_gave(server: FakeServer, tmp_path: Path) -> None:
    config, cache = config_of(server, tmp_path / "cache"), tmp_path / "cache" / FILE
    with PreferenceServices(config, {}) as services:
        ask(services, [pool(0)], OF_DOCUMENT)
        rewrite(services, request(0))
    with journalled(config, tmp_path / "journal") as services:
        [first], texts = ask(services, [pool(5)], OF_DOCUMENT), rewrite(services, request(5))
        assert services.stats()["from_cache"] == len(OF_DOCUMENT) + 1
    cache.unlink()  # evicted, say
    asked = calls(server)
    with journalled(config, tmp_path / "journal") as services:
        assert (ask(services, [pool(5)], OF_DOCUMENT), rewrite(services, request(5))) == ([first], texts)
        stats = services.stats()
    assert calls(server) == asked, "a resume repeats without the cache"
    assert (stats["from_journal"], stats["from_cache"]) == (len(OF_DOCUMENT) + 1, 0)


def test_other_settings_ask_anew(server: FakeServer, tmp_path: Path) -> None:
    for changed in ({}, {"judge_max_context": 1024}, {"judge_reading": "generate"}):
        with PreferenceServices(config_of(server, tmp_path, **changed), {}) as services:
            asked = calls(server)
            ask(services, [pool(0)], [Question("safety", 0)])
            assert calls(server) == asked + 1, changed


def test_other_weights_under_the_same_name_are_asked_anew(server: FakeServer, tmp_path: Path) -> None:
    """A server tells the folder of its model; one that tells none is known by the model's name alone."""
    asked = []
    for root in ("/models/old", "/models/new", "/models/old", None, None):
        entry = {"id": "fake", "max_model_len": 2048, **({} if root is None else {"root": root})}
        server.models_handler = respond({"data": [entry]})
        with PreferenceServices(config_of(server, tmp_path), {}) as services:
            before = calls(server)
            ask(services, [pool(0)], [Question("safety", 0)])
            rewrite(services, request(0))
            asked.append(calls(server) - before)
    assert asked == [2, 2, 0, 2, 0]


def test_equal_questions_under_way_are_asked_once(server: FakeServer, tmp_path: Path) -> None:
    """A document twice in a batch, and in a batch that is fetched ahead; without any cache on disk."""
    fickle = server.fault_every_time
    assert fickle is not None
    go = threading.Event()

    async def when_all_are_there(request: web.Request) -> web.StreamResponse:
        import asyncio

        await asyncio.to_thread(go.wait, 10)
        return await fickle(request)

    server.fault_every_time = when_all_are_there
    with PreferenceServices(config_of(server, None), {}) as services:
        once = services.submit_answers([pool(0), pool(1)], [OF_DOCUMENT] * 2)
        ahead = [services.submit_rewrites([request(n), request(n + 1)], 9) for n in (2, 4)]
        other = services.submit_rewrites([request(6, document=1)], 9)
        threading.Timer(0.5, go.set).start()
        first, second = once.result(20)
        assert first == second
        texts = [text for future in ahead for text in future.result(20)]
        assert len(set(texts)) == 1
        assert other.result(20) != texts[:1]
        assert services.stats()["shared"] == len(OF_DOCUMENT) + 3
    # Safety of the original and of the rewrite, and so on, once each; a rewrite for each document.
    assert calls(server) == len(OF_DOCUMENT) + 2


def test_sampled_verdicts_on_rollouts_are_draws_of_their_own(server: FakeServer, tmp_path: Path) -> None:
    config = config_of(
        server, tmp_path, judge_reading="generate", likelihood_weight=0.0, factuality_weight=0.0, quality_weight=0.0
    )
    with PreferenceServices(config, {}) as services:
        question = [Question("safety", 2)]
        twins = [Pool(n, "text", "original", pool(9).candidates) for n in range(30)]
        answers = services.submit_answers(twins, [question] * 30).result(20)
        assert {value for group in answers for value in group.values()} == {0.0, 1.0}
        assert services.stats()["shared"] == 0
    assert calls(server) == 30


def test_a_cache_that_breaks_costs_no_verdict(server: FakeServer, tmp_path: Path) -> None:
    config = config_of(server, tmp_path)
    with PreferenceServices(config, {}) as services:
        [first] = ask(services, [pool(0)], OF_DOCUMENT)
        connection = sqlite3.connect(tmp_path / FILE)
        connection.execute("DROP TABLE answers")
        connection.close()
        [second] = ask(services, [pool(0)], OF_DOCUMENT)
        assert not any(isinstance(value, Missing) for value in second.values())
        assert first != second
        ask(services, [pool(0)], OF_DOCUMENT)
        assert services.stats()["from_cache"] == 0


def test_a_cache_that_cannot_be_used_ends_the_start(server: FakeServer, tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()
    services = PreferenceServices(config_of(server, tmp_path), {})
    with pytest.raises(ConfigError, match="--judge-cache"):
        services.start()
    with pytest.raises(RuntimeError, match="not started"):
        services.submit_answers([pool(0)], [OF_DOCUMENT])
