"""Rounds of questions that are driven in the background: to their end, behind their rewrites, and given up."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from typing import Any

import pytest

from megatron_sip.services.rounds import gathered, run_rounds
from megatron_sip.types import Answers, Pool, Question

POOLS = [Pool(0, "prefix", "original", ()), Pool(1, "prefix", "original", ())]


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 10))


class ThreeRounds:
    """Asks about the first pool three times and about the second once."""

    def __init__(self, texts: Any = None) -> None:
        self.pools, self.texts = POOLS, texts
        self.threads: set[str] = set()

    def next(self, answers: Sequence[Answers]) -> list[list[Question]]:
        self.threads.add(threading.current_thread().name)
        done = len(answers[0])
        return [[Question("quality", done)] if done < 3 else [], [] if done else [Question("quality", 7)]]

    def result(self, answers: list[Answers]) -> tuple[Any, list[Answers]]:
        return self.texts, answers


async def ask(pools: list[Pool], questions: list[list[Question]]) -> list[Answers]:
    assert pools == POOLS
    return [{question: float(question.first) for question in group} for group in questions]


def test_it_asks_until_there_is_nothing_to_ask() -> None:
    rounds = ThreeRounds()
    texts, answers = run(run_rounds(lambda _: rounds, None, ask))
    assert texts is None
    assert [sorted(given.values()) for given in answers] == [[0.0, 1.0, 2.0], [7.0]]
    assert threading.current_thread().name not in rounds.threads, "plans hold up no call"


def test_it_begins_once_the_rewrites_are_there() -> None:
    rewrites: Future[Any] = Future()
    begun = threading.Event()

    def begin(texts: Any) -> ThreeRounds:
        begun.set()
        return ThreeRounds(texts)

    async def work() -> Any:
        task = asyncio.ensure_future(run_rounds(begin, rewrites, ask))
        await asyncio.sleep(0.05)
        assert not begun.is_set()
        rewrites.set_result(["a rewrite"])
        return await task

    assert run(work())[0] == ["a rewrite"]


def test_one_that_is_given_up_leaves_the_rewrites_to_the_others() -> None:
    rewrites: Future[Any] = Future()

    async def work() -> Any:
        tasks = [asyncio.ensure_future(run_rounds(ThreeRounds, rewrites, ask)) for _ in range(2)]
        await asyncio.sleep(0.02)
        tasks[0].cancel()
        await asyncio.sleep(0.02)
        rewrites.set_result(["a rewrite"])
        return await tasks[1]

    assert run(work())[0] == ["a rewrite"]


def test_all_results_in_order_or_the_first_error() -> None:
    async def work() -> None:
        futures: list[Future[int]] = [Future() for _ in range(3)]
        for number in (2, 0, 1):
            futures[number].set_result(number)
        assert await gathered(futures) == [0, 1, 2]
        failed: list[Future[int]] = [Future(), Future()]
        failed[1].set_exception(OSError("broken"))
        with pytest.raises(OSError, match="broken"):
            await gathered(failed)

    run(work())
