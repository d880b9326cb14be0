"""Requests to a rollout server and what is taken from its answers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megatron_sip.rollout.engine import Sampling
from megatron_sip.rollout.requests import halves_of, plan_asks, prefix_seed, probe_logprobs, request_body, rows_of

SAMPLING = Sampling(num_rollouts=3, max_new_tokens=4, temperature=0.7, top_p=0.9, eod=0, stop_at_eod=False, seed=11)
PREFIX = np.array([5, 6, 7])
(ASK,) = plan_asks([PREFIX], [40], SAMPLING)


def test_a_request_says_all_that_a_server_could_set_otherwise() -> None:
    body = request_body(ASK, SAMPLING, "policy", "run-1")
    assert body["prompt"] == [5, 6, 7]
    assert (body["n"], body["max_tokens"], body["temperature"], body["top_p"]) == (3, 4, 0.7, 0.9)
    assert (body["top_k"], body["min_p"], body["repetition_penalty"]) == (0, 0.0, 1.0)
    assert (body["presence_penalty"], body["frequency_penalty"]) == (0.0, 0.0)
    assert body["ignore_eos"] is True
    assert body["cache_salt"] == "run-1"
    assert body["logit_bias"] == {"0": -100.0}
    assert "stop_token_ids" not in body
    ending = request_body(ASK, replace(SAMPLING, stop_at_eod=True), "policy", "run-1")
    assert ending["stop_token_ids"] == [0]
    assert "logit_bias" not in ending


def test_seeds_depend_on_seed_and_sample_alone() -> None:
    prefixes = [PREFIX, PREFIX, PREFIX]
    asks = plan_asks(prefixes, [8, 40, 9], SAMPLING)
    assert asks[1].seed == ASK.seed == prefix_seed(11, 40)
    assert len({ask.seed + k for ask in asks for k in range(3)}) == 9
    assert prefix_seed(12, 40) != ASK.seed
    assert all(0 <= ask.seed < 2**62 for ask in asks)


def test_many_long_rollouts_are_asked_for_in_parts_with_the_same_seeds() -> None:
    many = replace(SAMPLING, num_rollouts=64, max_new_tokens=1000)
    parts = plan_asks([np.arange(1, 3001)], [40], many)
    assert len(parts) > 1
    assert [ask.seed - ask.first for ask in parts] == [prefix_seed(11, 40)] * len(parts)
    assert [k for ask in parts for k in range(ask.first, ask.first + ask.count)] == list(range(64))


def test_the_halves_of_a_request_are_the_same_rollouts() -> None:
    first, second = halves_of(replace(ASK, first=2, count=5, seed=9))
    assert (first.first, first.count, first.seed) == (2, 2, 9)
    assert (second.first, second.count, second.seed) == (4, 3, 11)
    assert first.prefix == second.prefix == ASK.prefix


def test_a_greedy_rollout_is_asked_for_once() -> None:
    (ask,) = plan_asks([PREFIX], [40], replace(SAMPLING, temperature=0.0))
    assert ask.count == 1


def choice(index: int, tokens: list[Any], **other: Any) -> dict[str, Any]:
    return {"index": index, "token_ids": tokens, "prompt_token_ids": [5, 6, 7], "finish_reason": "length", **other}


GOOD = [[1, 2, 3, 4], [9, 9, 9, 9], [4, 3, 2, 1]]


def test_rows_come_in_the_order_of_their_index() -> None:
    choices = [choice(index, GOOD[index]) for index in (2, 0, 1)]
    assert rows_of({"choices": choices}, ASK, SAMPLING, 10) == [tuple(row) for row in GOOD]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (choice(1, [1, 2, 3]), "3 tokens where 4 were asked for"),
        (choice(1, [1, 2, 3, 4, 5]), "5 tokens where 4"),
        (choice(1, [1, 2, 3, 10]), "token id 10"),
        (choice(1, [1, 2, 3, -1]), "token id -1"),
        (choice(1, [1, 0, 3, 4]), "end of document"),
        (choice(1, [1, 2, 3, 0]), "end of document"),
        (choice(1, [1, 2, 3, True]), "no token ids"),
        (choice(1, [1, 2, 3, 4], token_ids=None), "no token ids"),
        (choice(1, [1, 2, 3, 4], prompt_token_ids=[1, 5, 6, 7]), "prompt's own token ids"),
        (choice(2, [1, 2, 3, 4]), "3 continuations where 3"),
        ({**choice(1, [1, 2, 3, 4]), "index": [1]}, "3 continuations where 3"),
        ({**choice(1, [1, 2, 3, 4]), "index": True}, "3 continuations where 3"),
        (None, "2 continuations where 3"),
        ("no object", "no choices"),
    ],
)
def test_what_is_no_row_of_the_policy_is_refused(row: Any, why: str) -> None:
    choices = [choice(0, GOOD[0]), row, choice(2, GOOD[2])]
    found = rows_of({"choices": [one for one in choices if one is not None]}, ASK, SAMPLING, 10)
    assert isinstance(found, str)
    assert why in found


def test_a_row_may_end_at_its_only_eod_where_that_is_allowed() -> None:
    ending = replace(SAMPLING, stop_at_eod=True)
    choices = [choice(0, [1, 0]), choice(1, [0]), choice(2, [1, 2, 3, 0])]
    assert rows_of({"choices": choices}, ASK, ending, 10) == [(1, 0), (0,), (1, 2, 3, 0)]
    for bad in ([1, 0, 3, 0], [1, 2], []):
        assert isinstance(rows_of({"choices": [*choices[:2], choice(2, bad)]}, ASK, ending, 10), str)


def test_log_probabilities_of_a_probe() -> None:
    rows = [None, {"6": {"logprob": -1.5}, "2": {"logprob": -0.1}}, {"7": {"logprob": -2}}]
    assert probe_logprobs({"choices": [{"prompt_logprobs": rows}]}, [5, 6, 7]) == (-1.5, -2.0)
    for bad in ({}, {"choices": []}, {"choices": [{"prompt_logprobs": rows[:2]}]}):
        assert isinstance(probe_logprobs(bad, [5, 6, 7]), str)
    huge = [None, {"6": {"logprob": -(10**400)}}, rows[2]]
    assert isinstance(probe_logprobs({"choices": [{"prompt_logprobs": huge}]}, [5, 6, 7]), str)
    assert isinstance(probe_logprobs({"choices": [{"prompt_logprobs": [*rows, rows[2]]}]}, [5, 6, 7]), str)
