"""What an engine measured is reported with the step that wrote, whichever step trains on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from fake_server import FakeServer
from test_overlap_time import SIZE, STEPS, Engine, Judge, config_of, cuts_at, maker_of, run

from megatron_sip.rollout.engine import OnWave, Rollouts, Sampling
from megatron_sip.rollout.pending import PendingBatch
from megatron_sip.services.hub import PreferenceServices
from megatron_sip.training.preferences import Preferences

NAME = "rollout/padding_share"


class Measuring(Engine):
    """Its first sample is the padding of a batch."""

    def generate(
        self, prefixes: Sequence[Any], sample_indices: Sequence[int], sampling: Sampling, on_wave: OnWave
    ) -> Rollouts:
        whole = super().generate(prefixes, sample_indices, sampling, on_wave)
        return replace(whole, metrics={NAME: (float(sample_indices[0]), 100.0)})


def steps(lag: int, monkeypatch: pytest.MonkeyPatch) -> list[Preferences]:
    with FakeServer() as server:
        server.fault_every_time = Judge(0.0)
        config = config_of(server.url, lag)
        with PreferenceServices(config, {}) as services:
            return run(config, maker_of(config, services, Measuring(0.0), monkeypatch), 0.0)[1]


def test_without_lag_a_step_reports_its_own_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [step.metrics[NAME] for step in steps(0, monkeypatch)]
    assert found == [(float(iteration * SIZE), 100.0) for iteration in range(STEPS)]


def test_with_lag_1_a_step_reports_the_batch_that_it_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step writes two, the last one none, of which nothing is known then."""
    found = [step.metrics.get(NAME) for step in steps(1, monkeypatch)]
    assert found == [(float(SIZE), 200.0), (2.0 * SIZE, 100.0), (3.0 * SIZE, 100.0), None]


def test_a_batch_of_a_checkpoint_is_not_reported_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step that wrote it did; the resumed one reports what it writes itself, as the unbroken one."""
    with FakeServer() as server:
        server.fault_every_time = Judge(0.0)
        config = config_of(server.url, 1)
        with PreferenceServices(config, {}) as services:
            maker = maker_of(config, services, Measuring(0.0), monkeypatch)
            samples = [cut.sample_index for cut in cuts_at(1)]
            begun = maker.begin(cuts_at(1), 1)
            kept = PendingBatch(tuple(samples), begun.rollouts)
            begun.cancel()
            resumed = maker_of(config, services, Measuring(0.0), monkeypatch)
            waiting = resumed.begin(cuts_at(1), 1, kept.of(samples))
            resumed.begin(cuts_at(2), 2).cancel()
            assert resumed.finish(waiting).metrics[NAME] == (2.0 * SIZE, 100.0)
