"""The state of one server of a service, and the choice among several. Pure: the clock is an argument.

A circuit breaker in three states. Closed: calls go there. Open, after `TRIP_FAILURES` failures in a row: none go there
while another server is usable. Half-open, when a rest is over and a health probe succeeded: one call is let through; if
it works the circuit is closed, if it fails the server rests for twice as long.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

TRIP_FAILURES = 5
FIRST_REST_SECONDS = 0.5
LONGEST_REST_SECONDS = 30.0
LONGEST_PROBED_REST_SECONDS = 5.0
"""A probe costs nobody a call: a server that fails its probes is asked again after this time at the latest, and so is
every server in an outage."""
LONGEST_HOLD_SECONDS = 300.0
"""What is believed of a Retry-After: after this time the server is asked again, whatever it named."""

_USABLE, _RESTING, _HELD, _ON_TRIAL, _OPEN = range(5)


@dataclass
class Endpoint:
    """One server of a service. `base` ends in /v1 (or what the user gave), `root` is the same without /v1.

    `failures` counts in a row and makes the circuit; `rests` counts in a row and makes the next one longer. Times are
    those of the event loop, in seconds.
    """

    base: str
    root: str
    in_flight: int = 0
    calls: int = 0
    failures: int = 0
    rests: int = 0
    resting: bool = False
    rests_until: float = 0.0
    held_until: float = 0.0
    on_trial: bool = False
    worked_at: float = float("-inf")

    @property
    def tripped(self) -> bool:
        """Whether the circuit is open or half-open."""
        return self.failures >= TRIP_FAILURES

    def enter(self) -> Callable[[], None]:
        """Count a call in; what is returned counts it out again.

        It belongs to the choice, without a turn of the event loop between: else all calls of a burst choose by the
        same counts, and a half-open circuit lets all of them through.
        """
        self.calls += 1
        self.in_flight += 1
        trial = self.tripped and not self.on_trial
        self.on_trial |= trial

        def leave() -> None:
            self.in_flight -= 1
            self.on_trial &= not trial

        return leave

    def failed(self, now: float) -> None:
        """A call failed, and it was the server's fault. Calls that fail while it rests do not make the rest longer."""
        self.failures += 1
        if not self.resting:
            self.rest(now)

    def refused(self, now: float) -> None:
        """It turned a question away as none of its business, and will do so again: the circuit opens at once.

        It answers sooner than the others, so that as the least loaded one it would draw most of the calls.
        """
        self.failures = max(self.failures, TRIP_FAILURES - 1)
        self.failed(now)

    def rest(self, now: float, longest: float = LONGEST_REST_SECONDS) -> None:
        """Rest, twice as long as the last time, until a probe finds the server well."""
        self.rests += 1
        doublings = min(self.rests - 1, 30)  # a float overflows at 1024
        self.resting = True
        self.rests_until = now + min(FIRST_REST_SECONDS * 2**doublings, longest)

    def hold(self, now: float, seconds: float) -> None:
        """The server asked to be left alone (Retry-After)."""
        self.held_until = max(self.held_until, now + min(seconds, LONGEST_HOLD_SECONDS))

    def worked(self, now: float) -> None:
        """An answer came: the server is trusted again at once."""
        self.failures = self.rests = 0
        self.resting = False
        self.worked_at = now

    def probed(self, well: bool, now: float) -> None:
        """A health probe at the end of a rest. Success ends the rest; what tripped the circuit only a call can mend."""
        if well:
            self.resting = False
        else:
            self.rest(now, LONGEST_PROBED_REST_SECONDS)

    def standing(self, now: float) -> int:
        """Its class in the choice, the lower the better. One that asked for time is left alone in any case."""
        if self.held_until > now:
            return _HELD
        if self.resting:
            return _OPEN if self.tripped else _RESTING
        return _ON_TRIAL if self.tripped and self.on_trial else _USABLE


def choose_endpoint(
    endpoints: Iterable[Endpoint], now: float, avoid: Collection[str], latest: float = math.inf
) -> Endpoint:
    """The server for the next attempt: those that may be called first, and of them those of `avoid` last.

    Where there is none, the one that asked for the least time, if that ends before `latest`: it answers, and a server
    whose circuit is open does not. Then the open ones, and one that asked for more time only where all did.
    """

    def order(endpoint: Endpoint) -> tuple[int, float, int, int, int]:
        standing = endpoint.standing(now)
        load = endpoint.in_flight, endpoint.calls
        if standing == _HELD:
            return (1 if endpoint.held_until < latest else 3), endpoint.held_until, standing, *load
        return (0 if standing <= _RESTING else 2), endpoint.base in avoid, standing, *load

    return min(endpoints, key=order)


def another(endpoints: Iterable[Endpoint], now: float, avoid: Collection[str]) -> bool:
    """Whether a server that is not in `avoid` may be called at once."""
    return any(endpoint.base not in avoid and endpoint.standing(now) <= _RESTING for endpoint in endpoints)
