"""Tokens by other weights than those of the step are never used, whatever a server does between two questions."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from aiohttp import web
from fake_rollouts import FakeRolloutServer
from rollout_fleets import ASKS, SAMPLING, fleet_of, rows_by, until, weights
from safetensors.torch import load_file

from megatron_sip.errors import ServiceError
from megatron_sip.rollout import writing
from megatron_sip.rollout.label import failed_label, is_proven, loaded_by, loading_label, proven_label

Folders = tuple[Path, Path, Path]


def test_labels() -> None:
    proven, loading = proven_label("run-1", "a.1"), loading_label("run-1", "a.1")
    assert is_proven(proven, "run-1")
    for other in (loading, failed_label("run-1", "a.1"), proven_label("run-11", "a.1"), "default", "run-1", ""):
        assert not is_proven(other, "run-1")
    assert loaded_by(loading, "run-1") == "a"
    assert [loaded_by(label, "run-1") for label in (proven, "default", loading_label("run-2", "a.1"))] == [None] * 3


def test_weights_that_were_loaded_in_part_have_no_name(folders: Folders) -> None:
    """A leader believes the server to be away, and sends the weights it has once more; that fails in the middle."""
    start, first, _ = folders
    with FakeRolloutServer(start) as one, fleet_of(start, one) as fleet:
        now = weights(first, "run-1")
        fleet.submit_push(now).result(30)
        one.breaks_reloads = [503]
        hiccups = [None] * 2

        def hiccup() -> None:
            if hiccups:
                hiccups.pop()
                raise web.HTTPServiceUnavailable

        one.on_route["/weight_info"] = hiccup
        assert fleet.submit_rollouts(ASKS, SAMPLING, now).result(30) == rows_by(first)
        assert len(one.reloads) == 3, "whole, in part, and whole again"


@pytest.mark.parametrize("retries", [0, 2])
def test_a_server_that_falls_before_the_last_word_of_a_push_gets_no_name(folders: Folders, retries: int) -> None:
    start, first, second = folders
    with FakeRolloutServer(start) as one, fleet_of(start, one, retries=retries) as fleet:
        fleet.submit_push(weights(first, "run-1")).result(30)
        falls = [None]

        def fall() -> None:
            if one.requests[-1][1].get("new_version", "/loading").endswith("/loading"):
                return
            if falls:
                falls.pop()
                one.restart()
                raise web.HTTPServiceUnavailable

        one.on_route["/update_weight_version"] = fall
        now = weights(second, "run-2")
        fleet.submit_push(now).result(30)
        assert fleet.submit_rollouts(ASKS, SAMPLING, now).result(30) == rows_by(second)


def test_a_server_that_falls_between_two_proofs_gets_no_name(folders: Folders) -> None:
    """Its own folder is so near to what was sent that the log-probabilities of the probe do not tell."""
    _, first, second = folders
    with FakeRolloutServer(first) as one, fleet_of(first, one) as fleet:
        fleet.submit_push(weights(first, "run-1")).result(30)
        falls = [one.restart]
        one.on_route["/v1/completions"] = lambda: falls.pop()() if falls else None
        now = weights(second, "run-2")
        fleet.submit_push(now).result(30)
        assert not falls
        assert len(one.reloads) == 3
        assert one.checksums[0] != one.checksums[-1]


def test_a_server_that_fell_and_was_mended_by_another_leader_between_two_looks(folders: Folders) -> None:
    start, first, _ = folders
    with FakeRolloutServer(start) as one, fleet_of(start, one) as fleet:
        now = weights(first, "run-1")
        fleet.submit_push(now).result(30)

        def fall() -> None:
            one.restart()
            one.model.lm_head.weight.data.neg_()

        def mended() -> None:
            one.model.load_state_dict(load_file(first / "model.safetensors"))
            one.version = proven_label("run-1", "other.1")

        steps = [mended, fall]
        one.after_completion = lambda: steps.pop()() if steps else None
        assert fleet.submit_rollouts(ASKS, SAMPLING, now).result(30) == rows_by(first)
        assert len(one.reloads) == 1, "nobody had to send them again"


def test_a_leader_that_sent_nothing_waits_for_a_server_too(folders: Folders) -> None:
    """Of two leaders one sends the weights; each brings a server that comes back up to date."""
    start, first, _ = folders
    now = weights(first, "run-1")
    with FakeRolloutServer(start) as one, fleet_of(start, one) as main, fleet_of(start, one) as other:
        main.submit_push(now).result(30)
        port = one.port
        one.close()
        future = other.submit_rollouts(ASKS, SAMPLING, now)
        until(lambda: "takes the new weights" in str(other.waits_for), future)
        with FakeRolloutServer(start, port=port):
            assert future.result(30) == rows_by(first)


def test_two_leaders_do_not_undo_what_the_other_sent(folders: Folders) -> None:
    start, first, _ = folders
    now = weights(first, "run-1")
    with FakeRolloutServer(start) as one, fleet_of(start, one) as main, fleet_of(start, one) as other:
        main.submit_push(now).result(30)
        one.on_route["/collective_rpc"] = lambda: time.sleep(0.2)
        one.restart()
        both = [fleet.submit_rollouts(ASKS, SAMPLING, now) for fleet in (main, other)]
        assert [future.result(30) for future in both] == [rows_by(first)] * 2
        assert len(one.reloads) <= 3


def test_what_a_leader_left_behind_is_taken_over(folders: Folders) -> None:
    """A label of a sender who is gone: nobody waits for it for longer than a call may take."""
    start, first, _ = folders
    now = weights(first, "run-1")
    with FakeRolloutServer(start) as one, fleet_of(start, one, timeout=2.0) as fleet:
        one.version = loading_label("run-1", "gone.1")
        began = time.monotonic()
        assert fleet.submit_rollouts(ASKS, SAMPLING, now).result(30) == rows_by(first)
        assert time.monotonic() - began > 2


def test_two_runs_on_one_server_do_not_take_turns_for_ever(folders: Folders) -> None:
    start, first, _ = folders
    with FakeRolloutServer(start) as one, fleet_of(start, one) as fleet:
        now = weights(first, "run-1")
        fleet.submit_push(now).result(30)

        def taken() -> None:
            one.version = proven_label("another-1", "x.1")

        one.after_completion = taken
        with pytest.raises(ServiceError, match="lost its weights while it wrote"):
            fleet.submit_rollouts(ASKS, SAMPLING, now).result(30)


def test_what_was_seen_to_be_whole_is_kept_when_a_server_falls(
    folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "LOOK_SECONDS", 0.0)
    start, first, _ = folders
    heard: list[int] = []
    with FakeRolloutServer(start) as one, fleet_of(start, one) as fleet:
        now = weights(first, "run-1")
        fleet.submit_push(now).result(30)
        slow = list(ASKS[1].prefix)

        async def fall_first(prompt: list[int]) -> None:
            while prompt == slow and not heard:
                await asyncio.sleep(0.01)
            if prompt == slow and one.pause is not None:
                one.pause = None
                one.restart()

        one.pause = fall_first
        rows = fleet.submit_rollouts(ASKS, SAMPLING, now, heard.extend).result(30)
        assert rows == rows_by(first)
        assert heard == [0, 1], "each once, the first while the other was under way"
        prompts = [body["prompt"] for _, body in one.requests if "cache_salt" in body and "n" in body]
        assert prompts.count(list(ASKS[0].prefix)) == 1


def test_the_cache_beside_a_server_is_emptied_too(folders: Folders) -> None:
    start, first, _ = folders
    with FakeRolloutServer(start) as one, fleet_of(start, one) as fleet:
        fleet.submit_push(weights(first, "run-1")).result(30)
        assert "/reset_prefix_cache?reset_external=true" in one.queries
        assert [body["cache_salt"] for _, body in one.requests if "prompt_logprobs" in body] == ["run-1"]
