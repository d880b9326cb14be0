"""Fleets of rollout servers for tests, and what servers write with the weights of a folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from fake_rollouts import FakeRolloutServer, logprobs_of, written_by
from transformers import LlamaForCausalLM

from megatron_sip.checkpoint.hf_config import model_config_from_hf
from megatron_sip.config.groups import RolloutConfig
from megatron_sip.rollout.delivery import ByFolder
from megatron_sip.rollout.engine import Sampling
from megatron_sip.rollout.fleet import RolloutFleet
from megatron_sip.rollout.proof import Probe, Weights
from megatron_sip.rollout.requests import plan_asks
from megatron_sip.rollout.server import Wanted
from megatron_sip.rollout.writing import Rows
from megatron_sip.services.settings import rollout_settings

SAMPLING = Sampling(num_rollouts=3, max_new_tokens=4, temperature=1.0, top_p=1.0, eod=0, stop_at_eod=False, seed=5)
ASKS = plan_asks([np.arange(3, 9), np.arange(20, 24)], [0, 1], SAMPLING)
PROBE = list(range(3, 19))


def weights(folder: Path, version: str) -> Weights:
    """As the policy would say of a folder that it exported."""
    model = LlamaForCausalLM.from_pretrained(folder, local_files_only=True)
    return Weights(version, folder, Probe(tuple(PROBE), tuple(logprobs_of(model, PROBE))), in_float32=True)


@contextmanager
def fleet_of(folder: Path, *servers: FakeRolloutServer, **wanted: Any) -> Iterator[RolloutFleet]:
    """A fleet over these servers, started.

    `urls` (of others), `retries`, `concurrency`, `timeout`, `thoroughly` and `delivery` may be given beside the fields
    of `Wanted`.
    """
    rollout = RolloutConfig(
        rollout_url=(*(one.url for one in servers), *wanted.pop("urls", ())),
        rollout_retries=wanted.pop("retries", 0),
        rollout_concurrency=wanted.pop("concurrency", 64),
        rollout_timeout=wanted.pop("timeout", 5.0),
    )
    thoroughly = wanted.pop("thoroughly", True)
    delivery = wanted.pop("delivery", ByFolder())
    model = model_config_from_hf(folder)
    own = replace(Wanted(model, 100, True, None, False), **wanted)
    fleet = RolloutFleet(rollout_settings(rollout), own, delivery, environ={})
    try:
        fleet.submit_start(thoroughly).result(30)
        yield fleet
    finally:
        fleet.close()


def rows_by(folder: Path) -> list[Rows]:
    """What a server writes with these weights."""
    model = LlamaForCausalLM.from_pretrained(folder, local_files_only=True)
    body = {"max_tokens": 4, "temperature": 1.0, "logit_bias": {"0": -100.0}}
    return [[tuple(written_by(model, list(ask.prefix), body, ask.seed + k)) for k in range(3)] for ask in ASKS]


def until(condition: Callable[[], Any], future: Future[Any]) -> None:
    """Wait for something that comes while `future` is under way."""
    deadline = time.monotonic() + 20
    while not condition():
        assert not future.done(), future.result()
        assert time.monotonic() < deadline
        time.sleep(0.02)
