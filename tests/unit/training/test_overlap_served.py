"""Questions about rollouts that servers write leave prefix by prefix."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_rollouts import FakeRolloutServer, make_llama
from fake_server import FakeServer
from rollout_fleets import fleet_of, weights
from test_overlap_time import CALLS, SIZE, Engine, Judge, config_of, cuts_at, maker_of

from megatron_sip.rollout.engine import OnWave, Rollouts, Sampling
from megatron_sip.rollout.fleet import RolloutFleet
from megatron_sip.rollout.proof import Weights
from megatron_sip.rollout.requests import plan_asks
from megatron_sip.rollout.waves import Waves, packed_rows, unpacked
from megatron_sip.services.hub import PreferenceServices


class Served:
    """Rollouts of a fleet, on one rank."""

    def __init__(self, fleet: RolloutFleet, weights: Weights) -> None:
        self.fleet, self.weights = fleet, weights

    def generate(
        self, prefixes: Sequence[Any], sample_indices: Sequence[int], sampling: Sampling, on_wave: OnWave
    ) -> Rollouts:
        asks = plan_asks(prefixes, sample_indices, sampling)
        hear = Waves(asks, sampling, on_wave).hear
        rows = self.fleet.submit_rollouts(asks, sampling, self.weights, hear).result(60)
        return unpacked(packed_rows(asks, rows, 0, len(prefixes), sampling))


@pytest.mark.parametrize("slow", [0, SIZE - 1])
def test_a_slow_prefix_holds_up_nobodys_questions(slow: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rollouts are written when the judge was asked everything about the others, and not before."""
    folder, judge = make_llama(tmp_path / "hf", num_hidden_layers=1), Judge(0.0)
    cuts = [replace(cut, prefix=np.array([3 + place, 40, 41])) for place, cut in enumerate(cuts_at(0))]

    async def pause(prompt: list[int]) -> None:
        while prompt[0] == 3 + slow and len(judge.came) < CALLS // SIZE * (SIZE - 1):
            await asyncio.sleep(0.01)

    with FakeServer() as judges, FakeRolloutServer(folder) as writer, fleet_of(folder, writer) as fleet:
        judges.fault_every_time = judge
        now = weights(folder, "run-1")
        fleet.submit_push(now).result(60)
        writer.pause = pause
        config = config_of(judges.url, 0)
        with PreferenceServices(config, {}) as services:
            maker = maker_of(config, services, Served(fleet, now), monkeypatch)  # type: ignore[arg-type]
            begun = maker.begin(cuts, 0)
            made = maker.finish(begun)
    assert len(judge.came) == CALLS
    assert [pool.sample_index for pool in made.pools] == [cut.sample_index for cut in cuts]
    for place, pool in enumerate(made.pools):
        assert [tuple(one.tokens) for one in pool.candidates] == [begun.rollouts.row(place, k) for k in range(3)]


class Backwards(Engine):
    """Names its waves from the last to the first."""

    def generate(
        self, prefixes: Sequence[Any], sample_indices: Sequence[int], sampling: Sampling, on_wave: OnWave
    ) -> Rollouts:
        waves: list[tuple[int, Rollouts]] = []
        whole = super().generate(prefixes, sample_indices, sampling, lambda *wave: waves.append(wave))
        for first, rollouts in reversed(waves):
            on_wave(first, rollouts)
        return whole


def test_waves_may_come_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for engine in (Engine(0.0), Backwards(0.0)):
        with FakeServer() as server:
            server.fault_every_time = Judge(0.0)
            config = config_of(server.url, 0)
            with PreferenceServices(config, {}) as services:
                maker = maker_of(config, services, engine, monkeypatch)
                made.append(maker.finish(maker.begin(cuts_at(0), 0)))
    one, other = made
    assert [pool.sample_index for pool in one.pools] == [pool.sample_index for pool in other.pools]
    assert one.pairs == other.pairs
    assert torch.equal(one.batch.tokens, other.batch.tokens)
