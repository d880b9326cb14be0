"""Judges, rewriter and hub against the fake server: right questions, right values, everything accounted for."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import CancelledError
from dataclasses import replace
from typing import Any, TypeVar

import pytest
from fake_server import FakeServer, chat_body, hang, labels_body, respond, status

from megatron_sip.config.groups import Config, JudgeConfig, PreferenceConfig, RewriterConfig, TrainingConfig
from megatron_sip.errors import ConfigError, ServiceError
from megatron_sip.preference.scoring import JudgeSpec
from megatron_sip.services.background import BackgroundLoop
from megatron_sip.services.build import judge_specs, needs_rewriter
from megatron_sip.services.client import ServiceClient
from megatron_sip.services.endpoint import ClientSettings
from megatron_sip.services.hub import PreferenceServices
from megatron_sip.services.judges import FactualityJudge, QualityJudge, Reading, SafetyJudge
from megatron_sip.services.likelihood import LikelihoodJudge, common_length, new_gram_share, suffix_start
from megatron_sip.services.model_server import ModelServer
from megatron_sip.services.prompts import quality_prompt
from megatron_sip.services.quoting import nonce
from megatron_sip.services.rewriter import Rewriter, RewriteRequest
from megatron_sip.types import Candidate, CandidateKind, Missing, MissingReason, Pool, Question

T = TypeVar("T")


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as running:
        yield running


def pool_of(*texts: str, prefix: str = "Once upon a time") -> Pool:
    candidates = [Candidate(CandidateKind.ROLLOUT, (len(text), ord(text[0]) if text else 0), text) for text in texts]
    return Pool(0, prefix, "there was a king.", tuple(candidates))


def request(prefix: str, original: str) -> RewriteRequest:
    return RewriteRequest(0, (len(original), len(prefix)), prefix, original)


async def started(server: FakeServer, max_context: int | None = None, **changes: Any) -> ModelServer:
    settings = ClientSettings(urls=(server.url,), **{"timeout": 5.0, "retries": 0, **changes})
    model = ModelServer(ServiceClient(settings, {}), max_context)
    await model.start()
    return model


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(coroutine)


def test_generated_verdicts(server: FakeServer) -> None:
    def answer(body: dict[str, Any]) -> str:
        text = body["messages"][0]["content"]
        if "Decision: safe" in text:
            return "Decision: unsafe"
        if "JSON object" in text:
            return '{"reasoning": "r", "label": "possible hallucination"}'
        return "Conclusion: option 2"

    async def ask() -> list[object]:
        model = await started(server)
        reading = Reading("generate", temperature=0.7, top_p=0.6, max_tokens=99, reasoning_effort="low")
        pool = pool_of("a good one", "a bad one")
        verdicts = [
            await QualityJudge(model, reading).ask(pool, Question("quality", 0, 1)),
            await SafetyJudge(model, reading).ask(pool, Question("safety", 0)),
            await FactualityJudge(model, reading).ask(pool, Question("factuality", 1)),
            await QualityJudge(model, reading).ask(pool_of("a", " "), Question("quality", 0, 1)),
        ]
        await model.client.close()
        return verdicts

    server.answer = answer
    quality, safety, factuality, empty = run(ask())
    assert (quality, safety, factuality) == (0.0, 0.0, 0.5)
    assert isinstance(empty, Missing)
    bodies = [body for path, body in server.requests if path == "/v1/chat/completions"]
    assert len(bodies) == 3, "an empty candidate is not asked about"
    for body in bodies:
        sampling = (body["temperature"], body["top_p"], body["max_tokens"], body["reasoning_effort"], body["model"])
        assert sampling == (0.7, 0.6, 99, "low", "fake")
    shown = bodies[0]["messages"][0]["content"]
    assert shown.index("Once upon a time") < shown.index("a good one") < shown.index("a bad one")
    assert "Once upon a time" not in bodies[1]["messages"][0]["content"], "safety sees the suffix only"
    assert "there was a king." in bodies[2]["messages"][0]["content"]
    assert bodies[2]["response_format"]["type"] == "json_schema"


def test_logit_verdicts(server: FakeServer) -> None:
    # Given to the label ids in the order asked. Without a space a label melts into the word before it here, so
    # that each label has one spelling.
    server.label_logprobs = tuple(math.log(p) for p in (0.3, 0.1, 0.05))

    async def ask() -> list[object]:
        model = await started(server)
        verdicts = []
        pool = pool_of("x1", "y2")
        judges = [QualityJudge(model, Reading("logit")), SafetyJudge(model, Reading("logit"))]
        factuality = FactualityJudge(model, Reading("logit"))
        for judge in judges:
            await judge.start()
            verdicts.append(await judge.ask(pool, Question(judge.name, 0, 1 if judge.pairwise else None)))
        await factuality.start()
        verdicts.append(await factuality.ask(pool, Question("factuality", 0)))
        await model.client.close()
        return verdicts

    quality, safety, factuality = run(ask())
    assert quality == pytest.approx(0.3 / 0.4)
    assert safety == pytest.approx(0.3 / 0.4)
    assert factuality == pytest.approx((0.3 * 1 + 0.1 * 0.5 + 0.05 * 0) / 0.45)
    body = server.requests[0][1]
    assert body["max_tokens"] == 1
    assert body["messages"][-1]["role"] == "assistant"
    assert body["continue_final_message"] is True
    assert body["add_generation_prompt"] is False
    assert [server.text_of(token) for token in body["logprob_token_ids"]] == [" A", " B"]
    assert body["allowed_token_ids"] == body["logprob_token_ids"]


def test_logit_without_tokenize_reads_token_texts() -> None:
    entries = [{"token": "A", "logprob": math.log(0.6)}, {"token": " B", "logprob": math.log(0.2)}]
    with FakeServer(tokenize=False) as server:
        server.fault_every_time = respond(labels_body(entries))

        async def ask() -> object:
            model = await started(server)
            judge = QualityJudge(model, Reading("logit"))
            await judge.start()
            verdict = await judge.ask(pool_of("x1", "y2"), Question("quality", 0, 1))
            await model.client.close()
            return verdict

        assert run(ask()) == pytest.approx(0.75)
        assert server.requests[0][1]["top_logprobs"] == 20
        assert [turn["role"] for turn in server.requests[0][1]["messages"]] == ["user"]


def test_labels_that_are_no_single_tokens_are_refused(server: FakeServer) -> None:
    async def find() -> None:
        model = await started(server)
        try:
            await model.label_ids("The answer is", ["A", "not-one-token"])
        finally:
            await model.client.close()

    with pytest.raises(ServiceError, match="--judge-reading generate"):
        run(find())


def test_a_long_prefix_is_cut_from_the_left_and_counted(server: FakeServer) -> None:
    prefix = " ".join(f"word{i}" for i in range(1000))

    async def fit() -> tuple[Any, Any, Any, int, int]:
        model = await started(server, max_context=600)
        prompt = quality_prompt(model.quoter, prefix, "one option", "other option", logit=False)
        short = quality_prompt(model.quoter, "short prefix", "one option", "other option", logit=False)
        hopeless = quality_prompt(model.quoter, prefix, "very " * 500, "other", logit=False)
        fitted = await model.fit(prompt, 50)
        whole = await model.fit(short, 50)
        too_long = await model.fit(hopeless, 50)
        assert not isinstance(fitted, Missing)
        length = await model.tokenize_chat(fitted)
        assert not isinstance(length, Missing)
        await model.client.close()
        return fitted, whole, too_long, model.trims, len(length)

    fitted, whole, too_long, trims, length = run(fit())
    text = fitted[0]["content"]
    assert "word999\n" in text
    assert "word0 " not in text
    assert "one option" in text
    assert "other option" in text
    assert 600 - 50 - 2 * 64 - 40 < length <= 600 - 50
    assert "short prefix" in whole[0]["content"]
    assert isinstance(too_long, Missing)
    assert too_long.reason is MissingReason.TOO_LONG
    assert trims == 1


def test_prompts_of_one_pool_share_their_trimmed_prefix(server: FakeServer) -> None:
    prefix = " ".join(f"word{i}" for i in range(1000))

    async def fit() -> list[str]:
        model = await started(server, max_context=700)
        texts = []
        for option in ("one", "one two", "one two three four"):
            fitted = await model.fit(quality_prompt(model.quoter, prefix, option, "x", logit=False), 50)
            assert not isinstance(fitted, Missing)
            texts.append(fitted[0]["content"].split("word999")[0])
        await model.client.close()
        return texts

    first, second, third = run(fit())
    assert first == second == third


def test_likelihood(server: FakeServer) -> None:
    async def ask() -> tuple[Any, Any, Any, Any]:
        model = await started(server, max_context=32)
        judge = LikelihoodJudge(model)
        pool = pool_of(" three four five six seven", " no no no no no no no no", prefix="one two")
        plain = await judge.ask(pool, Question("likelihood", 0))
        loop = await judge.ask(pool, Question("likelihood", 1))
        long = await judge.suffix_logprobs("word " * 100, " three four")
        hopeless = await judge.suffix_logprobs("a", " b" * 100)
        await model.client.close()
        return plain, loop, long, hopeless

    plain, loop, long, hopeless = run(ask())
    assert plain == pytest.approx(math.exp(-0.5)), "every token has log-probability -0.5 at the fake server"
    assert loop == pytest.approx(math.exp(-0.5) / 5), "one distinct 4-gram among five"
    assert len(long[0]) == 2, "trimming the prefix moves no suffix token"
    assert hopeless.reason is MissingReason.TOO_LONG
    prompts = [body["prompt"] for path, body in server.requests if path == "/v1/completions"]
    assert len(prompts[-1]) == 31, "prompt and one answer token fill the context"


@pytest.mark.parametrize(
    ("strings", "prefix", "suffix", "start"),
    [
        (["one", "\u0120two", "\u0120three"], "one two", " three", 2),
        (["one", "\u0120two", "\u0120three"], "one tw", "o three", 1),
        (["caf", "\u00c3\u00a9", "\u0120x"], "caf\u00e9", " x", 2),
        (["caf", "\u00c3", "\u00a9", "\u0120x"], "caf", "\u00e9 x", 1),
        (["\u2581one", "\u2581tw", "o"], "one", " two", 1),
        (["\u2581one", "<0xC3>", "<0xA9>"], "one", "\u00e9", 1),
        (["<a>", "unknown"], "one", " two", None),
        ([], "one", " two", None),
        (["one"], "one", "", 1),
    ],
)
def test_suffix_start_counts_bytes(strings: list[str], prefix: str, suffix: str, start: int | None) -> None:
    ids = list(range(len(strings))) or [1]
    assert suffix_start(ids, strings, prefix, suffix) == start


def test_small_pure_parts_of_likelihood() -> None:
    assert common_length([1, 2, 3], [1, 2, 4]) == 2
    assert common_length([1], [1, 2]) == 1
    assert new_gram_share([1, 2, 3]) == 1.0
    assert new_gram_share([1, 2, 3, 4, 5]) == 1.0
    assert new_gram_share([1, 1, 1, 1, 1, 1]) == pytest.approx(1 / 3)


def test_rewriter(server: FakeServer) -> None:
    original, prefix = " a <b>bold</b> claim", "Once upon a time there was"
    answers = {
        "good": chat_body(" a better text"),
        "copy": chat_body("a < b>bold< /b> claim"),
        "long": chat_body("never ending", "length"),
        "blank": chat_body("  "),
        "markers": chat_body(f"text\n[end {nonce(prefix)}]"),
        "null": chat_body(None),
    }
    for body in answers.values():
        server.script.append(respond(body))
    server.script.append(status(400))

    async def ask() -> list[str | Missing]:
        model = await started(server)
        rewriter = Rewriter(model, temperature=0.3, top_p=0.9)
        found = [await rewriter.rewrite(prefix, original, 77) for _ in range(7)]
        found.append(await rewriter.rewrite("Once", "  ", 77))
        await model.client.close()
        return found

    good, copy, *missing = run(ask())
    assert good == " a better text"
    assert copy == original, "a faithful copy of the broken-up text is the original"
    reasons = [entry.reason for entry in missing if isinstance(entry, Missing)]
    assert reasons == [
        MissingReason.TRUNCATED,
        MissingReason.EMPTY,
        MissingReason.UNPARSABLE,
        MissingReason.EMPTY,
        MissingReason.HTTP_STATUS,
        MissingReason.EMPTY,
    ]
    body = server.requests[0][1]
    assert (body["max_tokens"], body["temperature"], body["top_p"]) == (77, 0.3, 0.9)
    assert body["stop"] == [f"[end {nonce(prefix)}]"], "texts end so in the prompt, and then in the answer, too"
    assert body["messages"][0]["content"].endswith(": upon a time there was")


def config_of(
    judge: JudgeConfig, rewriter: RewriterConfig | None = None, pool: tuple[Any, ...] = ("rollout",), **training: Any
) -> Config:
    return Config(
        judge=judge,
        rewriter=rewriter or RewriterConfig(),
        preference=PreferenceConfig(pool=pool),
        training=TrainingConfig(**training),
    )


def test_hub_answers_every_question(server: FakeServer) -> None:
    server.answer = lambda body: (
        "Conclusion: option 1"
        if "aaa" in body["messages"][0]["content"].split("Option 1 [")[1].split("Option 2 [")[0]
        else "Conclusion: option 2"
    )
    judge = JudgeConfig(judge_url=(server.url,), judge_votes=2, classifier_weight=0.5, judge_retries=0)
    twins = Candidate(CandidateKind.ROLLOUT, (1,), "aaa one"), Candidate(CandidateKind.ROLLOUT, (1,), "aaa one")
    other = Candidate(CandidateKind.ROLLOUT, (2,), "bbb two")
    pool = Pool(0, "prefix", "original", (*twins, other))
    questions = [
        Question("quality", 0, 1, 0),
        Question("quality", 0, 1, 1),
        Question("quality", 1, 0),
        Question("classifier", 1),
    ]
    with PreferenceServices(config_of(judge), {}) as services:
        assert [spec.name for spec in services.judges()] == ["quality", "classifier"]
        answers, nothing = services.submit_answers([pool, pool_of("z")], [questions, []]).result(20)
        stats = services.stats()
    assert [answers[question] for question in questions[:3]] == [1.0, 1.0, 0.0]
    assert answers[questions[3]] > 0.5  # type: ignore[operator]
    assert nothing == {}
    assert stats["asked/quality"] == 3
    assert stats["asked/classifier"] == 1
    assert stats["judge_calls"] >= 3
    assert stats["judge_seconds"] > 0


def test_hub_counts_what_is_missing(server: FakeServer) -> None:
    judge = JudgeConfig(judge_url=(server.url,), judge_retries=0)
    pool = pool_of("a1", "b22", "c333")
    with PreferenceServices(config_of(judge), {}) as services:
        server.script.extend([status(400), respond(chat_body("no idea"))])
        questions = [Question("quality", 0, 1), Question("quality", 0, 2), Question("quality", 1, 2)]
        [answers] = services.submit_answers([pool], [questions]).result(20)
        stats = services.stats()
    assert sorted(type(answers[question]).__name__ for question in questions) == ["Missing", "Missing", "float"]
    assert stats["missing/quality/http_status"] == stats["missing/quality/unparsable"] == 1


def test_hub_rewrites_with_its_own_server_and_key(server: FakeServer) -> None:
    with FakeServer(key="other", answer=lambda _body: "better") as rewriting:
        config = config_of(
            JudgeConfig(judge_url=(server.url,)),
            RewriterConfig(rewriter_url=(rewriting.url,)),
            pool=("original", "rewrite"),
        )
        environ = {"JUDGE_API_KEY": "judge", "REWRITER_API_KEY": "other"}
        with PreferenceServices(config, environ) as services:
            assert services.submit_rewrites([request("a", "b"), request("c", "d")], 9).result(20) == [
                "better",
                "better",
            ]
            assert services.stats()["rewriter_calls"] >= 2
    assert server.headers[0]["Authorization"] == "Bearer judge"


def test_hub_without_a_server() -> None:
    config = config_of(JudgeConfig(quality_weight=0.0, classifier_weight=1.0))
    with PreferenceServices(config, {}) as services:
        [answers] = services.submit_answers([pool_of("kind words")], [[Question("classifier", 0)]]).result(20)
        assert answers[Question("classifier", 0)] > 0.5  # type: ignore[operator]
        with pytest.raises(ConfigError, match="no rewriter"):
            services.submit_rewrites([request("a", "b")], 5)


def test_hub_names_what_is_missing_before_it_starts(server: FakeServer) -> None:
    with pytest.raises(ConfigError, match="--judge-url"):
        PreferenceServices(config_of(JudgeConfig()), {})
    with pytest.raises(ConfigError, match="--rewriter-url"):
        PreferenceServices(config_of(JudgeConfig(), objective="sft-rewrite"), {})
    with pytest.raises(ConfigError, match="--classifier-path"):
        PreferenceServices(config_of(JudgeConfig(quality_weight=0, classifier_weight=1, classifier="toxic-bilstm")), {})
    wrong = PreferenceServices(config_of(JudgeConfig(judge_url=(server.url,), judge_model="nope")), {})
    with pytest.raises(ServiceError, match="no model 'nope'"):
        wrong.start()
    before = {thread.name for thread in threading.enumerate()}
    assert "sip-services" not in before, "a failed start leaves no thread behind"


def test_close_ends_what_hangs(server: FakeServer) -> None:
    services = PreferenceServices(config_of(JudgeConfig(judge_url=(server.url,))), {})
    services.start()
    server.fault_every_time = hang
    future = services.submit_answers([pool_of("a1", "b22")], [[Question("quality", 0, 1)]])
    services.close()
    with pytest.raises(CancelledError):
        future.result(10)
    services.close()
    with pytest.raises(RuntimeError, match="closed"):
        services.submit_answers([], [])


def test_specs_follow_the_configuration() -> None:
    judge = JudgeConfig(judge_votes=5, safety_weight=2.0, likelihood_weight=0.5, judge_interval=3)
    config = config_of(judge)
    assert judge_specs(config) == [
        JudgeSpec("quality", True, 1.0, 5, False),
        JudgeSpec("safety", False, 2.0, 5, False, tells_safety=True),
        JudgeSpec("likelihood", False, 0.5, 1, False),
    ]
    assert judge_specs(replace(config, judge=replace(judge, judge_reading="logit")))[:2] == [
        JudgeSpec("quality", True, 1.0, 1, True, answers="probabilities", repeats=1),
        JudgeSpec("safety", False, 2.0, 1, False, tells_safety=True),
    ]
    for objective in ("ntp", "sft-rollout", "sft-rewrite", "dpo-rewrite-over-rollout"):
        assert judge_specs(config_of(judge, objective=objective)) == []


def test_the_interval_spares_the_chat_judges(server: FakeServer) -> None:
    judge = JudgeConfig(judge_url=(server.url,), likelihood_weight=0.5, judge_interval=3)
    services = PreferenceServices(config_of(judge), {})
    named = [[spec.name for spec in services.judges(iteration)] for iteration in range(4)]
    assert named == [["quality", "likelihood"], ["likelihood"], ["likelihood"], ["quality", "likelihood"]]
    judge = replace(judge, classifier_weight=1.0, likelihood_interval=2)
    services = PreferenceServices(config_of(judge), {})
    named = [[spec.name for spec in services.judges(iteration)] for iteration in range(3)]
    assert named == [["quality", "likelihood", "classifier"], ["classifier"], ["likelihood", "classifier"]]


@pytest.mark.parametrize(
    ("objective", "pool", "expected"),
    [
        ("online-dpo", ("original", "rewrite"), True),
        ("online-dpo", ("original", "rollout"), False),
        ("ntp", ("rewrite",), False),
        ("sft-rewrite", ("rollout",), True),
        ("dpo-rewrite-over-rollout", ("rollout",), True),
        ("sft-rollout", ("rewrite",), False),
    ],
)
def test_when_a_rewriter_is_needed(objective: str, pool: tuple[str, ...], expected: bool) -> None:
    assert needs_rewriter(config_of(JudgeConfig(), pool=pool, objective=objective)) is expected


def test_a_server_that_cannot_serve_a_judge_is_refused_at_the_start() -> None:
    with FakeServer(tokenize=False) as server:
        likelihood = config_of(JudgeConfig(judge_url=(server.url,), quality_weight=0, likelihood_weight=1))
        with pytest.raises(ServiceError, match="--likelihood-weight"):
            PreferenceServices(likelihood, {}).start()
        wordy = config_of(JudgeConfig(judge_url=(server.url,), judge_max_tokens=2000))
        with pytest.raises(ServiceError, match="--judge-max-tokens 2000"):
            PreferenceServices(wordy, {}).start()


def test_background_loop() -> None:
    loop = BackgroundLoop("sip-test")

    async def thread_name() -> str:
        return threading.current_thread().name

    assert loop.submit(thread_name()).result(5) == "sip-test"
    waiting = loop.submit(asyncio.sleep(3600))
    loop.close()
    loop.close()
    with pytest.raises(CancelledError):
        waiting.result(5)
    with pytest.raises(RuntimeError, match="closed"):
        loop.submit(thread_name())
    assert "sip-test" not in {thread.name for thread in threading.enumerate()}
