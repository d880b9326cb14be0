"""Weights to rollout servers, the proof that they are there, and rollouts by no other weights; a true Llama serves."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from fake_rollouts import FakeRolloutServer
from fake_server import hang, status
from rollout_fleets import ASKS, SAMPLING, fleet_of, rows_by, until, weights

from megatron_sip.checkpoint.hf_config import model_config_from_hf
from megatron_sip.errors import ServiceError
from megatron_sip.rollout.label import is_proven


def test_rollouts_are_by_the_weights_of_the_last_push(folders: tuple[Path, Path, Path]) -> None:
    start, first, second = folders
    with FakeRolloutServer(start) as one, FakeRolloutServer(start) as two, fleet_of(start, one, two) as fleet:
        one.cache_is_held = 1
        for version, folder in (("run-1", first), ("run-2", second)):
            now = weights(folder, version)
            fleet.submit_push(now).result(30)
            assert fleet.behind == {}
            assert one.reloads[-1] == folder
            assert is_proven(two.version, version)
            rows = fleet.submit_rollouts(ASKS, SAMPLING, now).result(30)
            assert rows == rows_by(folder)
            assert rows == fleet.submit_rollouts(ASKS, SAMPLING, now).result(30), "the same seeds ask the same"
        assert rows_by(first) != rows_by(start)
        assert (one.cache_resets, two.cache_resets) == (3, 2), "one was asked again while a request held its cache"
        salts = {body["cache_salt"] for path, body in one.requests + two.requests if "cache_salt" in body}
        assert salts == {"run-1", "run-2"}


def test_a_server_that_keeps_its_weights_is_found_out_and_left_out(folders: tuple[Path, Path, Path]) -> None:
    """By its checksums also where no log-probability tells: weights that moved by a millionth."""
    start, first, second = folders
    with FakeRolloutServer(start) as one, FakeRolloutServer(start) as two, fleet_of(start, one, two) as fleet:
        fleet.submit_push(weights(first, "run-1")).result(30)
        one.ignores_reloads = True
        now = weights(second, "run-2")
        fleet.submit_push(now).result(30)
        assert list(fleet.behind) == [one.url]
        assert "has not the new weights" in fleet.behind[one.url]
        assert "compared tensors are others" in fleet.behind[one.url]
        seen = len(one.requests)
        assert fleet.submit_rollouts(ASKS, SAMPLING, now).result(30) == rows_by(second)
        assert len(one.requests) == seen, "nothing is asked of a server that is behind"
        one.ignores_reloads = False
        fleet.submit_push(weights(first, "run-3")).result(30)
        assert fleet.behind == {}


def test_half_a_reload_is_found_out(folders: tuple[Path, Path, Path]) -> None:
    start, first, _ = folders
    with FakeRolloutServer(start) as one, fleet_of(start, one) as fleet:
        one.forgets_some = True
        with pytest.raises(ServiceError, match=r"1 of 7 compared tensors are others, such as model\.embed_tokens"):
            fleet.submit_push(weights(first, "run-1")).result(30)


def test_log_probabilities_alone_find_weights_that_differ_enough(folders: tuple[Path, Path, Path]) -> None:
    start, first, second = folders
    with FakeRolloutServer(start) as one, fleet_of(start, one, checksums=False, tolerance=1e-3) as fleet:
        fleet.submit_push(weights(first, "run-1")).result(30)
        assert "/weight_checker" not in [path for path, _ in one.requests]
        one.ignores_reloads = True
        with pytest.raises(ServiceError, match="differ from the policy's by"):
            fleet.submit_push(weights(start, "run-2")).result(30)
        # What the docs say of this proof: so small a change is within the tolerance.
        fleet.submit_push(weights(second, "run-3")).result(30)
    with FakeRolloutServer(start) as one, fleet_of(start, one, checksums=False, tolerance=100.0) as fleet:
        fleet.submit_push(weights(first, "run-1")).result(30)
        one.ignores_reloads = True
        with pytest.raises(ServiceError, match="very log-probabilities of before"):
            fleet.submit_push(weights(start, "run-2")).result(30)


def test_what_a_restarted_server_wrote_is_thrown_away(folders: tuple[Path, Path, Path]) -> None:
    start, first, _ = folders
    with FakeRolloutServer(start) as one, fleet_of(start, one) as fleet:
        now = weights(first, "run-1")
        fleet.submit_push(now).result(30)
        restarts = [one.restart]
        one.after_completion = lambda: restarts.pop()() if restarts else None
        rows = fleet.submit_rollouts(ASKS, SAMPLING, now).result(30)
        assert rows == rows_by(first)
        assert is_proven(one.version, "run-1")
        assert len(one.reloads) == 2, "it got the weights again"


def test_it_waits_for_a_server_that_is_away_and_says_so(folders: tuple[Path, Path, Path]) -> None:
    start, first, second = folders
    with FakeRolloutServer(start) as one, fleet_of(start, one) as fleet:
        fleet.submit_push(weights(first, "run-1")).result(30)
        port = one.port
        one.close()
        future = fleet.submit_push(weights(second, "run-2"))
        until(lambda: fleet.waits_for is not None, future)
        assert "takes the new weights" in str(fleet.waits_for)
        with FakeRolloutServer(start, port=port) as again:
            future.result(30)
            assert is_proven(again.version, "run-2")
            assert fleet.waits_for is None
        with pytest.raises(ServiceError, match="cannot connect to"), fleet_of(start, one):
            pass


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("short", "3 tokens where 4"),
        ("foreign", "token id 331"),
        ("refused", "refuses to write rollouts: 400"),
    ],
)
def test_answers_of_no_use_end_the_run_with_the_reason(folders: tuple[Path, Path, Path], fault: str, why: str) -> None:
    start, first, _ = folders
    with FakeRolloutServer(start) as one, fleet_of(start, one) as fleet:
        now = weights(first, "run-1")
        fleet.submit_push(now).result(30)
        if fault == "short":
            one.twist = lambda tokens: tokens[:-1]
        if fault == "foreign":
            one.twist = lambda tokens: [*tokens[:-1], 331]
        if fault == "refused":
            one.fault_every_time = status(400)
        with pytest.raises(ServiceError, match=why):
            fleet.submit_rollouts(ASKS, SAMPLING, now).result(30)


def test_a_passing_fault_costs_one_question_more(folders: tuple[Path, Path, Path]) -> None:
    start, first, _ = folders
    with FakeRolloutServer(start) as one, fleet_of(start, one) as fleet:
        now = weights(first, "run-1")
        fleet.submit_push(now).result(30)
        one.script.append(status(503))
        before = len(one.requests)
        assert fleet.submit_rollouts(ASKS, SAMPLING, now).result(30) == rows_by(first)
        assert len(one.requests) == before + len(ASKS) + 1


def test_a_reload_that_fails_names_the_folder_and_the_way_out(folders: tuple[Path, Path, Path]) -> None:
    start, first, _ = folders
    with FakeRolloutServer(start) as one, fleet_of(start, one) as fleet:
        one.breaks_reloads = [500]
        with pytest.raises(ServiceError, match="could not load the weights") as error:
            fleet.submit_push(weights(first, "run-1")).result(30)
        assert all(part in str(error.value) for part in ("--rollout-weights-dir", str(first), "is started anew"))


@pytest.mark.parametrize(
    ("options", "wanted", "why"),
    [
        ({"development": False}, {}, "VLLM_SERVER_DEV_MODE=1"),
        ({"max_model_len": 99}, {}, "start it with --max-model-len 100"),
        ({"key": "secret"}, {}, "ROLLOUT_API_KEY"),
        ({}, {"num_layers": 3}, "model.layers.2.input_layernorm.weight is in one of the two only"),
        ({}, {"untie_embeddings_and_output_weights": False}, "lm_head.weight is in one"),
        ({}, {"vocab_size": 320}, "its vocabulary is larger than the policy's 320"),
        ({}, {"vocab_size": 340}, "its vocabulary has 331 tokens, the policy's 340"),
        ({"root": True}, {"hidden_size": 48}, "--hidden-size is 48, "),
    ],
)
def test_a_server_that_cannot_write_for_this_policy_is_refused_at_the_start(
    folders: tuple[Path, Path, Path], options: dict[str, Any], wanted: dict[str, Any], why: str
) -> None:
    start = folders[0]
    model = replace(model_config_from_hf(start), **wanted)
    with FakeRolloutServer(start, **options) as one:
        with pytest.raises(ServiceError) as error, fleet_of(start, one, model=model):
            pass
        assert why in str(error.value)
        assert one.url in str(error.value)
        assert not one.reloads


def test_each_server_gets_as_many_calls_as_are_asked_for(folders: tuple[Path, Path, Path]) -> None:
    start, first, _ = folders
    asks = [replace(ASKS[0], seed=number, count=1) for number in range(16)]

    async def pause(_prompt: list[int]) -> None:
        await asyncio.sleep(0.2)

    one, two = FakeRolloutServer(start), FakeRolloutServer(start)
    with one, two, fleet_of(start, one, two, concurrency=4) as fleet:
        now = weights(first, "run-1")
        fleet.submit_push(now).result(30)
        one.most_in_flight = two.most_in_flight = 0
        one.pause = two.pause = pause
        fleet.submit_rollouts(asks, SAMPLING, now).result(30)
    assert (one.most_in_flight, two.most_in_flight) == (4, 4)


def test_servers_hash_their_weights_for_one_leader_only(folders: tuple[Path, Path, Path]) -> None:
    with FakeRolloutServer(folders[0]) as one, fleet_of(folders[0], one, thoroughly=False):
        assert "/weight_checker" not in [path for path, _ in one.requests]
        assert "/weight_info" in one.queries


def test_an_answer_that_is_too_long_is_asked_for_in_halves(folders: tuple[Path, Path, Path]) -> None:
    """Its tokens have long texts, which come along."""
    start, first, _ = folders
    with FakeRolloutServer(start) as one, fleet_of(start, one) as fleet:
        now = weights(first, "run-1")
        fleet.submit_push(now).result(30)
        one.text = "-" * 400_000
        assert fleet.submit_rollouts(ASKS, SAMPLING, now).result(30) == rows_by(first)
        asked = [body["n"] for _, body in one.requests if "n" in body]
        assert sorted(asked) == [1, 1, 2, 2, 3, 3]
        one.text = "-" * 1_000_000
        with pytest.raises(ServiceError, match="a body of more than 1000000 bytes"):
            fleet.submit_rollouts(ASKS, SAMPLING, now).result(30)


def test_a_model_that_is_gone_is_told_as_such(folders: tuple[Path, Path, Path]) -> None:
    start, first, _ = folders
    with FakeRolloutServer(start) as one, fleet_of(start, one) as fleet:

        def gone() -> None:
            raise web.HTTPNotFound(text='{"error": {"message": "The model does not exist."}}')

        one.on_route["/v1/completions"] = gone
        with pytest.raises(ServiceError, match=r"as it should \(404: The model does not exist"):
            fleet.submit_push(weights(first, "run-1")).result(30)


def test_closing_ends_what_is_under_way(folders: tuple[Path, Path, Path]) -> None:
    start, first, _ = folders
    with FakeRolloutServer(start) as one, fleet_of(start, one) as fleet:
        now = weights(first, "run-1")
        fleet.submit_push(now).result(30)
        one.fault_every_time = hang
        future = fleet.submit_rollouts(ASKS, SAMPLING, now)
        until(lambda: one.in_flight == len(ASKS), future)
        fleet.close()
        assert future.cancelled()
