"""When an outage is declared, and who is looked after. Probes with fixed answers, no network."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from megatron_sip.services import circuit
from megatron_sip.services import health as health_module
from megatron_sip.services.circuit import FIRST_REST_SECONDS, Endpoint
from megatron_sip.services.health import Health

PROBE_SECONDS = 0.05


Said = str | Exception | None


class Probes:
    """Says of each server, by name, what stands first in its list, or raises it, and the last thing ever after."""

    def __init__(self, **said: list[Said]) -> None:
        self.said = said
        self.asked: list[str] = []

    async def __call__(self, endpoint: Endpoint) -> str | None:
        self.asked.append(endpoint.base)
        answers = self.said[endpoint.base]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        await asyncio.sleep(PROBE_SECONDS)
        if isinstance(answer, Exception):
            raise answer
        return answer


def watched(probes: Probes, action: Callable[[Health, list[Endpoint]], Awaitable[None]]) -> None:
    """Run `action` on the servers that `probes` knows."""

    async def run() -> None:
        endpoints = [Endpoint(name, name) for name in probes.said]
        health = Health(endpoints, probes, "--judge-url")
        try:
            await action(health, endpoints)
        finally:
            await health.close()

    asyncio.run(run())


@pytest.mark.parametrize(("said", "expected"), [("dead", True), (None, False)])
def test_an_answer_before_the_probes_is_no_sign_of_life(said: str | None, expected: bool) -> None:
    async def run(health: Health, endpoints: list[Endpoint]) -> None:
        health.worked(endpoints[0], asyncio.get_running_loop().time())
        await asyncio.sleep(0.01)
        assert await health.is_outage() is expected

    watched(Probes(a=[said]), run)


def test_a_server_that_answers_calls_and_no_probe_is_no_outage() -> None:
    """It is overloaded: its health is not told in time."""

    async def run(health: Health, endpoints: list[Endpoint]) -> None:
        found = asyncio.create_task(health.is_outage())
        while not found.done():
            await asyncio.sleep(PROBE_SECONDS / 5)
            health.worked(endpoints[0], asyncio.get_running_loop().time())
        assert not await found

    watched(Probes(a=["slow"]), run)


def test_the_last_answer_of_a_dying_server_hides_no_outage() -> None:
    async def run(health: Health, endpoints: list[Endpoint]) -> None:
        found = asyncio.create_task(health.is_outage())
        await asyncio.sleep(PROBE_SECONDS / 2)
        health.worked(endpoints[0], asyncio.get_running_loop().time())
        assert await found

    watched(Probes(a=["dead"]), run)


def test_probes_that_were_sent_before_a_call_failed_do_not_speak_for_it() -> None:
    probes = Probes(a=[None, "dead"])

    async def run(health: Health, _endpoints: list[Endpoint]) -> None:
        early = asyncio.create_task(health.is_outage())
        await asyncio.sleep(PROBE_SECONDS / 2)
        late = [asyncio.create_task(health.is_outage()) for _ in range(5)]
        assert not await early
        assert await asyncio.gather(*late) == [True] * 5
        assert probes.asked == ["a", "a"], "they share their probe"

    watched(probes, run)


def test_a_server_that_complains_at_the_roll_call_is_looked_after() -> None:
    """Nothing else would end its rest while calls go to the others."""
    probes = Probes(sick=["loading", "loading", None], well=[None])

    async def run(health: Health, endpoints: list[Endpoint]) -> None:
        assert not await health.is_outage()
        sick = endpoints[0]
        assert sick.resting
        for _ in range(100):
            await asyncio.sleep(FIRST_REST_SECONDS / 10)
            if not sick.resting:
                break
        assert not sick.resting
        assert probes.asked == ["sick", "well", "sick", "sick"]

    watched(probes, run)


def test_a_probe_that_raises_is_a_complaint_and_no_end_of_the_probes(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(circuit, "FIRST_REST_SECONDS", 0.02)
    probes = Probes(odd=[OverflowError("an odd header"), OverflowError("again"), None])

    async def run(health: Health, endpoints: list[Endpoint]) -> None:
        assert await health.is_outage()
        assert health.outage == "no server of --judge-url answers (odd: the probe failed with OverflowError)"
        async with asyncio.timeout(5.0):
            await health.wait()
        assert not endpoints[0].resting

    watched(probes, run)
    assert "an odd header" in caplog.text, "what it was is told"


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health_module, "LONGEST_PROBED_REST_SECONDS", 0.05)


@pytest.mark.usefixtures("often")
def test_a_shorter_rest_is_noticed_in_the_midst_of_a_longer_one() -> None:
    async def run(health: Health, endpoints: list[Endpoint]) -> None:
        [one] = endpoints
        now = asyncio.get_running_loop().time()
        one.rests = 10  # it has failed often, so that it rests for long
        health.failed(one, now)
        await asyncio.sleep(0.01)
        assert one.rests_until - now > 10.0
        health.worked(one, now)
        for _ in range(circuit.TRIP_FAILURES):
            health.failed(one, now)
        assert one.rests_until == now + FIRST_REST_SECONDS
        async with asyncio.timeout(5.0):
            while one.resting:
                await asyncio.sleep(0.01)
        assert asyncio.get_running_loop().time() - now >= FIRST_REST_SECONDS

    watched(Probes(a=[None]), run)


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("held", [False, True])
def test_an_outage_is_over_in_the_midst_of_a_long_rest(held: bool) -> None:
    probes = Probes(a=["away", None])

    async def run(health: Health, endpoints: list[Endpoint]) -> None:
        [one] = endpoints
        now = asyncio.get_running_loop().time()
        one.rests = 1 if held else 10
        health.failed(one, now)
        if held:
            one.hold(now, 60.0)
        await asyncio.sleep(0.2)
        assert probes.asked == [], "nobody waits for it"
        assert await health.is_outage()
        async with asyncio.timeout(5.0):
            await health.wait()
        assert not one.resting

    watched(probes, run)
