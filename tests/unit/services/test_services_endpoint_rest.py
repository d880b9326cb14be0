"""How long an endpoint rests after failures."""

from __future__ import annotations

from megatron_sip.services.endpoint import LONGEST_REST_SECONDS, Endpoint


def test_a_server_that_stays_dead_rests_for_the_longest_time_and_no_longer() -> None:
    endpoint = Endpoint("http://127.0.0.1:1/v1", "http://127.0.0.1:1")
    rests = []
    for _ in range(2000):
        endpoint.failed(now=100.0)
        rests.append(endpoint.rests_until - 100.0)
    assert rests == sorted(rests)
    assert rests[0] < rests[1] < rests[-1] == LONGEST_REST_SECONDS
    endpoint.worked()
    assert (endpoint.failures, endpoint.rests_until) == (0, 0.0)
