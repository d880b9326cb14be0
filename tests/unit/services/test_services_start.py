"""A server that goes away while the services start ends the start, and one that is busy for a moment does not."""

from __future__ import annotations

import time
from typing import Literal

import pytest
from aiohttp import web
from fake_server import FakeServer, Handler, die, raw, reset, respond, status
from test_services_client import check, settings
from test_services_hub import config_of, pool_of

from megatron_sip.config.groups import JudgeConfig
from megatron_sip.errors import ServiceError
from megatron_sip.services import client as client_module
from megatron_sip.services.hub import PreferenceServices
from megatron_sip.types import Missing, Question


@pytest.mark.timeout(60)
@pytest.mark.parametrize("policy", ["wait", "stop", "skip"])
@pytest.mark.parametrize("answered", [1, 2])
def test_a_server_that_dies_after_its_check_ends_the_start(
    policy: Literal["wait", "stop", "skip"], answered: int
) -> None:
    """The check asks /tokenize once; what comes next are calls like all others."""
    with FakeServer() as server:
        before = iter([respond({"tokens": [1], "token_strs": ["a"]})] * answered)

        async def few(request: web.Request) -> web.StreamResponse:
            return await next(before, die(server))(request)

        server.tokens_handler = few
        judge = JudgeConfig(judge_url=(server.url,), judge_reading="logit", judge_retries=1, judge_failure=policy)
        services = PreferenceServices(config_of(judge), {})
        with pytest.raises(
            ServiceError, match=r"no server of --judge-url answers .*; start a server, then start again"
        ):
            services.start()


@pytest.mark.timeout(60)
def test_services_that_have_started_wait() -> None:
    with FakeServer() as server:
        judge = JudgeConfig(judge_url=(server.url,), judge_retries=0)
        with PreferenceServices(config_of(judge), {}) as services:
            server.script.append(die(server))
            future = services.submit_answers([pool_of("a1", "b22")], [[Question("quality", 0, 1)]])
            began = time.monotonic()
            while services.waits_for("judge") is None:
                assert time.monotonic() - began < 10
                time.sleep(0.01)
            with FakeServer(port=server.port):
                [answers] = future.result(30)
            assert not any(isinstance(verdict, Missing) for verdict in answers.values())


BUSY = [status(429), status(429, {"Retry-After": "0.1"}), status(408), status(503), raw(b'{"tokens": [1'), reset]


def once(server: FakeServer, fault: Handler) -> Handler:
    """`fault`, and from then on all is well."""

    async def handle(request: web.Request) -> web.StreamResponse:
        server.tokens_handler = server.models_handler = None
        return await fault(request)

    return handle


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "FIRST_BACKOFF_SECONDS", 0.02)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("fault", BUSY)
def test_a_busy_moment_does_not_change_how_verdicts_are_read(fault: Handler) -> None:
    with FakeServer() as server:
        server.tokens_handler = once(server, fault)
        assert check(settings(server.url)).has_tokenize


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("fault", BUSY)
def test_nobody_guesses_whether_a_server_that_stays_busy_tokenizes(fault: Handler) -> None:
    with FakeServer() as server:
        server.tokens_handler = fault
        with pytest.raises(ServiceError, match=r"/tokenize failed .*start again when it is well"):
            check(settings(server.url, timeout=0.3))


def test_an_answer_without_tokens_is_a_no() -> None:
    """As of a server whose /tokenize takes another question."""
    with FakeServer() as server:
        server.tokens_handler = respond({"tokens": []})
        assert not check(settings(server.url)).has_tokenize


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("fault", BUSY[:4])
def test_a_server_that_is_busy_at_its_check_is_asked_again(fault: Handler) -> None:
    with FakeServer() as server:
        server.models_handler = once(server, fault)
        assert check(settings(server.url)).model == "fake"
        server.models_handler = fault
        with pytest.raises(ServiceError, match=r"cannot be used now \(\d+: .*; start again when it takes calls"):
            check(settings(server.url, timeout=0.3))


def test_a_busy_server_is_not_told_to_have_no_template_or_labels() -> None:
    with FakeServer() as server:

        async def only_texts(request: web.Request) -> web.StreamResponse:
            chat = "messages" in await request.json()
            return await (status(429, {"Retry-After": "60"}) if chat else respond({"tokens": [1]}))(request)

        server.tokens_handler = only_texts
        judge = JudgeConfig(judge_url=(server.url,), judge_timeout=5.0)
        with pytest.raises(
            ServiceError, match=r"cannot render a chat turn \(http_status: 429.*start again if that passes"
        ):
            PreferenceServices(config_of(judge), {}).start()

        async def only_closed_turns(request: web.Request) -> web.StreamResponse:
            opened = (await request.json()).get("continue_final_message")
            return await (status(429, {"Retry-After": "60"}) if opened else respond({"tokens": [1]}))(request)

        server.tokens_handler = only_closed_turns
        judge = JudgeConfig(judge_url=(server.url,), judge_timeout=5.0, judge_reading="logit")
        with pytest.raises(ServiceError, match=r"open assistant turn \(http_status: 429.*start again if that passes"):
            PreferenceServices(config_of(judge), {}).start()
