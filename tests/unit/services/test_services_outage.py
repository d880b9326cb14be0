"""No server answers: calls are missing, wait for a server, or end the run, as --judge-failure says."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Literal

import pytest
from fake_server import FakeServer, Handler, hang, reset, respond, status
from test_services_client import KEY, settings, unused_port
from test_services_hub import config_of, pool_of, request
from test_services_pool import GOOD, at_once, post, until, with_client

from megatron_sip.config.groups import JudgeConfig, RewriterConfig
from megatron_sip.errors import ServiceError
from megatron_sip.services import client as client_module
from megatron_sip.services.client import ServiceClient
from megatron_sip.services.hub import PreferenceServices
from megatron_sip.types import Missing, MissingReason, Question


async def in_thread(action: Callable[[], Any]) -> Any:
    return await asyncio.get_running_loop().run_in_executor(None, action)


def dead_urls(count: int) -> tuple[list[int], list[str]]:
    ports = [unused_port() for _ in range(count)]
    return ports, [f"http://127.0.0.1:{port}/v1" for port in ports]


@pytest.mark.parametrize("servers", [1, 2])
def test_calls_wait_beyond_their_deadline_until_a_server_is_back(servers: int) -> None:
    ports, urls = dead_urls(servers)

    async def run(client: ServiceClient) -> None:
        calls = asyncio.create_task(at_once(client, 40))
        await until(lambda: client.waits_for is not None)
        assert client.waits_for is not None
        assert all(url in client.waits_for for url in urls)
        attempts = client.attempts
        await asyncio.sleep(1.0)
        assert not calls.done(), "they outlive their deadline of 0.5 s"
        assert client.attempts == attempts, "nobody asks meanwhile but the probes"
        with FakeServer(port=ports[-1]) as server:
            began = time.monotonic()
            assert await calls == [GOOD] * 40
            assert time.monotonic() - began < 6.0
            assert client.waits_for is None
            assert len(server.requests) == 40, "each call is made anew once"
            assert await post(client) == [GOOD]

    with_client(settings(*urls, timeout=0.5, retries=1, concurrency=10, on_outage="wait"), run)


def test_a_server_that_goes_away_in_the_middle_costs_no_verdict() -> None:
    """Calls that are cut off, new calls and calls in the queue alike; also without a retry."""
    with ExitStack() as first:
        server = first.enter_context(FakeServer())

        async def run(client: ServiceClient) -> None:
            assert await post(client) == [GOOD]
            server.fault_every_time = hang
            calls = asyncio.create_task(at_once(client, 30))
            await until(lambda: server.in_flight == 10)
            await in_thread(first.close)
            await until(lambda: client.waits_for is not None)
            with FakeServer(port=server.port) as second:
                assert await calls == [GOOD] * 30
                assert len(second.requests) == 30

        with_client(settings(server.url, retries=0, concurrency=10, on_outage="wait"), run)


@pytest.mark.parametrize("policy", ["wait", "stop"])
@pytest.mark.parametrize("retries", [0, 3])
def test_calls_that_began_before_the_last_answer_are_cut_off_by_the_outage_all_the_same(
    retries: int, policy: Literal["wait", "stop"]
) -> None:
    """Long calls: most of those in flight began before the last one that was answered."""
    with ExitStack() as first:
        server = first.enter_context(FakeServer())

        async def run(client: ServiceClient) -> None:
            server.fault_every_time = hang
            calls = [asyncio.create_task(post(client)) for _ in range(20)]
            await until(lambda: server.in_flight == 20)
            server.fault_every_time = None
            assert await post(client) == [GOOD]
            await in_thread(first.close)
            if policy == "stop":
                assert all(
                    isinstance(end, ServiceError) for end in await asyncio.gather(*calls, return_exceptions=True)
                )
                return
            await until(lambda: client.waits_for is not None)
            with FakeServer(port=server.port) as second:
                assert await asyncio.gather(*calls) == [[GOOD]] * 20
                assert len(second.requests) == 20

        with_client(settings(server.url, retries=retries, concurrency=30, on_outage=policy), run)


@pytest.mark.parametrize("fault", [status(500), reset, hang])
def test_a_server_that_is_well_and_fails_its_calls_is_no_outage(fault: Handler) -> None:
    """Else a question that kills its call would stop the run for ever. It is a missing verdict."""
    with FakeServer() as server:
        server.fault_every_time = fault

        async def run(client: ServiceClient) -> None:
            for answer in await post(client, 3):
                assert isinstance(answer, Missing)
            assert client.waits_for is None
            assert server.probes >= 1

        with_client(settings(server.url, timeout=0.3, on_outage="wait"), run)


@pytest.mark.parametrize("health", [status(503), reset, hang])
def test_all_calls_and_all_probes_that_fail_are_an_outage(health: Handler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "PROBE_SECONDS", 0.2)
    with FakeServer() as one, FakeServer() as two:
        for server in (one, two):
            server.fault_every_time, server.health_handler = status(500), health

        async def run(client: ServiceClient) -> None:
            calls = asyncio.create_task(at_once(client, 5))
            await until(lambda: client.waits_for is not None)
            two.fault_every_time = two.health_handler = None
            assert await calls == [GOOD] * 5

        with_client(settings(one.url, two.url, retries=1, on_outage="wait"), run)


def test_a_key_that_a_sick_server_repeats_is_not_told() -> None:
    with FakeServer() as server:
        server.fault_every_time = server.health_handler = respond({"error": f"no engine for {KEY}"}, 503)

        async def run(client: ServiceClient) -> None:
            calls = asyncio.create_task(post(client))
            await until(lambda: client.waits_for is not None)
            calls.cancel()
            await asyncio.wait([calls])
            assert "no engine for ***" in str(client.waits_for)
            assert KEY not in str(client.waits_for)

        with_client(settings(server.url, on_outage="wait"), run)


def test_a_server_that_refuses_is_no_outage() -> None:
    with FakeServer() as server:
        server.fault_every_time = status(401)

        async def run(client: ServiceClient) -> None:
            [answer] = await post(client)
            assert isinstance(answer, Missing)
            assert answer.reason is MissingReason.HTTP_STATUS
            assert server.probes == 0

        with_client(settings(server.url, on_outage="wait"), run)


def test_stop_raises_and_names_the_server() -> None:
    _, urls = dead_urls(2)

    async def run(client: ServiceClient) -> None:
        with pytest.raises(ServiceError) as error:
            await at_once(client, 5)
        assert all(url in str(error.value) for url in urls)
        assert "--judge-url" in str(error.value)
        with pytest.raises(ServiceError):
            await post(client)
        assert client.waits_for is None

    with_client(settings(*urls, retries=1, on_outage="stop"), run)


def test_skip_goes_on_with_missing_verdicts_and_finds_the_server_again() -> None:
    [port], [url] = dead_urls(1)

    async def run(client: ServiceClient) -> None:
        for answer in await at_once(client, 5):
            assert isinstance(answer, Missing)
            assert answer.reason is MissingReason.CONNECTION
        assert client.waits_for is None
        with FakeServer(port=port):
            assert await post(client) == [GOOD]

    with_client(settings(url, on_outage="skip"), run)


def test_calls_that_wait_can_be_given_up() -> None:
    _, [url] = dead_urls(1)

    async def run(client: ServiceClient) -> None:
        calls = asyncio.create_task(at_once(client, 5))
        await until(lambda: client.waits_for is not None)
        # As `PreferenceServices.void` does: the probes end as well.
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await asyncio.wait([calls])
        again = asyncio.create_task(post(client))
        await asyncio.sleep(0.1)
        assert not again.done()
        port = int(url.split(":")[2].split("/")[0])
        with FakeServer(port=port):
            assert await again == [GOOD], "the probes begin anew"

    with_client(settings(url, on_outage="wait"), run)


def test_judges_and_rewriter_wait_each_for_their_own_servers() -> None:
    with FakeServer() as judging, FakeServer() as rewriting:
        config = config_of(
            JudgeConfig(judge_url=(judging.url,), judge_retries=0),
            RewriterConfig(rewriter_url=(rewriting.url,)),
            pool=("original", "rewrite"),
        )
        with PreferenceServices(config, {}) as services:
            rewriting.close()
            rewrites = services.submit_rewrites([request("a", "b")], 9)
            deadline = time.monotonic() + 5.0
            while services.waits_for("rewriter") is None:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            assert services.waits_for("judge") is None
            assert services.waits_for() == services.waits_for("rewriter")
            assert services.submit_answers([pool_of("a1", "b22")], [[Question("quality", 0, 1)]]).result(20)
            assert not rewrites.done()
