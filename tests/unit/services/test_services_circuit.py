"""How long a server rests, when its circuit opens and closes, and who is chosen. No clock and no network."""

from __future__ import annotations

import math

import pytest

from megatron_sip.services.circuit import (
    FIRST_REST_SECONDS,
    LONGEST_HOLD_SECONDS,
    LONGEST_PROBED_REST_SECONDS,
    LONGEST_REST_SECONDS,
    TRIP_FAILURES,
    Endpoint,
    another,
    choose_endpoint,
)


def endpoint(name: str = "a", **fields: int) -> Endpoint:
    return Endpoint(f"http://{name}/v1", f"http://{name}", **fields)


def chosen(*endpoints: Endpoint, now: float = 0.0, avoid: tuple[str, ...] = (), latest: float = math.inf) -> str:
    bases = {f"http://{name}/v1" for name in avoid}
    return choose_endpoint(endpoints, now, bases, latest).root.removeprefix("http://")


def trip(one: Endpoint, now: float = 0.0) -> None:
    for _ in range(TRIP_FAILURES):
        one.failed(now)


def test_a_server_whose_calls_go_on_failing_rests_for_the_longest_time_and_no_longer() -> None:
    one, now, rests = endpoint(), 100.0, []
    for _ in range(2000):
        one.failed(now)
        rests.append(one.rests_until - now)
        now = one.rests_until
        one.probed(True, now)
    assert rests == sorted(rests)
    assert rests[:3] == [FIRST_REST_SECONDS, 2 * FIRST_REST_SECONDS, 4 * FIRST_REST_SECONDS]
    assert rests[-1] == LONGEST_REST_SECONDS
    one.worked(now)
    assert (one.failures, one.rests, one.resting) == (0, 0, False)


def test_many_calls_that_fail_at_once_make_one_rest() -> None:
    one = endpoint()
    for _ in range(64):
        one.failed(now=1.0)
    assert one.tripped
    assert one.rests_until == 1.0 + FIRST_REST_SECONDS


def test_a_server_that_is_away_is_probed_often() -> None:
    one, now = endpoint(), 0.0
    one.failed(now)
    for _ in range(100):
        now = one.rests_until
        one.probed(False, now)
        assert one.resting
        assert one.rests_until - now <= LONGEST_PROBED_REST_SECONDS


def test_the_least_loaded_is_chosen() -> None:
    assert chosen(endpoint("a", in_flight=2), endpoint("b", in_flight=1)) == "b"
    assert chosen(endpoint("a", calls=5), endpoint("b", calls=4)) == "b"
    assert chosen(endpoint("a"), endpoint("b", in_flight=9), avoid=("a",)) == "b"


def test_an_open_circuit_takes_no_calls_while_another_server_is_usable() -> None:
    dead, busy = endpoint("dead"), endpoint("busy", in_flight=1000)
    trip(dead)
    assert chosen(dead, busy) == "busy"
    assert chosen(dead, busy, avoid=("busy",)) == "busy", "even if it has just failed once"
    assert not another([dead, busy], 0.0, {busy.base})
    busy.failed(0.0)
    assert chosen(dead, busy, avoid=("busy",)) == "busy", "a short rest is no open circuit"
    assert chosen(dead) == "dead", "where there is no other"


def test_a_refusal_opens_the_circuit_at_once() -> None:
    wrong, held = endpoint("wrong"), endpoint("held")
    wrong.refused(0.0)
    held.hold(0.0, 5.0)
    assert wrong.tripped
    assert chosen(wrong, held) == "held", "a call waits rather than be refused"
    wrong.probed(True, 1.0)
    assert chosen(wrong, held, now=1.0) == "wrong", "half-open: one call may find out"
    wrong.worked(1.0)
    assert not wrong.tripped


def test_a_half_open_circuit_takes_one_call() -> None:
    mended, busy = endpoint("mended"), endpoint("busy", in_flight=3)
    trip(mended)
    mended.probed(True, now=1.0)
    assert chosen(mended, busy, now=1.0) == "mended"
    mended.on_trial = True
    assert chosen(mended, busy, now=1.0) == "busy"
    mended.on_trial = False
    mended.failed(1.0)
    assert mended.resting, "the trial failed, so the circuit is open again"
    assert mended.rests_until == 1.0 + 2 * FIRST_REST_SECONDS
    mended.probed(True, now=2.0)
    mended.worked(now=2.0)
    mended.on_trial = True
    assert chosen(mended, busy, now=2.0) == "mended", "closed: there is no trial any more"


def test_a_server_that_asked_for_time_gets_it() -> None:
    held, busy = endpoint("held"), endpoint("busy", in_flight=9)
    held.hold(10.0, 3.0)
    assert chosen(held, busy, now=12.9) == "busy"
    assert chosen(held, busy, now=13.1) == "held"
    held.hold(13.0, 1.0)
    held.hold(13.0, 0.0)
    assert held.held_until == 14.0, "a shorter wait does not cancel a longer one"
    held.worked(13.5)
    assert held.held_until == 14.0, "nor does an answer to a call that was under way"


@pytest.mark.parametrize("failures", [1, TRIP_FAILURES])
def test_a_server_that_failed_and_asked_for_time_is_left_alone(failures: int) -> None:
    """A 503 with Retry-After is both."""
    held, busy = endpoint("held"), endpoint("busy", in_flight=9)
    for _ in range(failures):
        held.failed(0.0)
    held.hold(0.0, 60.0)
    assert chosen(held, busy, avoid=("busy",)) == "busy"
    busy.failed(0.0)
    assert chosen(held, busy, avoid=("busy",)) == "busy", "it may rest after a failure of its own"
    assert not another([held, busy], 0.0, {busy.base})


def test_of_those_that_asked_for_time_the_first_to_be_ready_is_waited_for() -> None:
    soon, late = endpoint("soon", in_flight=5, calls=9), endpoint("late")
    soon.hold(0.0, 1.0)
    late.hold(0.0, 60.0)
    assert chosen(late, soon) == "soon"
    assert chosen(late, soon, avoid=("soon",)) == "soon"
    assert chosen(late, soon, latest=0.5) == "soon", "the least that all of them asked for"


def test_a_server_that_asked_for_time_is_waited_for_while_another_is_dead() -> None:
    held, dead, tried = endpoint("held"), endpoint("dead"), endpoint("tried")
    held.hold(0.0, 5.0)
    trip(dead)
    trip(tried)
    tried.probed(True, 0.0)
    tried.on_trial = True
    for other in (dead, tried):
        assert chosen(held, other, avoid=("held",)) == "held"
        assert chosen(held, other, latest=5.0) == other.root.removeprefix("http://"), "it cannot wait that long"
    assert chosen(held, dead, tried, latest=1.0) == "tried"


@pytest.mark.parametrize("seconds", [1e9, 86_400.0])
def test_an_endless_retry_after_is_not_believed(seconds: float) -> None:
    one = endpoint()
    one.hold(0.0, seconds)
    assert one.held_until == LONGEST_HOLD_SECONDS
