"""A server that goes away while the services start ends the start, whatever a run that has begun would do."""

from __future__ import annotations

import time
from typing import Literal

import pytest
from aiohttp import web
from fake_server import FakeServer, die, respond
from test_services_hub import config_of, pool_of

from megatron_sip.config.groups import JudgeConfig
from megatron_sip.errors import ServiceError
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
