"""What is read and fetched ahead of the trainer: in order, bounded, and given up when the run goes back."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from fake_server import FakeServer, chat_body, respond

from megatron_sip.config.groups import Config, DataConfig, JudgeConfig, PreferenceConfig, RewriterConfig, TrainingConfig
from megatron_sip.services.hub import PreferenceServices
from megatron_sip.training.preferences import PreferenceMaker
from megatron_sip.training.upcoming import Upcoming
from megatron_sip.types import Cut, Missing

SIZE = 2


class Recorder:
    """A maker that only notes what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []
        self.forgotten = 0

    def prefetch(self, cuts: Sequence[Cut], iteration: int) -> None:
        self.asked.append((iteration, cuts[0].sample_index))

    def forget(self) -> None:
        self.forgotten += 1


def cuts_at(consumed: int) -> list[Cut]:
    tokens = np.arange(4, dtype=np.int64)
    return [Cut(sample, sample, 4, tokens, tokens) for sample in range(consumed, consumed + SIZE)]


def config_of(ahead: int, iterations: int, url: str = "http://127.0.0.1:9/v1", concurrency: int = 4) -> Config:
    return Config(
        training=TrainingConfig(global_batch_size=SIZE, train_iters=iterations, objective="sft-rewrite"),
        data=DataConfig(suffix_length=4),
        judge=JudgeConfig(judge_url=(url,), judge_concurrency=concurrency, judge_timeout=20.0),
        preference=PreferenceConfig(pool=("original", "rewrite")),
        rewriter=RewriterConfig(rewrite_ahead=ahead),
    )


def steps(upcoming: Upcoming, first: int, last: int) -> list[int]:
    """Take and read on as the loop does; the first sample of each iteration."""
    taken = []
    for iteration in range(first, last):
        taken.append(upcoming.take(iteration * SIZE)[0].sample_index)
        upcoming.read_on(iteration + 1, (iteration + 1) * SIZE)
    return taken


@pytest.mark.parametrize("ahead", [1, 3, 100])
def test_each_batch_is_read_once_and_at_most_so_many_are_held(ahead: int) -> None:
    reads: list[int] = []
    maker = Recorder()

    def read(consumed: int) -> list[Cut]:
        reads.append(consumed)
        return cuts_at(consumed)

    upcoming = Upcoming(config_of(ahead, iterations=6), maker, read)  # type: ignore[arg-type]
    held = []
    for iteration in range(6):
        assert upcoming.take(iteration * SIZE)[0].sample_index == iteration * SIZE
        upcoming.read_on(iteration + 1, (iteration + 1) * SIZE)
        held.append(len(reads) - iteration - 1)
    assert reads == [iteration * SIZE for iteration in range(6)], "in order, once, and none beyond the end"
    assert held == [min(ahead, 5 - iteration) for iteration in range(6)]
    # The first iteration asks for its own rewrites.
    assert maker.asked == [(iteration, iteration * SIZE) for iteration in range(1, 6)]


def test_without_rewrites_nothing_but_the_next_batch_is_read() -> None:
    config = Config(
        training=TrainingConfig(global_batch_size=SIZE, train_iters=9), rewriter=RewriterConfig(rewrite_ahead=5)
    )
    reads: list[int] = []
    upcoming = Upcoming(config, Recorder(), lambda consumed: reads.append(consumed) or cuts_at(consumed))  # type: ignore[arg-type, func-returns-value]
    steps(upcoming, 0, 2)
    assert reads == [0, SIZE, 2 * SIZE]


def test_a_run_that_goes_back_reads_anew() -> None:
    maker, offset = Recorder(), 0
    upcoming = Upcoming(config_of(3, iterations=9), maker, lambda consumed: cuts_at(consumed + offset))  # type: ignore[arg-type]
    assert steps(upcoming, 0, 3) == [0, 2, 4]
    upcoming.forget()
    offset = 100  # the rollback leaves samples out
    assert steps(upcoming, 1, 3) == [102, 104]
    assert maker.forgotten == 1
    assert maker.asked[-4:] == [(2, 104), (3, 106), (4, 108), (5, 110)]


class Waiter:
    """The leader of a run on one rank, with the seconds that it waited."""

    def __init__(self) -> None:
        self.waits: list[float] = []

    def wait(self, future: Future[Any] | None) -> Any:
        started = time.perf_counter()
        result = None if future is None else future.result(20)
        self.waits.append(time.perf_counter() - started)
        return result


class Halting:
    """A rewriter that answers at once until `stop_before` calls, and then not before it is let go."""

    def __init__(self, calls: int) -> None:
        self.left, self.go, self.seen = calls, threading.Event(), 0

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        self.seen += 1
        if self.seen > self.left:
            await asyncio.to_thread(self.go.wait, 20)
        return await respond(chat_body(f"rewrite {self.seen}"))(request)


def maker_of(config: Config, services: PreferenceServices) -> PreferenceMaker:
    tokenizer: Any = SimpleNamespace(prefix_text=str, candidate_text=lambda prefix, suffix: f"{prefix} {suffix}")
    nothing: Any = SimpleNamespace(world=SimpleNamespace(control_group=None))
    return PreferenceMaker(config, nothing, nothing, nothing, tokenizer, nothing, services)


def prefetched(cut_batch: list[Cut], maker: PreferenceMaker, leader: Waiter, iteration: int) -> list[str | Missing]:
    """As `PreferenceMaker.make` gets the rewrites of its iteration."""
    maker.prefetch(cut_batch, iteration)
    found: list[str | Missing] = leader.wait(maker._rewrites.pop(iteration))
    return found


def distinct_cuts(consumed: int) -> list[Cut]:
    return [
        Cut(sample, sample, 4, np.asarray([sample] * 4, dtype=np.int64), np.asarray([sample] * 4, dtype=np.int64))
        for sample in range(consumed, consumed + SIZE)
    ]


def test_the_trainer_waits_only_when_the_rewriter_is_behind_by_all_of_them() -> None:
    ahead = 3
    # Batches 0 to 4 get their rewrites; the one of iteration 5 waits until it is let go.
    rewriter = Halting(calls=5 * SIZE)
    with FakeServer() as server:
        server.fault_every_time = rewriter
        config = config_of(ahead, iterations=9, url=server.url)
        with PreferenceServices(config, {}) as services:
            maker, leader = maker_of(config, services), Waiter()
            upcoming = Upcoming(config, maker, distinct_cuts)
            for iteration in range(9):
                if iteration == 5:
                    assert rewriter.seen <= 5 * SIZE + 4, "no more calls than --judge-concurrency are under way"
                    assert len(maker._rewrites) == ahead
                    threading.Timer(2.0, rewriter.go.set).start()
                found = prefetched(upcoming.take(iteration * SIZE), maker, leader, iteration)
                assert all(isinstance(text, str) for text in found)
                upcoming.read_on(iteration + 1, (iteration + 1) * SIZE)
                time.sleep(0.05)  # the trainer trains
    assert leader.waits[5] > 1.5
    # Iterations 3 and 4 were made while the rewriter stood still since iteration 2.
    assert max(leader.waits[1:5]) < 1.0, leader.waits
    assert max(leader.waits[6:]) < 1.0, leader.waits
    assert rewriter.seen == 9 * SIZE
