"""Several servers of one service: failover, rests, probes, Retry-After, copies of slow calls, connections."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest
from aiohttp import web
from fake_server import FakeServer, Handler, chat_body, drip, hang, raw, redirect, reset, respond, status
from test_services_client import KEY, settings, unused_port

from megatron_sip.errors import ConfigError
from megatron_sip.services import client as client_module
from megatron_sip.services.circuit import FIRST_REST_SECONDS, TRIP_FAILURES
from megatron_sip.services.client import ServiceClient
from megatron_sip.services.endpoint import ClientSettings
from megatron_sip.services.hedging import HEDGED_SHARE
from megatron_sip.types import Missing, MissingReason

T = TypeVar("T")
GOOD = chat_body("Conclusion: option 1")


def with_client(config: ClientSettings, action: Callable[[ServiceClient], Awaitable[T]]) -> T:
    """What `action` gives with an open client."""

    async def run() -> T:
        client = ServiceClient(config, {"JUDGE_API_KEY": KEY})
        await client.open()
        try:
            result = await action(client)
        finally:
            await client.close()
        assert len(asyncio.all_tasks()) == 1, "no probe outlives its client"
        return result

    return asyncio.run(run())


async def post(client: ServiceClient, times: int = 1) -> list[dict[str, Any] | Missing]:
    """`times` calls one after the other."""
    return [await client.post("/chat/completions", {"messages": []}) for _ in range(times)]


async def at_once(client: ServiceClient, calls: int) -> list[dict[str, Any] | Missing]:
    return list(await asyncio.gather(*(client.post("/chat/completions", {"messages": []}) for _ in range(calls))))


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        await asyncio.sleep(0.01)


def slow(seconds: float) -> Handler:
    """A good answer that takes its time."""

    async def handle(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(seconds)
        return await respond(GOOD)(request)

    return handle


@pytest.mark.parametrize("fault", [status(500), reset, raw(b"{"), status(429)])
def test_a_server_that_fails_costs_no_verdict_while_another_is_well(fault: Handler) -> None:
    with FakeServer() as bad, FakeServer() as good:
        bad.fault_every_time = fault

        async def run(client: ServiceClient) -> None:
            assert await at_once(client, 60) == [GOOD] * 60
            assert client.calls == 60
            assert client.attempts == 60 + len(bad.requests)

        with_client(settings(bad.url, good.url, retries=1, concurrency=10), run)
        assert len(good.requests) == 60


@pytest.mark.parametrize("fault", [status(401), status(403), status(404), status(405), status(501), redirect("/x")])
def test_a_server_that_refuses_everything_costs_no_verdict_and_draws_few_calls(fault: Handler) -> None:
    """It refuses at once, so it is always the least loaded one."""
    with FakeServer() as wrong, FakeServer() as good:
        wrong.fault_every_time, good.fault_every_time = fault, slow(0.02)

        async def run(client: ServiceClient) -> None:
            assert await at_once(client, 200) == [GOOD] * 200
            assert len(good.requests) == 200
            assert len(wrong.requests) <= 15, "those of the first moment, and a trial after each rest"
            wrong.fault_every_time = None
            await until(lambda: not client._endpoints[0].resting)
            while client._endpoints[0].tripped:
                assert await post(client) == [GOOD]

        with_client(settings(wrong.url, good.url, retries=1, concurrency=10), run)


def test_a_call_that_one_server_refuses_waits_for_the_other() -> None:
    with FakeServer() as wrong, FakeServer() as good:
        wrong.fault_every_time = status(404)
        good.script.append(status(429, {"Retry-After": "0.3"}))

        async def run(client: ServiceClient) -> None:
            client._endpoints[0].calls = 1  # the good one is asked first
            assert await post(client) == [GOOD]
            assert len(wrong.requests) == 1

        with_client(settings(wrong.url, good.url, retries=2), run)


def test_a_call_that_all_servers_refuse_is_missing_at_once() -> None:
    with FakeServer() as one, FakeServer() as two:
        one.fault_every_time = two.fault_every_time = status(401)

        async def run(client: ServiceClient) -> None:
            for answer in await post(client, 3):
                assert isinstance(answer, Missing)
                assert "401" in answer.detail
            assert client.attempts == 6, "each is asked once for each call"
            one.fault_every_time = two.fault_every_time = None
            assert await post(client, 3) == [GOOD] * 3

        with_client(settings(one.url, two.url, retries=5), run)


@pytest.mark.parametrize("code", [400, 413, 422])
def test_a_question_that_no_server_can_take_rests_none(code: int) -> None:
    with FakeServer() as one, FakeServer() as two:
        one.fault_every_time = two.fault_every_time = status(code)

        async def run(client: ServiceClient) -> None:
            await post(client, 10)
            assert client.attempts == 10
            assert not any(endpoint.resting for endpoint in client._endpoints)

        with_client(settings(one.url, two.url, retries=5), run)


def test_servers_without_tokenize_are_not_put_to_rest_by_the_check() -> None:
    with FakeServer(tokenize=False) as one, FakeServer(tokenize=False) as two:

        async def run(client: ServiceClient) -> None:
            assert not (await client.check()).has_tokenize
            assert not any(endpoint.resting for endpoint in client._endpoints)

        with_client(settings(one.url, two.url), run)


def test_an_open_circuit_is_left_alone_and_closes_after_recovery() -> None:
    with FakeServer() as flaky, FakeServer() as good:
        flaky.fault_every_time = flaky.health_handler = status(500)

        async def run(client: ServiceClient) -> None:
            await at_once(client, 40)
            assert len(flaky.requests) >= TRIP_FAILURES
            before = len(flaky.requests)
            await until(lambda: flaky.probes >= 2)
            assert await post(client, 20) == [GOOD] * 20
            assert len(flaky.requests) == before, "no call went to a server that fails its probes"
            assert good.probes == 0, "a server that works is not probed"
            flaky.fault_every_time = flaky.health_handler = None
            probes = flaky.probes
            await until(lambda: flaky.probes > probes)
            await until(lambda: not client._endpoints[0].resting)
            assert client._endpoints[0].tripped, "half-open: only a call closes it"
            while client._endpoints[0].tripped:
                assert await at_once(client, 2) == [GOOD] * 2
            before = len(flaky.requests)
            await at_once(client, 40)
            assert len(flaky.requests) - before >= 10, "it takes its share again"
            probes = flaky.probes
            await asyncio.sleep(2 * FIRST_REST_SECONDS)
            assert flaky.probes == probes, "and is not probed any more"

        with_client(settings(flaky.url, good.url, retries=2, concurrency=20), run)


def test_half_open_lets_one_call_through() -> None:
    with FakeServer() as flaky, FakeServer() as good:
        flaky.fault_every_time = status(500)

        async def run(client: ServiceClient) -> None:
            await at_once(client, 40)
            before = len(flaky.requests)
            flaky.fault_every_time = hang
            await until(lambda: not client._endpoints[0].resting)
            good.fault_every_time = slow(0.05)
            calls = asyncio.create_task(at_once(client, 60))
            await until(lambda: len(good.requests) > 80)
            assert len(flaky.requests) == before + 1
            calls.cancel()
            await asyncio.wait([calls])

        with_client(settings(flaky.url, good.url, retries=2, concurrency=20), run)


def test_half_open_lets_one_call_of_a_burst_through_where_copies_are_asked_for() -> None:
    with FakeServer() as flaky, FakeServer() as good:
        flaky.fault_every_time = status(500)

        async def run(client: ServiceClient) -> None:
            await at_once(client, 40)
            before = len(flaky.requests)
            flaky.fault_every_time = slow(0.1)
            await until(lambda: not client._endpoints[0].resting)
            assert await at_once(client, 20) == [GOOD] * 20
            assert len(flaky.requests) == before + 1

        with_client(settings(flaky.url, good.url, retries=2, concurrency=20, hedge_after=2.0), run)


@pytest.mark.parametrize("hedge_after", [None, 2.0])
def test_a_burst_is_spread_over_the_servers(hedge_after: float | None) -> None:
    """Each call must see the choice of the one before, though none of them has begun."""
    with FakeServer() as one, FakeServer() as two:
        one.fault_every_time = two.fault_every_time = slow(0.1)

        async def run(client: ServiceClient) -> None:
            assert await at_once(client, 20) == [GOOD] * 20
            assert (len(one.requests), len(two.requests)) == (10, 10)
            calls = asyncio.create_task(at_once(client, 20))
            await asyncio.sleep(0)  # the calls are made
            await asyncio.sleep(0)  # and have chosen, but not begun
            assert [endpoint.in_flight for endpoint in client._endpoints] == [10, 10]
            calls.cancel()
            await asyncio.wait([calls])
            assert [endpoint.in_flight for endpoint in client._endpoints] == [0, 0]

        with_client(settings(one.url, two.url, concurrency=20, hedge_after=hedge_after), run)


def test_a_server_without_health_is_asked_for_its_models() -> None:
    with FakeServer() as server, FakeServer() as other:
        server.fault_every_time, server.health_handler = status(500), status(404)
        models = []

        async def count(request: web.Request) -> web.StreamResponse:
            models.append(request.headers["Authorization"])
            return await respond({"data": []})(request)

        server.models_handler = count

        async def run(client: ServiceClient) -> None:
            await at_once(client, 20)
            await until(lambda: bool(models) and not client._endpoints[0].resting)

        with_client(settings(server.url, other.url, retries=1), run)
        assert models[0] == f"Bearer {KEY}"


def test_retry_after_moves_calls_to_other_servers() -> None:
    with FakeServer() as limited, FakeServer() as other:
        limited.script.append(status(429, {"Retry-After": "1"}))
        other.fault_every_time = slow(0.02)

        async def run(client: ServiceClient) -> None:
            began = time.monotonic()
            while time.monotonic() - began < 0.7:
                assert await at_once(client, 8) == [GOOD] * 8
            assert len(limited.requests) <= 8, "those that were under way"
            await asyncio.sleep(0.5)
            before = len(limited.requests)
            assert await at_once(client, 8) == [GOOD] * 8
            assert len(limited.requests) == before + 4

        with_client(settings(limited.url, other.url, retries=1, concurrency=8), run)


@pytest.mark.parametrize("code", [429, 503])
def test_with_one_server_later_calls_wait_for_it_too(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that were not turned away themselves, and within their deadline."""
    monkeypatch.setattr(client_module, "SPREAD_SECONDS", 0.05)
    with FakeServer() as server:
        server.script.append(status(code, {"Retry-After": "1"}))

        async def run(client: ServiceClient) -> None:
            began = time.monotonic()
            assert await post(client) == [GOOD]
            assert await at_once(client, 5) == [GOOD] * 5
            assert 1.0 <= time.monotonic() - began < 3.0
            assert len(server.requests) == 7
            server.script.append(status(code, {"Retry-After": "60"}))
            began = time.monotonic()
            refused = await post(client, 2)
            assert time.monotonic() - began < 1.0, "a wait beyond the deadline is not begun"
            assert len(server.requests) == 8, "the second was not even sent"
            assert [answer.reason for answer in refused if isinstance(answer, Missing)] == [
                MissingReason.HTTP_STATUS
            ] * 2
            assert "left alone for" in str(refused[1])

        with_client(settings(server.url, retries=1), run)


def test_a_slow_call_gets_a_copy_on_another_server() -> None:
    with FakeServer() as slow_one, FakeServer() as other:
        slow_one.fault_every_time = hang

        async def run(client: ServiceClient) -> None:
            began = time.monotonic()
            assert await post(client) == [GOOD]
            assert 0.2 <= time.monotonic() - began < 1.0
            assert (client.calls, client.attempts, client.hedges) == (1, 2, 1)
            await until(lambda: slow_one.in_flight == 0)  # the loser's connection was closed
            assert [endpoint.in_flight for endpoint in client._endpoints] == [0, 0]

        with_client(settings(slow_one.url, other.url, hedge_after=0.2, timeout=20.0), run)


def test_with_one_server_the_copy_goes_there_again() -> None:
    with FakeServer() as server:
        server.script.append(hang)

        async def run(client: ServiceClient) -> None:
            assert await post(client) == [GOOD]
            assert (client.calls, client.attempts, client.hedges) == (1, 2, 1)

        with_client(settings(server.url, hedge_after=0.2, timeout=20.0), run)


def test_an_overloaded_server_is_not_doubled() -> None:
    with FakeServer() as server:
        server.fault_every_time = slow(0.1)

        async def run(client: ServiceClient) -> None:
            assert await at_once(client, 200) == [GOOD] * 200
            assert client.calls == 200
            assert 1 <= client.hedges <= HEDGED_SHARE * 200
            assert client.attempts == 200 + client.hedges

        with_client(settings(server.url, hedge_after=0.02, concurrency=50, timeout=60.0), run)


def test_a_copy_that_fails_takes_nothing_from_its_call() -> None:
    with FakeServer() as slow_one, FakeServer() as other:
        slow_one.fault_every_time, other.fault_every_time = slow(0.3), status(500)

        async def run(client: ServiceClient) -> None:
            assert await post(client) == [GOOD]

        with_client(settings(slow_one.url, other.url, hedge_after=0.05), run)


def test_a_thousand_calls_use_no_more_connections_than_are_in_flight() -> None:
    with FakeServer() as server:

        async def run(client: ServiceClient) -> None:
            assert await at_once(client, 1000) == [GOOD] * 1000

        with_client(settings(server.url, concurrency=8, timeout=60.0), run)
        assert len(server.requests) == 1000
        assert len(server.peers) <= 8


@pytest.mark.parametrize("fault", [reset, hang, drip, status(500)])
def test_a_fault_costs_only_its_own_connection(fault: Handler) -> None:
    with FakeServer() as server:

        async def run(client: ServiceClient) -> None:
            for _ in range(5):
                server.script.append(fault)
                assert (await post(client, 3))[1:] == [GOOD] * 2

        with_client(settings(server.url, timeout=0.3), run)
        assert len(server.peers) <= 6


@pytest.mark.parametrize("again", ["http://a:1/v1", " http://a:1/v1/ ", "http://a:1"])
def test_a_server_is_named_once(again: str) -> None:
    with pytest.raises(ConfigError, match="--judge-url names http://a:1/v1 more than once"):
        ServiceClient(settings("http://a:1/v1", "http://b:1/v1", again))


def test_two_dead_servers_end_within_the_retries() -> None:
    dead = [f"http://127.0.0.1:{unused_port()}/v1" for _ in range(2)]

    async def run(client: ServiceClient) -> None:
        [answer] = await post(client)
        assert isinstance(answer, Missing)
        assert answer.reason is MissingReason.CONNECTION
        assert client.attempts == 4

    with_client(settings(*dead, retries=3), run)
