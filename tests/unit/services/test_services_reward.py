"""The reward judge against the fake server: what is sent, how logits become scores, and what is no logit."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest
from fake_server import FakeServer, classes_body, respond, status

from megatron_sip.errors import ServiceError
from megatron_sip.services.client import ServiceClient
from megatron_sip.services.endpoint import ClientSettings
from megatron_sip.services.model_server import ModelServer
from megatron_sip.services.reward import RewardJudge, RewardReading, class_logits, pair_logit, reward_score
from megatron_sip.types import Candidate, CandidateKind, Missing, MissingReason, Pool, Question, Verdict

T = TypeVar("T")


def pool_of(*texts: str, prefix: str = "Once upon a time") -> Pool:
    candidates = (Candidate(CandidateKind.ROLLOUT, (index,), text, index) for index, text in enumerate(texts))
    return Pool(0, prefix, texts[0], tuple(candidates))


def with_judge(
    server: FakeServer, reading: RewardReading, work: Callable[[RewardJudge], Awaitable[T]], chats: bool = False
) -> T:
    async def run() -> T:
        settings = ClientSettings(urls=(server.url,), timeout=5.0, retries=0)
        model = ModelServer(ServiceClient(settings, {}), chats=chats)
        await model.start()
        try:
            return await work(RewardJudge(model, reading, "taste"))
        finally:
            await model.client.close()

    return asyncio.run(run())


def ask(server: FakeServer, reading: RewardReading, pool: Pool, chats: bool = False) -> Verdict:
    return with_judge(server, reading, lambda judge: judge.ask(pool, Question("taste", 0)), chats)


def bodies(server: FakeServer, path: str) -> list[dict[str, Any]]:
    return [body for where, body in server.requests if where == path]


def test_prefix_and_candidate_go_as_one_text() -> None:
    with FakeServer() as server:
        server.logits = lambda body: [2.0]
        verdict = ask(server, RewardReading(), pool_of(" there was <|end|> a king"))
    assert verdict == pytest.approx(1 / (1 + math.exp(-2)))
    [body] = bodies(server, "/classify")
    assert body == {
        "model": "fake",
        "use_activation": False,
        "input": "Once upon a time there was < |end| > a king",
    }


def test_a_chat_model_sees_two_turns() -> None:
    with FakeServer() as server:
        ask(server, RewardReading(input="chat"), pool_of(" there was a king"), chats=True)
    [body] = bodies(server, "/classify")
    user, assistant = body["messages"]
    assert (user["role"], assistant) == ("user", {"role": "assistant", "content": " there was a king"})
    assert user["content"].endswith("Once upon a time")
    assert "input" not in body


def test_a_cross_encoder_sees_a_pair() -> None:
    with FakeServer() as server:
        server.logits = lambda body: [-1.0]
        verdict = ask(server, RewardReading(route="score"), pool_of(" there was a king"))
    assert verdict == pytest.approx(1 / (1 + math.exp(1)))
    [body] = bodies(server, "/score")
    assert (body["queries"], body["documents"]) == ("Once upon a time", " there was a king")
    assert body["use_activation"] is False


@pytest.mark.parametrize(
    ("logits", "reading", "expected"),
    [
        ([0.0], RewardReading(), 0.5),
        ([3.0], RewardReading(offset=3.0), 0.5),
        ([5.0], RewardReading(scale=0.5, offset=3.0), 1 / (1 + math.exp(-1))),
        ([5.0], RewardReading(scale=-1.0), 1 / (1 + math.exp(5))),
        ([1e9], RewardReading(), 1.0),
        ([-1e9], RewardReading(scale=1e9), 0.0),
        # With classes the score is the softmax probability of the chosen one.
        ([1.0, 2.0, 0.5], RewardReading(label=1), math.exp(2) / (math.exp(1) + math.exp(2) + math.exp(0.5))),
        ([-800.0, 800.0], RewardReading(label=0), 0.0),
    ],
)
def test_logits_become_scores(logits: list[float], reading: RewardReading, expected: float) -> None:
    score = reward_score(logits, reading)
    assert score == pytest.approx(expected, abs=1e-12)
    assert isinstance(score, float)
    assert 0 <= score <= 1


@pytest.mark.parametrize(
    ("logits", "reading"),
    [([1.0, 2.0], RewardReading()), ([1.0], RewardReading(label=0)), ([1.0, 2.0], RewardReading(label=2))],
)
def test_a_label_must_be_a_class_of_the_model(logits: list[float], reading: RewardReading) -> None:
    score = reward_score(logits, reading)
    assert isinstance(score, Missing)
    assert score.reason is MissingReason.MALFORMED


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"data": []},
        {"data": None},
        {"data": ["x"]},
        {"data": [{"probs": [0.1]}, {"probs": [0.2]}]},
        {"data": [{"probs": []}]},
        {"data": [{"probs": None}]},
        {"data": [{"probs": 0.3}]},
        {"data": [{"probs": ["0.3"]}]},
        {"data": [{"probs": [True]}]},
        {"data": [{"probs": [None]}]},
        {"data": [{"probs": [math.nan]}]},
        {"data": [{"probs": [math.inf]}]},
        {"data": [{"probs": [10**400]}]},
        {"error": {"message": "overloaded"}},
    ],
)
def test_odd_answers_are_missing(body: dict[str, Any]) -> None:
    found = class_logits(body)
    assert isinstance(found, Missing)
    assert found.reason is MissingReason.MALFORMED


@pytest.mark.parametrize("score", [None, "1", True, math.nan, [1.0]])
def test_odd_scores_are_missing(score: object) -> None:
    assert isinstance(pair_logit({"data": [{"score": score}]}), Missing)
    assert pair_logit({"data": [{"index": 0, "object": "score", "score": -0.5}]}) == [-0.5]


def test_what_fails_is_missing_and_an_empty_candidate_is_not_asked_about() -> None:
    with FakeServer() as server:
        server.script.append(status(400))
        refused = ask(server, RewardReading(), pool_of("x"))
        server.script.append(respond(classes_body([1.0, 2.0])))
        two = ask(server, RewardReading(), pool_of("x"))
        empty = ask(server, RewardReading(), pool_of(" \n"))
        assert len(server.requests) == 2
    reasons = [verdict.reason for verdict in (refused, two, empty) if isinstance(verdict, Missing)]
    assert reasons == [MissingReason.HTTP_STATUS, MissingReason.MALFORMED, MissingReason.EMPTY]


def test_a_long_prefix_loses_its_beginning() -> None:
    prefix = " ".join(f"word{index}" for index in range(3000))
    with FakeServer(max_model_len=600) as server:
        for reading, chats in ((RewardReading(), False), (RewardReading(input="chat"), True)):
            assert ask(server, reading, pool_of(" the end", prefix=prefix), chats) == 0.5
        hopeless = ask(server, RewardReading(), pool_of(" very" * 700))
        text, chat = bodies(server, "/classify")
        counts = [len(server.encode(text["input"])[0]), len(server.encode(server.render({**chat}))[0])]
    assert text["input"].endswith("word2999 the end")
    assert "word0 " not in text["input"]
    assert all(400 < count <= 600 for count in counts), counts
    assert isinstance(hopeless, Missing)
    assert hopeless.reason is MissingReason.TOO_LONG


def test_a_server_of_another_kind_is_refused_at_the_start() -> None:
    with FakeServer() as server:
        server.script.append(status(404))
        with pytest.raises(ServiceError, match=r"--judge-set taste\.url"):
            with_judge(server, RewardReading(), lambda judge: judge.start())
        server.logits = lambda body: [1.0, 2.0]
        with pytest.raises(ServiceError, match=r"2 classes and no label was chosen; give --judge-set taste\.label"):
            with_judge(server, RewardReading(), lambda judge: judge.start())
        with_judge(server, RewardReading(label=1), lambda judge: judge.start())


def test_who_answered_tells_model_reading_and_wording() -> None:
    async def name(judge: RewardJudge) -> tuple[str, str, str, str]:
        return judge.name, judge.model, judge.version, judge.settings

    with FakeServer() as server:
        plain = with_judge(server, RewardReading(), name)
        other = with_judge(server, RewardReading("chat", label=1, scale=2.0), name, chats=True)
    assert plain == ("taste", "fake", "reward-text-1", "classify text scale 1.0 offset 0.0")
    assert other == ("taste", "fake", "reward-chat-1", "classify chat label 1 scale 2.0 offset 0.0")
