"""The hub with a journal, against a server that never answers the same question the same way twice."""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from aiohttp import web
from fake_server import FakeServer, chat_body, hang, labels_body, respond, status

from megatron_sip.config.groups import Config, JudgeConfig, PreferenceConfig, RewriterConfig
from megatron_sip.errors import CheckpointError
from megatron_sip.services.hub import PreferenceServices
from megatron_sip.services.journal import Journal
from megatron_sip.services.prompts import REWRITE_END
from megatron_sip.services.rewriter import RewriteRequest
from megatron_sip.types import Answers, Candidate, CandidateKind, Missing, Pool, Question

QUESTIONS = [
    *(Question("quality", first, second) for first in range(3) for second in range(3) if first != second),
    *(Question("likelihood", index) for index in range(3)),
]


@pytest.fixture
def server() -> Iterator[FakeServer]:
    """Label shares and rewrites are drawn anew for each call."""
    draw = random.Random(1)

    async def fickle(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if "prompt" in body:
            rows = [None, *({str(token): {"logprob": -draw.random()}} for token in body["prompt"][1:])]
            return await respond({"choices": [{"text": "x", "finish_reason": "length", "prompt_logprobs": rows}]})(
                request
            )
        if REWRITE_END in body["messages"][0]["content"]:
            return await respond(chat_body(f"a better text {draw.random()}"))(request)
        share = draw.random()
        values = (math.log(share), math.log(1 - share))
        names = [f"token_id:{token}" for token in body["logprob_token_ids"]]
        entries = [{"token": name, "logprob": value} for name, value in zip(names, values, strict=True)]
        return await respond(labels_body(entries))(request)

    with FakeServer() as running:
        running.fault_every_time = fickle
        yield running


def config_of(server: FakeServer, **rewriter: float) -> Config:
    judge = JudgeConfig(
        judge_url=(server.url,), judge_reading="logit", likelihood_weight=1.0, judge_retries=0, judge_timeout=5.0
    )
    return Config(
        judge=judge, rewriter=RewriterConfig(**rewriter), preference=PreferenceConfig(pool=("original", "rewrite"))
    )


def pool(sample: int) -> Pool:
    texts = ("one of them", "the other text", "and a third")
    candidates = tuple(Candidate(CandidateKind.ROLLOUT, (sample, n), text) for n, text in enumerate(texts))
    return Pool(sample, f"text {sample}", "the original", candidates)


def request(sample: int) -> RewriteRequest:
    return RewriteRequest(sample, (sample, 1), f"text {sample}", "the original")


@contextmanager
def services_of(config: Config, folder: Path | None, position: int = 0) -> Iterator[PreferenceServices]:
    with PreferenceServices(config, {}) as services:
        if folder is not None:
            services.use_journal(Journal(folder, 0))
            assert services.recall(position) is not None
        yield services


def step(services: PreferenceServices, *samples: int) -> tuple[list[Answers], list[str | Missing]]:
    """What a step asks: rewrites, fetched while judges are asked."""
    rewrites = services.submit_rewrites([request(sample) for sample in samples], 9)
    answers = services.submit_answers([pool(sample) for sample in samples], [QUESTIONS] * len(samples))
    return answers.result(20), rewrites.result(20)


def calls(server: FakeServer) -> int:
    return len(server.requests)


def test_a_restart_repeats_every_answer(server: FakeServer, tmp_path: Path) -> None:
    config = config_of(server)
    with services_of(config, tmp_path) as services:
        server.script.extend([status(500), respond(chat_body(None))])
        first = step(services, 0, 1), step(services, 2, 3)
        assert services.stats()["from_journal"] == 0
    missing = [value for answers, texts in first for value in [v for a in answers for v in a.values()] + texts]
    assert sum(isinstance(value, Missing) for value in missing) == 2
    with services_of(config, None) as services:
        assert step(services, 2, 3) != first[1], "the server is fickle"

    asked = calls(server)
    with services_of(config, tmp_path, position=2) as services:
        repeated = step(services, 2, 3)
        assert calls(server) == asked, "nobody is asked"
        stats = services.stats()
        new = step(services, 4)
        assert calls(server) == asked + len(QUESTIONS) + 1
    assert repeated == without_details(first[1])
    assert stats["from_journal"] == stats["asked/quality"] + stats["asked/likelihood"] + stats["asked/rewriter"]
    with services_of(config, tmp_path, position=2) as services:
        assert (step(services, 2, 3), step(services, 4)) == (repeated, new)
    # What lies before the checkpoint is not repeated.
    with services_of(config, tmp_path, position=4) as services:
        assert step(services, 2, 3) != repeated


class OneRound:
    """All questions about one pool."""

    def __init__(self, sample: int) -> None:
        self.pools = [pool(sample)]

    def next(self, answers: Sequence[Answers]) -> list[list[Question]]:
        return [[] if answers[0] else QUESTIONS]

    def result(self, answers: list[Answers]) -> list[Answers]:
        return answers


def test_each_batch_knows_what_it_was_spared_though_others_are_under_way(server: FakeServer, tmp_path: Path) -> None:
    config = config_of(server)
    with services_of(config, tmp_path) as services:
        step(services, 0)
    with services_of(config, tmp_path) as services:
        counts: list[Counter[str]] = [Counter(), Counter()]
        futures = []
        for sample, spared in enumerate(counts):
            rewrites = services.submit_rewrites([request(sample)], 9, spared)
            begin = partial(lambda sample, _texts: OneRound(sample), sample)
            futures.append(services.submit_rounds(begin, rewrites, spared))
        assert [len(answers) for [answers] in services.all_of(futures).result(20)] == [len(QUESTIONS)] * 2
        assert services.stats()["from_journal"] == counts[0]["from_journal"] == len(QUESTIONS) + 1
        assert counts[1]["from_journal"] == 0


def without_details(found: tuple[list[Answers], list[str | Missing]]) -> tuple[list[Answers], list[str | Missing]]:
    """The same with the details of Missing as the journal gives them."""

    def plain(value: float | str | Missing) -> float | str | Missing:
        return Missing(value.reason, "from the journal") if isinstance(value, Missing) else value

    answers, texts = found
    return [{q: plain(v) for q, v in each.items()} for each in answers], [plain(text) for text in texts]  # type: ignore[misc]


def test_half_a_round_is_asked_to_its_end(server: FakeServer, tmp_path: Path) -> None:
    config = config_of(server)
    with services_of(config, tmp_path) as services:
        [first] = services.submit_answers([pool(0)], [QUESTIONS[:4]]).result(20)
        # Scoring in rounds asks about the same pool again.
        [second] = services.submit_answers([pool(0)], [QUESTIONS[4:6]]).result(20)
        assert services.stats()["from_journal"] == 0
    asked = calls(server)
    with services_of(config, tmp_path) as services:
        [whole] = services.submit_answers([pool(0)], [QUESTIONS]).result(20)
        assert services.stats()["from_journal"] == 6
    assert calls(server) == asked + len(QUESTIONS) - 6
    assert {question: whole[question] for question in QUESTIONS[:6]} == first | second


@pytest.mark.parametrize("end", ["cancelled", "closed"])
def test_what_was_answered_of_a_round_that_was_given_up_is_not_asked_again(
    server: FakeServer, tmp_path: Path, end: str
) -> None:
    """Two calls hang when the run stops, and one had failed: these three are asked again."""
    config, fickle = config_of(server), server.fault_every_time
    with services_of(config, tmp_path) as services:
        server.script.extend([status(400), hang, hang])
        future = services.submit_answers([pool(0)], [QUESTIONS])
        deadline = time.monotonic() + 20
        while services.stats()["judge_unmetered"] < len(QUESTIONS) - 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.1)  # the last answer has come, and is read now
        if end == "cancelled":
            assert future.cancel()
            assert services.recall(0) is not None
    server.fault_every_time = fickle
    asked = calls(server)
    with services_of(config, tmp_path) as services:
        [answers] = services.submit_answers([pool(0)], [QUESTIONS]).result(20)
        assert services.stats()["from_journal"] == len(QUESTIONS) - 3
    assert calls(server) == asked + 3
    assert not any(isinstance(value, Missing) for value in answers.values())


def test_other_settings_ask_anew(server: FakeServer, tmp_path: Path) -> None:
    with services_of(config_of(server), tmp_path) as services:
        answers, rewrites = step(services, 0)
    with services_of(config_of(server, rewriter_temperature=0.5), tmp_path) as services:
        others, texts = step(services, 0)
        assert services.stats()["from_journal"] == len(QUESTIONS)
    assert others == answers
    assert texts != rewrites
    with services_of(config_of(server), tmp_path) as services:
        longer = services.submit_rewrites([request(0)], 10).result(20)
    assert longer not in (texts, rewrites)


def test_an_outage_that_ended_the_run_is_not_repeated(server: FakeServer, tmp_path: Path) -> None:
    config = config_of(server)
    fickle = server.fault_every_time
    with services_of(config, tmp_path) as services:
        good = step(services, 0)
        server.fault_every_time = status(400)
        for sample in (1, 2):
            answers, texts = step(services, sample)
            assert all(isinstance(value, Missing) for value in [*answers[0].values(), *texts])
        server.fault_every_time = hang
        ahead = services.submit_rewrites([request(3)], 9)
        services.void(1)
        assert ahead.cancelled(), "no rewrite of the outage is written behind the void"
    server.fault_every_time = fickle
    with services_of(config, tmp_path) as services:
        assert step(services, 0) == good
        for sample in (1, 2, 3):
            answers, texts = step(services, sample)
            assert not any(isinstance(value, Missing) for value in [*answers[0].values(), *texts])
        assert services.stats()["from_journal"] == len(QUESTIONS) + 1


def test_a_rollback_in_the_same_process_repeats(server: FakeServer, tmp_path: Path) -> None:
    with services_of(config_of(server), tmp_path) as services:
        first = [step(services, sample) for sample in range(3)]
        found = services.recall(1)
        assert found is not None
        assert (found.verdicts, found.rewrites) == (2 * len(QUESTIONS), 2)
        assert [step(services, sample) for sample in (1, 2)] == first[1:]
        services.checkpointed(2)
        assert [path.name for path in tmp_path.iterdir()] == ["000001-0000-000000.jsonl"]
        step(services, 3)
        services.checkpointed(3)
        assert [path.name for path in tmp_path.iterdir()] == ["000001-0000-000001.jsonl"]


def test_no_answer_is_used_that_is_not_written_down(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "journal"
    with services_of(config_of(server), folder) as services:
        folder.touch()  # a file where the folder should be
        future = services.submit_answers([pool(0)], [QUESTIONS])
        with pytest.raises(CheckpointError, match="cannot write the journal"):
            future.result(20)
