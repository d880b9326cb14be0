"""Few jobs at a time: equal ones once, and rounds in their order."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from megatron_sip.services.queueing import InTurn
from megatron_sip.services.single_flight import SingleFlight


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 10))


def test_equal_questions_under_way_are_asked_once() -> None:
    async def work() -> None:
        flights, asked, go = SingleFlight(), [], asyncio.Event()

        async def ask(name: str) -> str:
            asked.append(name)
            await go.wait()
            return f"answer {len(asked)}"

        tasks = [asyncio.ensure_future(flights.run(name, lambda name=name: ask(name))) for name in "aabab"]
        await asyncio.sleep(0.01)
        go.set()
        assert await asyncio.gather(*tasks) == ["answer 2"] * 5
        assert (asked, flights.shared) == (["a", "b"], 3)
        # Afterwards it is a new question.
        assert await flights.run("a", lambda: ask("a")) == "answer 3"

    run(work())


def test_who_is_cancelled_takes_nothing_from_the_others() -> None:
    async def work() -> None:
        flights, go, ended = SingleFlight(), asyncio.Event(), []

        async def ask() -> str:
            try:
                await go.wait()
            except asyncio.CancelledError:
                ended.append("cancelled")
                raise
            return "answer"

        first, second = (asyncio.ensure_future(flights.run("a", ask)) for _ in range(2))
        await asyncio.sleep(0.01)
        first.cancel()
        await asyncio.sleep(0.01)
        go.set()
        assert await second == "answer"
        assert first.cancelled()
        assert not ended
        # With the last one who waits, the question ends; the next asks anew.
        go.clear()
        alone = asyncio.ensure_future(flights.run("a", ask))
        await asyncio.sleep(0.01)
        alone.cancel()
        await asyncio.sleep(0.01)
        next_one = asyncio.ensure_future(flights.run("a", ask))
        await asyncio.sleep(0.01)
        assert ended == ["cancelled"]
        go.set()
        assert await next_one == "answer"

    run(work())


def test_a_failure_is_shared() -> None:
    async def work() -> None:
        flights = SingleFlight()

        async def fail() -> None:
            await asyncio.sleep(0.01)
            raise OSError("broken")

        found = await asyncio.gather(*(flights.run("a", fail) for _ in range(2)), return_exceptions=True)
        assert [str(item) for item in found] == ["broken", "broken"]

    run(work())


def test_rounds_begin_in_turn_within_one_limit() -> None:
    async def work() -> None:
        queue, begun, running, most = InTurn(3), [], 0, 0

        async def job(round_: int, number: int) -> tuple[int, int]:
            nonlocal running, most
            begun.append(round_)
            running += 1
            most = max(most, running)
            # The first job of each round is slow: it does not hold up the next round.
            await asyncio.sleep(0.2 if number == 0 else 0.002)
            running -= 1
            return round_, number

        async def one(round_: int) -> list[tuple[int, int]]:
            return await queue.place().run(job(round_, number) for number in range(8))

        loop = asyncio.get_running_loop()
        started = loop.time()
        results = await asyncio.gather(*(one(round_) for round_ in range(3)))
        assert results == [[(round_, number) for number in range(8)] for round_ in range(3)]
        assert begun == sorted(begun)
        assert most == 3
        assert loop.time() - started < 0.5, "the slow jobs overlap"

    run(work())


def test_a_round_that_is_cancelled_leaves_its_place() -> None:
    async def work() -> None:
        queue = InTurn(1)

        async def wait() -> None:
            await asyncio.Event().wait()

        async def quick() -> str:
            return "done"

        async def one(make: Any) -> list[Any]:
            return await queue.place().run(make() for _ in range(3))

        first, second = asyncio.ensure_future(one(wait)), asyncio.ensure_future(one(wait))
        last = asyncio.ensure_future(one(quick))
        await asyncio.sleep(0.01)
        assert not last.done()
        second.cancel()
        first.cancel()
        assert await last == ["done"] * 3

    run(work())


def test_a_failing_job_ends_its_round_and_leaves_room() -> None:
    async def work() -> None:
        queue = InTurn(1)

        async def fail() -> None:
            raise KeyError("unknown judge")

        async def succeed() -> str:
            return "done"

        with pytest.raises(KeyError, match="unknown judge"):
            await queue.place().run(fail() for _ in range(3))
        assert await queue.place().run(succeed() for _ in range(3)) == ["done"] * 3

    run(work())


def test_one_round_keeps_order_and_limit() -> None:
    async def work() -> None:
        running, most = 0, 0

        async def job(number: int) -> int:
            nonlocal running, most
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.001 * (number % 3))
            running -= 1
            return number

        assert await InTurn(4).place().run(job(number) for number in range(50)) == list(range(50))
        assert most == 4

    run(work())


def test_the_second_round_of_an_older_place_comes_before_the_first_of_a_younger_one() -> None:
    async def work() -> None:
        queue, begun = InTurn(2), []

        async def job(name: str) -> None:
            begun.append(name)
            await asyncio.sleep(0.005)

        async def older() -> None:
            place = queue.place()
            await place.run(job("older 1") for _ in range(2))
            await place.run(job("older 2") for _ in range(4))

        async def younger() -> None:
            await queue.place().run(job("younger") for _ in range(20))

        await asyncio.gather(older(), younger())
        # Nothing is interrupted: two of the younger begin while the older has nothing to ask.
        assert begun[:2] == ["older 1"] * 2
        assert sorted(begun[2:8]) == ["older 2"] * 4 + ["younger"] * 2
        assert begun[8:] == ["younger"] * 18

    run(work())
