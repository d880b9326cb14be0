"""Prefixes are named as soon as all their rows are there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from megatron_sip.rollout.engine import Rollouts, Sampling
from megatron_sip.rollout.requests import Ask, halves_of, plan_asks
from megatron_sip.rollout.vllm import probe_text
from megatron_sip.rollout.waves import Waves, packed_rows, runs_of, unpacked
from megatron_sip.rollout.writing import Rows

SAMPLING = Sampling(num_rollouts=4, max_new_tokens=3, temperature=1.0, top_p=1.0, eod=0, stop_at_eod=True, seed=5)


def rows_for(ask: Ask) -> Rows:
    """Rows that tell whose they are; the last of a prefix is short."""
    rows = [(10 + ask.place, 20 + k, 1) for k in range(ask.first, ask.first + ask.count)]
    return [row[:2] if row[1] == 23 else row for row in rows]


def test_runs_of_neighbours() -> None:
    assert runs_of({0, 1, 4, 6, 7, 8}) == [(0, 2), (4, 5), (6, 9)]
    assert runs_of(set()) == []


def test_each_prefix_is_named_once_when_it_is_whole() -> None:
    whole = plan_asks([np.arange(3, 6)] * 4, [0, 1, 2, 3], SAMPLING)
    asks = [half for ask in whole for half in halves_of(ask)]
    heard: list[tuple[int, Rollouts]] = []
    waves = Waves(asks, SAMPLING, lambda first, rollouts: heard.append((first, rollouts)))
    for numbers, named in (([0, 4, 6], []), ([5, 7], [(2, 2)]), ([], []), ([1], [(0, 1)]), ([2, 3], [(1, 1)])):
        before = len(heard)
        waves.hear({number: rows_for(asks[number]) for number in numbers})
        assert [(first, len(rollouts.tokens)) for first, rollouts in heard[before:]] == named
    batch = unpacked(packed_rows(asks, [rows_for(ask) for ask in asks], 0, 4, SAMPLING))
    assert batch.lengths.tolist() == [[3, 3, 3, 2]] * 4
    assert batch.row(2, 3) == (12, 23)
    for first, rollouts in heard:
        assert torch.equal(rollouts.tokens, batch.tokens[first : first + len(rollouts.tokens)])
        assert torch.equal(rollouts.lengths, batch.lengths[first : first + len(rollouts.lengths)])


def test_a_greedy_row_stands_for_all() -> None:
    greedy = replace(SAMPLING, temperature=0.0)
    asks = plan_asks([np.arange(3, 6)], [0], greedy)
    heard: list[Rollouts] = []
    Waves(asks, greedy, lambda _first, rollouts: heard.append(rollouts)).hear({0: [(7, 8, 9)]})
    assert heard[0].tokens.tolist() == [[[7, 8, 9]] * 4]


def test_a_probe_of_prefixes_of_one_token() -> None:
    assert probe_text([np.array([5]), np.array([6])], 5) == (5, 6, 5, 6, 5)
    assert probe_text([np.arange(3), np.arange(10, 20)], 5) == (0, 1, 2, 10, 11)
    assert len(probe_text([np.array([5])], 64)) == 64
