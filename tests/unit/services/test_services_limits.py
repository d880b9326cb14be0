"""Servers that limit the rate: 429 and Retry-After cost time, not verdicts."""

from __future__ import annotations

import asyncio
import time
from contextlib import ExitStack
from typing import Literal

import pytest
from aiohttp import web
from fake_server import FakeServer, Handler, hang, respond, status
from test_services_client import settings
from test_services_pool import GOOD, at_once, post, slow, until, with_client

from megatron_sip.services import client as client_module
from megatron_sip.services import holds
from megatron_sip.services.circuit import TRIP_FAILURES
from megatron_sip.services.client import ServiceClient
from megatron_sip.types import Missing, MissingReason


def limited(seconds: float | None = None) -> Handler:
    return status(429, None if seconds is None else {"Retry-After": str(seconds)})


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "FIRST_BACKOFF_SECONDS", 0.02)
    monkeypatch.setattr(client_module, "LONGEST_BACKOFF_SECONDS", 0.1)
    monkeypatch.setattr(client_module, "SPREAD_SECONDS", 0.05)


@pytest.mark.parametrize("servers", [1, 2])
def test_calls_wait_for_servers_that_asked_for_more_time_than_their_deadline(servers: int) -> None:
    with ExitStack() as running:
        pool = [running.enter_context(FakeServer()) for _ in range(servers)]
        for server in pool:
            server.script.append(limited(1.0))

        async def run(client: ServiceClient) -> None:
            began = time.monotonic()
            assert await at_once(client, 10) == [GOOD] * 10
            assert time.monotonic() - began >= 1.0
            assert client.waits_for is None

        with_client(settings(*(server.url for server in pool), timeout=0.4, retries=0, on_outage="wait"), run)


def test_a_server_that_asks_for_time_again_and_again_is_waited_for() -> None:
    with FakeServer() as server:
        server.script.extend([limited(0.3)] * 5)

        async def run(client: ServiceClient) -> None:
            assert await post(client) == [GOOD]
            assert client.attempts == 6

        with_client(settings(server.url, timeout=0.5, retries=0, on_outage="wait"), run)


def test_a_long_wait_is_told_and_a_short_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holds, "NOTED_SECONDS", 0.5)
    with FakeServer() as server:

        async def run(client: ServiceClient) -> None:
            server.script.append(limited(0.2))
            short = asyncio.create_task(post(client))
            while not short.done():
                assert client.waits_for is None
                await asyncio.sleep(0.01)
            server.script.extend([limited(0.4)] * 2)
            call = asyncio.create_task(post(client))
            await until(lambda: client.waits_for is not None)
            assert client.waits_for == "no server of --judge-url takes calls: all asked to be left alone (Retry-After)"
            assert await call == [GOOD]
            assert client.waits_for is None
            server.script.append(limited(5.0))
            given_up = asyncio.create_task(post(client))
            await until(lambda: client.waits_for is not None)
            given_up.cancel()
            await asyncio.wait([given_up])
            assert client.waits_for is None

        with_client(settings(server.url, retries=0, on_outage="wait"), run)


def test_nothing_is_told_while_calls_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a steady limit some call always waits for long, and verdicts flow."""
    monkeypatch.setattr(holds, "NOTED_SECONDS", 0.2)
    with FakeServer() as server:
        server.script.append(limited(60.0))

        async def run(client: ServiceClient) -> None:
            waiting = asyncio.create_task(post(client))
            await until(lambda: client.waits_for is not None)
            client._endpoints[0].held_until = 0.0  # it takes calls again, and the one that waits sleeps on
            monkeypatch.setattr(holds, "NOTED_SECONDS", 30.0)
            assert await post(client) == [GOOD]
            assert client.waits_for is None
            monkeypatch.setattr(holds, "NOTED_SECONDS", 0.0)
            assert client.waits_for is not None, "the last answer is long ago"
            waiting.cancel()
            await asyncio.wait([waiting])

        with_client(settings(server.url, retries=0, on_outage="wait"), run)


def test_a_call_that_a_server_has_taken_waits_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holds, "NOTED_SECONDS", 0.2)
    with FakeServer() as server:
        server.script.extend([limited(0.3), slow(0.5)])

        async def run(client: ServiceClient) -> None:
            call = asyncio.create_task(post(client))
            await until(lambda: client.waits_for is not None)
            await until(lambda: len(server.requests) == 2)
            assert client.waits_for is None
            assert server.in_flight == 1
            assert await call == [GOOD]

        with_client(settings(server.url, retries=0, on_outage="wait"), run)


def test_a_limit_without_a_time_is_tried_until_the_deadline() -> None:
    with FakeServer() as server:

        async def run(client: ServiceClient) -> None:
            server.script.extend([limited()] * 8)
            assert await post(client) == [GOOD]
            assert client.attempts == 9
            server.fault_every_time = limited()
            began = time.monotonic()
            [answer] = await post(client)
            assert isinstance(answer, Missing)
            assert answer.reason in (MissingReason.HTTP_STATUS, MissingReason.TIMEOUT), (
                "the last attempt may be cut short"
            )
            assert 1.5 < time.monotonic() - began < 3.0

        with_client(settings(server.url, timeout=2.0, retries=0), run)


def test_other_faults_use_up_the_retries_between_limits() -> None:
    with FakeServer() as server:
        server.script.extend([limited(), status(500), limited(), status(500)])

        async def run(client: ServiceClient) -> None:
            [answer] = await post(client)
            assert isinstance(answer, Missing)
            assert "500" in answer.detail
            assert "after 4 attempts" in answer.detail

        with_client(settings(server.url, retries=1), run)


@pytest.mark.parametrize("policy", ["skip", "wait"])
def test_a_server_that_asked_for_time_as_it_failed_is_no_way_out(policy: Literal["skip", "wait"]) -> None:
    with FakeServer() as asking, FakeServer() as other:
        asking.script.append(status(503, {"Retry-After": "60"}))

        async def run(client: ServiceClient) -> None:
            assert await post(client) == [GOOD]
            other.script.append(status(500))
            async with asyncio.timeout(3.0):
                assert await post(client) == [GOOD]
            assert len(asking.requests) == 1

        with_client(settings(asking.url, other.url, retries=3, on_outage=policy), run)


@pytest.mark.parametrize("policy", ["skip", "wait"])
def test_a_limit_of_one_server_drives_no_call_to_a_dead_one(policy: Literal["skip", "wait"]) -> None:
    with FakeServer() as dead, FakeServer() as narrow:
        dead.fault_every_time = hang
        taken = [0.0]

        async def one_at_a_time(request: web.Request) -> web.StreamResponse:
            wait = taken[-1] + 0.05 - time.monotonic()
            if wait > 0:
                return await limited(wait)(request)
            taken.append(time.monotonic())
            return await respond(GOOD)(request)

        narrow.fault_every_time = one_at_a_time

        async def run(client: ServiceClient) -> None:
            for _ in range(TRIP_FAILURES):
                client._endpoints[0].failed(0.0)
            assert await at_once(client, 6) == [GOOD] * 6
            assert dead.requests == []

        with_client(settings(dead.url, narrow.url, timeout=10.0, retries=0, on_outage=policy), run)


def test_calls_wait_for_the_server_that_asked_for_less_time() -> None:
    with FakeServer() as late, FakeServer() as soon:

        async def run(client: ServiceClient) -> None:
            now = asyncio.get_running_loop().time()
            for endpoint, seconds in zip(client._endpoints, (60.0, 0.2), strict=True):
                endpoint.hold(now, seconds)
            client._endpoints[1].calls = 1  # the other one would be chosen by its load
            assert await post(client) == [GOOD]
            assert late.requests == []

        with_client(settings(late.url, soon.url), run)


def test_calls_that_wait_look_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server may take calls long before the time that another one named is over."""
    monkeypatch.setattr(client_module, "LONGEST_NAP_SECONDS", 0.1)
    with FakeServer() as one, FakeServer() as two:

        async def run(client: ServiceClient) -> None:
            now = asyncio.get_running_loop().time()
            for endpoint in client._endpoints:
                endpoint.hold(now, 60.0)
            call = asyncio.create_task(post(client))
            await asyncio.sleep(0.3)
            assert not call.done()
            client._endpoints[1].held_until = now
            async with asyncio.timeout(2.0):
                assert await call == [GOOD]
            assert one.requests == []

        with_client(settings(one.url, two.url, timeout=0.5, on_outage="wait"), run)


@pytest.mark.parametrize("policy", ["skip", "stop"])
def test_nothing_waits_beyond_its_deadline_otherwise(policy: Literal["skip", "stop"]) -> None:
    with FakeServer() as server:
        server.script.append(limited(60.0))

        async def run(client: ServiceClient) -> None:
            began = time.monotonic()
            assert all(isinstance(answer, Missing) for answer in await post(client, 3))
            assert time.monotonic() - began < 2.0

        with_client(settings(server.url, on_outage=policy), run)
