"""Judging beside decoding and training, with a server of set speed: who waits for whom, and for how long.

Decoding and training only take time here, so that nothing but the waiting is measured.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import replace
from statistics import mean
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from aiohttp import web
from fake_server import FakeServer, Handler, chat_body, respond

from megatron_sip.config.groups import Config, DataConfig, JudgeConfig, PreferenceConfig, RolloutConfig, TrainingConfig
from megatron_sip.rollout.engine import OnWave, Rollouts, Sampling
from megatron_sip.services.hub import PreferenceServices
from megatron_sip.training import preferences
from megatron_sip.training.loop import Run
from megatron_sip.training.overlap import Overlap, lag_of
from megatron_sip.training.preferences import BegunBatch, PreferenceMaker, Preferences
from megatron_sip.types import Cut, Pair

SIZE, WAVES, ROLLOUTS, LENGTH = 4, 2, 3, 4
DECODING, TRAINING = 0.24, 0.16
POLICY = DECODING + TRAINING
"""Seconds of a step without its judges."""
STEPS = 4
CALLS = SIZE * ROLLOUTS * (ROLLOUTS - 1) // 2
"""Questions about one batch: all pairs."""


class Engine:
    """Writes two waves; notes when each was there."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.waves: list[float] = []

    def generate(
        self, prefixes: Sequence[Any], sample_indices: Sequence[int], sampling: Sampling, on_wave: OnWave
    ) -> Rollouts:
        count = sampling.num_rollouts
        tokens = torch.tensor(
            [[[1 + s % 7, 1 + k, 3, 4] for k in range(count)] for s in sample_indices], dtype=torch.int64
        )
        whole = Rollouts(tokens, torch.full(tokens.shape[:2], LENGTH))
        wave = len(prefixes) // WAVES
        for first in range(0, len(prefixes), wave):
            time.sleep(self.seconds / WAVES)
            self.waves.append(time.perf_counter())
            on_wave(first, Rollouts(tokens[first : first + wave], whole.lengths[first : first + wave]))
        return whole


class Judge:
    """Prefers the lower second token. It answers one call after the other and takes `seconds` for those of a batch;
    with `delay(number)` it answers all at once, each after so long."""

    def __init__(self, seconds: float, delay: Callable[[int], float] | None = None) -> None:
        self.seconds, self.delay = seconds, delay
        self.came: list[float] = []
        self.free_at = 0.0

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        now = time.perf_counter()
        self.came.append(now)
        if self.delay is not None:
            await asyncio.sleep(self.delay(len(self.came)))
        else:
            self.free_at = max(self.free_at, now) + self.seconds / CALLS
            await asyncio.sleep(self.free_at - now)
        first, second = re.findall(r"tokens [0-9 ]+", (await request.json())["messages"][0]["content"])
        answer: Handler = respond(chat_body(f"Conclusion: option {1 if first < second else 2}"))
        return await answer(request)


def config_of(url: str, lag: int) -> Config:
    return Config(
        training=TrainingConfig(global_batch_size=SIZE, train_iters=STEPS),
        data=DataConfig(suffix_length=LENGTH),
        rollout=RolloutConfig(num_rollouts=ROLLOUTS, rollout_batch_size=SIZE // WAVES),
        judge=JudgeConfig(judge_url=(url,), judge_timeout=20.0, judge_lag=lag),
        preference=PreferenceConfig(pool=("rollout",)),
    )


def maker_of(config: Config, services: PreferenceServices, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The maker of a run on one rank."""
    monkeypatch.setattr(preferences, "JudgeWatch", lambda *_: SimpleNamespace(check=lambda *_: None))

    def wait(future: Future[Any] | None, _trouble: object) -> Any:
        return None if future is None else future.result(30)

    parts: dict[str, Any] = {
        "world": SimpleNamespace(tp_size=1),
        "leader": SimpleNamespace(wait=wait, tell=lambda batch: batch),
        "boundaries": SimpleNamespace(stage=lambda *_: nullcontext()),
        "tokenizer": SimpleNamespace(
            eod=0, prefix_text=str, candidate_text=lambda _prefix, tokens: f"tokens {' '.join(map(str, tokens))}"
        ),
    }
    return PreferenceMaker(config, engine=engine, services=services, **parts)  # type: ignore[arg-type]


def cuts_at(iteration: int) -> list[Cut]:
    tokens = np.ones(LENGTH, dtype=np.int64)
    return [Cut(sample, sample, 4, tokens, tokens) for sample in range(iteration * SIZE, (iteration + 1) * SIZE)]


def run(config: Config, maker: PreferenceMaker, training: float) -> tuple[list[float], list[Preferences]]:
    """Steps as those of the loop: seconds of each, and its pairs."""
    overlap: Overlap[BegunBatch] = Overlap(lag_of(config), STEPS)
    seconds, made = [], []
    for iteration in range(STEPS):
        started = time.perf_counter()
        for coming in overlap.due(iteration):
            overlap.add(coming, maker.begin(cuts_at(coming), coming))
        made.append(maker.finish(overlap.take(iteration)))
        time.sleep(training)
        seconds.append(time.perf_counter() - started)
    return seconds, made


def timed(lag: int, judging: float, monkeypatch: pytest.MonkeyPatch) -> float:
    """Mean seconds of a usual step, neither the first nor the last, whose neighbours are missing."""
    judge = Judge(judging)
    with FakeServer() as server:
        server.fault_every_time = judge
        config = config_of(server.url, lag)
        with PreferenceServices(config, {}) as services:
            maker = maker_of(config, services, Engine(DECODING), monkeypatch)
            seconds, made = run(config, maker, TRAINING)
    assert len(judge.came) == STEPS * CALLS, "every pair is asked about once"
    assert all(item.batch.valid.tolist() == [1.0] * SIZE for item in made)
    return mean(seconds[1:-1])


@pytest.mark.parametrize("ratio", [0.1, 1.0, 4.0])
def test_a_step_takes_as_long_as_the_longer_of_policy_and_judge(ratio: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other programs may hold the processor up, so the best of three trials counts."""
    judging = ratio * POLICY
    least, seconds = max(POLICY, judging), float("inf")
    for _ in range(3):
        if seconds > 1.1 * least:
            seconds = min(seconds, timed(1, judging, monkeypatch))
    print(f"judge {ratio} x policy: a step takes {seconds / least:.3f} x the longer of both")
    assert 0.99 * least < seconds < 1.1 * least


def test_without_lag_a_step_takes_as_long_as_both_but_for_the_waves(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first wave is judged while the second is written."""
    both = POLICY + 0.9 * POLICY - DECODING / WAVES
    assert timed(0, 0.9 * POLICY, monkeypatch) > 0.97 * both


@pytest.mark.parametrize("lag", [0, 1])
def test_the_questions_of_a_wave_leave_while_the_next_is_written(lag: int, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, judge = Engine(0.6), Judge(0.0)
    with FakeServer() as server:
        server.fault_every_time = judge
        config = config_of(server.url, lag)
        with PreferenceServices(config, {}) as services:
            maker = maker_of(config, services, engine, monkeypatch)
            maker.finish(maker.begin(cuts_at(0), 0))
    first, second = engine.waves
    early = [came for came in judge.came if came < second - 0.1]
    assert len(early) == len(judge.came) // WAVES
    assert min(early) > first


@pytest.mark.parametrize("delay", [lambda number: 0.2 if number <= 6 else 0.0, lambda number: 0.01 * (number % 5)])
def test_pairs_do_not_depend_on_the_order_of_the_answers(delay: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first wave is answered last, and answers come in disorder."""
    found = []
    for judge in (Judge(0.0), Judge(0.0, delay)):
        with FakeServer() as server:
            server.fault_every_time = judge
            config = config_of(server.url, 1)
            with PreferenceServices(config, {}) as services:
                maker = maker_of(config, services, Engine(0.0), monkeypatch)
                found.append(run(config, maker, 0.0)[1])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one.batch.tokens, other.batch.tokens)
        assert one.pairs == other.pairs
        assert all(isinstance(pair, Pair) for pair in one.pairs)
        assert one.scores == other.scores
        assert [pool.sample_index for pool in one.pools] == [pool.sample_index for pool in other.pools]


@pytest.mark.parametrize(("kept", "taken"), [(ROLLOUTS, True), (ROLLOUTS + 1, False)])
def test_rollouts_of_a_checkpoint_are_told_as_taken_only_where_they_are(
    kept: int, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With another --num-rollouts than the run that saved them they are written anew."""
    written = Rollouts(torch.ones(SIZE, kept, LENGTH, dtype=torch.int64), torch.full((SIZE, kept), LENGTH))
    engine, said = Engine(0.0), list[str]()
    with FakeServer() as server:
        server.fault_every_time = Judge(0.0)
        config = config_of(server.url, 1)
        with PreferenceServices(config, {}) as services:
            run: Any = SimpleNamespace(
                config=config,
                course=SimpleNamespace(
                    progress=SimpleNamespace(iteration=2, consumed_samples=2 * SIZE), written=lambda *_: written
                ),
                upcoming=SimpleNamespace(take=lambda consumed: cuts_at(consumed // SIZE)),
                maker=maker_of(config, services, engine, monkeypatch),
                _reporter=lambda: SimpleNamespace(say=said.append),
            )
            batch = Run.begin(run, 2)
    assert (batch.rollouts is written, not engine.waves) == (taken, taken)
    [line] = said
    assert ("takes its rollouts from the checkpoint" in line) is taken


def test_a_batch_has_the_curriculum_of_the_iteration_that_trains_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With lag 1 it is begun an iteration earlier, where the schedule has fewer rollouts and a larger bonus."""
    schedule = PreferenceConfig(
        pool=("original", "rollout"),
        curriculum="schedule",
        curriculum_rollout_start=0,
        curriculum_rollout_ramp=STEPS - 1,
        curriculum_bonus=1.0,
        curriculum_bonus_iters=2 * STEPS,
    )
    found = []
    for lag in (0, 1):
        with FakeServer() as server:
            server.fault_every_time = Judge(0.0)
            config = replace(config_of(server.url, lag), preference=schedule)
            with PreferenceServices(config, {}) as services:
                found.append(run(config, maker_of(config, services, Engine(0.0), monkeypatch), 0.0)[1])
    for iteration, (one, other) in enumerate(zip(*found, strict=True)):
        assert [len(pool.candidates) for pool in one.pools] == [2 + (ROLLOUTS - 1) * iteration // (STEPS - 1)] * SIZE
        # The original wins all its comparisons, and has what is left of the bonus.
        assert [scores.total[0] for scores in one.scores if scores] == [2 - iteration / (2 * STEPS)] * SIZE
        assert one.pools == other.pools
        assert one.scores == other.scores
        assert one.pairs == other.pairs
