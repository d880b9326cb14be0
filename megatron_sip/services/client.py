"""A client for one OpenAI-compatible service on one or several servers.

Every call ends: with the parsed JSON object, or with `Missing` and a reason. It has one deadline over all its
attempts. A call in the queue for a free slot has not begun, so a batch of n calls ends after at most
ceil(n / concurrency) deadlines. Calls may wait longer where no server answers, or where all asked to be left alone.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import aiohttp

from megatron_sip.errors import ServiceError
from megatron_sip.services.circuit import Endpoint, another, choose_endpoint
from megatron_sip.services.endpoint import ClientSettings, parse_endpoints, read_key, tls_context
from megatron_sip.services.health import Health
from megatron_sip.services.hedging import may_hedge, race
from megatron_sip.services.holds import Hold, Holds
from megatron_sip.services.start_check import explain_failure, pick_model, tells_tokens
from megatron_sip.services.transport import Failure, exchange
from megatron_sip.services.usage import Usage
from megatron_sip.types import Missing, MissingReason

FIRST_BACKOFF_SECONDS = 0.25
LONGEST_BACKOFF_SECONDS = 8.0
CHECK_SECONDS = 20.0
PROBE_SECONDS = 5.0
SPREAD_SECONDS = 0.25
"""Calls that waited for the same moment go out over this long, not all at once."""
LONGEST_NAP_SECONDS = 5.0
"""A call that waits for the servers' time to be over looks again this often: one of them may take calls sooner."""
KEEP_ALIVE_SECONDS = 4.0
"""Less than the 5 s after which vLLM closes an idle connection: a call on one that is being closed is lost."""
NOT_THERE = (404, 405, 501)
TOO_MANY_REQUESTS = 429


class _Request(NamedTuple):
    """What is sent, to whichever server: a GET where there is no body. `at_root` is beside /v1, not below."""

    path: str
    body: bytes | None
    at_root: bool = False


_HEALTH = _Request("/health", None, at_root=True)
_MODELS = _Request("/models", None)


@dataclass(frozen=True)
class ServerInfo:
    """What a service serves. `max_model_len` is in tokens, None where the server does not say.

    `root` is the model folder as the server names it (vLLM); `has_tokenize` tells whether /tokenize is there.
    """

    model: str
    max_model_len: int | None
    root: str | None
    has_tokenize: bool


class ServiceClient:
    """Calls to one service. Construct anywhere; use inside one running event loop."""

    def __init__(self, settings: ClientSettings, environ: Mapping[str, str] | None = None) -> None:
        self.settings = settings
        self._endpoints = parse_endpoints(settings)
        self._key = read_key(settings, environ)
        self._slots = asyncio.Semaphore(settings.concurrency)
        self._session: aiohttp.ClientSession | None = None
        self._jitter = random.Random()
        self._health = Health(self._endpoints, self._probe, settings.url_flag)
        self._holds = Holds(settings.url_flag)
        self._on_outage = settings.on_outage
        self._hide = self._key.hide_in if self._key else str
        self._tls = tls_context(settings) if any(e.base.startswith("https:") for e in self._endpoints) else None
        self.calls = 0
        self.attempts = 0
        self.hedges = 0
        self.usage = Usage()

    @property
    def _headers(self) -> dict[str, str]:
        """Of every request; the key is put together here, so that no attribute holds it in the open."""
        own = {"Content-Type": "application/json"}
        return own | {"Authorization": f"Bearer {self._key.reveal()}"} if self._key else own

    def __repr__(self) -> str:
        return f"ServiceClient({', '.join(e.base for e in self._endpoints)})"

    async def open(self) -> None:
        """Make the connection pool. Proxy variables of the environment count only if asked for."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    # Each call in its slot may have a copy, and a probe must not queue behind calls that hang.
                    limit=2 * self.settings.concurrency + len(self._endpoints),
                    ttl_dns_cache=60,
                    keepalive_timeout=KEEP_ALIVE_SECONDS,
                    ssl=self._tls or True,
                ),
                timeout=aiohttp.ClientTimeout(total=None),  # the deadline is set around each attempt
                trust_env=self.settings.trust_env_proxy,
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"Accept": "application/json", "Accept-Encoding": "identity"},
            )

    async def close(self) -> None:
        """End the probes and close all connections."""
        await self._health.close()
        if self._session is not None:
            await self._session.close()
            self._session = None

    @property
    def waits_for(self) -> str | None:
        """What calls wait for, naming the servers; None while none waits. Safe to read from any thread."""
        return self._health.outage or self._holds.note if self._on_outage == "wait" else None

    @contextmanager
    def in_a_hurry(self) -> Iterator[None]:
        """Within it a call raises in an outage whatever `on_outage` says: what has not begun waits for nobody."""
        self._on_outage = "stop"
        try:
            yield
        finally:
            self._on_outage = self.settings.on_outage

    async def post(self, path: str, body: Mapping[str, Any], at_root: bool = False) -> dict[str, Any] | Missing:
        """POST `body` to `path` below the base URL (`at_root`: beside /v1). Retries within one deadline.

        With `on_outage` "wait" the deadline begins anew when a server is back, and stands still while all servers ask
        to be left alone.

        Raises:
            ServiceError: no server answers, and `on_outage` is "stop" or the services are starting.
        """
        return await self._call(_Request(path, json.dumps(body).encode(), at_root))

    async def get(self, path: str, at_root: bool = False) -> dict[str, Any] | Missing:
        """GET `path`; all else as `post`."""
        return await self._call(_Request(path, None, at_root))

    async def _call(self, request: _Request) -> dict[str, Any] | Missing:
        async with self._slots:
            self.calls += 1
            with self._holds.of_call() as hold:
                answer = await self._answered_or_failed(request, hold)
        result = answer.missing if isinstance(answer, Failure) else answer
        self.usage.add(result)
        return result

    async def _answered_or_failed(self, request: _Request, hold: Hold) -> dict[str, Any] | Failure:
        """The answer, or the failure of a call that meets no outage."""
        while True:
            await self._outage_is_over()
            deadline = asyncio.get_running_loop().time() + self.settings.timeout
            answer = await self._until_deadline(request, deadline, hold)
            if not isinstance(answer, Failure):
                return answer
            passing = answer.again or answer.server_at_fault
            if self._on_outage == "skip" or not passing or not await self._health.is_outage():
                return answer

    async def _outage_is_over(self) -> None:
        """Wait for a server, or raise, where calls are not to be missing for want of one."""
        if self._health.outage is None:
            return
        if self._on_outage == "stop":
            raise ServiceError(
                f"{self._health.outage}; start a server, then start again (a run goes on from its last checkpoint, and "
                "waits for a server with --judge-failure wait)"
            )
        if self._on_outage == "wait":
            await self._health.wait()

    async def _until_deadline(self, request: _Request, deadline: float, hold: Hold) -> dict[str, Any] | Failure:
        """Attempts until one is answered, the deadline is near or the retries are used up.

        A limit of the rate is no fault: it uses up no retry.
        """
        loop = asyncio.get_running_loop()
        tried: set[str] = set()
        refused: set[str] = set()
        attempts = faults = 0
        failure: Failure | None = None
        while True:
            if failure is not None and self._outage_stops_retries():
                return failure
            endpoint = self._choose(tried, deadline)
            held = endpoint.held_until - loop.time()
            if held > 0:
                if endpoint.held_until >= self._latest(deadline):
                    return (failure or _asked_to_wait(endpoint, held)).counted(attempts)
                deadline += await self._sit_out(min(held, LONGEST_NAP_SECONDS), hold)
                continue
            self._holds.over(hold)
            last = faults == self.settings.retries
            answer = await self._attempt_or_copy(endpoint, request, deadline, tried, last)
            if not isinstance(answer, Failure):
                return answer
            failure, attempts = answer, attempts + 1
            faults += answer.status != TOO_MANY_REQUESTS
            tried.add(endpoint.base)
            if answer.refusal:
                refused.add(endpoint.base)
            again = answer.again or (answer.refusal and len(refused) < len(self._endpoints))
            if faults > self.settings.retries or not again:
                return answer.counted(attempts)
            pause = self._pause(tried, attempts, deadline)
            if loop.time() + pause >= deadline:
                return answer.counted(attempts)
            if len(tried) == len(self._endpoints):
                tried.clear()
            await asyncio.sleep(pause)

    def _latest(self, deadline: float) -> float:
        """Until when a call can leave the servers alone."""
        return math.inf if self._on_outage == "wait" else deadline

    def _choose(self, tried: set[str], deadline: float) -> Endpoint:
        """The server for the next attempt, which may have to be left alone first."""
        now = asyncio.get_running_loop().time()
        return choose_endpoint(self._endpoints, now, tried, self._latest(deadline))

    async def _sit_out(self, held: float, hold: Hold) -> float:
        """Leave the servers alone for `held` seconds. How much later the deadline is for it, in seconds."""
        seconds = held + self._jitter.uniform(0.0, SPREAD_SECONDS)
        if self._on_outage != "wait":
            await asyncio.sleep(seconds)
            return 0.0
        began = asyncio.get_running_loop().time()
        await self._holds.sit_out(hold, seconds)
        return asyncio.get_running_loop().time() - began

    def _pause(self, tried: set[str], attempts: int, deadline: float) -> float:
        """Seconds before the next attempt; none where there is another server, or a server named the time itself."""
        now = asyncio.get_running_loop().time()
        if another(self._endpoints, now, tried) or self._choose(tried, deadline).held_until > now:
            return 0.0
        return self._backoff(attempts)

    def _outage_stops_retries(self) -> bool:
        """Whether it is known by now that they lead nowhere, and what comes of that is decided elsewhere."""
        return self._health.outage is not None and self._on_outage != "skip"

    def _backoff(self, attempts: int) -> float:
        """Seconds before the next attempt where there is no other server to turn to."""
        longest = min(FIRST_BACKOFF_SECONDS * 2 ** (attempts - 1), LONGEST_BACKOFF_SECONDS)
        return longest * self._jitter.uniform(0.5, 1.5)

    async def _attempt_or_copy(
        self, endpoint: Endpoint, request: _Request, deadline: float, tried: set[str], last: bool
    ) -> dict[str, Any] | Failure:
        """One attempt, with a second copy of it on another server where it is slow and copies are asked for.

        The copy goes to the same address if there is but one: a load balancer may stand behind it, and a lost packet
        or a stuck connection is helped by a new one.
        """
        loop = asyncio.get_running_loop()
        remaining = deadline - loop.time()
        # With another server to turn to, a silent one may cost half of what is left, not all of it.
        turn = not last and another(self._endpoints, loop.time(), {*tried, endpoint.base})
        first = self._attempt(endpoint, request, remaining / 2 if turn else remaining)
        after = self.settings.hedge_after
        if after is None or after >= remaining:
            return await first

        def copy() -> Awaitable[dict[str, Any] | Failure] | None:
            free = another(self._endpoints, loop.time(), {endpoint.base})
            other = choose_endpoint(self._endpoints, loop.time(), {endpoint.base}) if free else endpoint
            if other.held_until > loop.time() or not may_hedge(self.hedges, self.calls):
                return None
            self.hedges += 1
            return self._attempt(other, request, deadline - loop.time())

        return await race(first, copy, after, lambda answer: not isinstance(answer, Failure))

    def _attempt(self, endpoint: Endpoint, request: _Request, seconds: float) -> asyncio.Task[dict[str, Any] | Failure]:
        """One exchange with one server, which counts from now on, though it begins a turn of the loop later."""
        self.attempts += 1
        leave = endpoint.enter()
        task = asyncio.create_task(self._exchange(endpoint, request, seconds))
        # A task that is cancelled before its first turn runs no `finally` of its own.
        task.add_done_callback(lambda _: leave())
        return task

    async def _exchange(self, endpoint: Endpoint, request: _Request, seconds: float) -> dict[str, Any] | Failure:
        """One exchange, and what it tells of the server's health."""
        answer = await self._send(endpoint, request, seconds)
        now = asyncio.get_running_loop().time()
        if not isinstance(answer, Failure):
            self._health.worked(endpoint, now)
            self._holds.answered()
            return answer
        if answer.retry_after is not None:
            endpoint.hold(now, answer.retry_after)
        if answer.refusal:
            self._health.refused(endpoint, now)
        elif answer.server_at_fault:
            self._health.failed(endpoint, now)
        elif answer.status == TOO_MANY_REQUESTS and answer.retry_after is None:
            self._health.limited(endpoint, now)
        return answer

    async def _send(self, endpoint: Endpoint, request: _Request, seconds: float) -> dict[str, Any] | Failure:
        """One exchange, with the key taken out of what is reported."""
        if self._session is None:
            raise RuntimeError("ServiceClient.open was not awaited")
        url = (endpoint.root if request.at_root else endpoint.base) + request.path
        method = "GET" if request.body is None else "POST"
        return await exchange(self._session, method, url, request.body, self._headers, max(seconds, 0.001), self._hide)

    async def _probe(self, endpoint: Endpoint) -> str | None:
        """None where the server is well, else what is wrong with it.

        /health is vLLM's; a server without it is asked for its models. Whoever refuses the question is there at least,
        and why it refuses is better told by the calls.
        """
        answer: dict[str, Any] | Failure = {}
        for request in (_HEALTH, _MODELS):
            answer = await self._send(endpoint, request, min(PROBE_SECONDS, self.settings.timeout))
            if not isinstance(answer, Failure) or answer.status not in NOT_THERE:
                break
        if isinstance(answer, Failure) and (answer.status is None or answer.status >= 500):
            return answer.missing.detail
        return None

    async def check(self) -> ServerInfo:
        """Ask every server what it serves; all must serve the same model.

        Raises ServiceError when one refuses, rejects the key, serves no such model or is no OpenAI-compatible server.
        """
        found = [await self._check_one(endpoint) for endpoint in self._endpoints]
        names = {info.model for info in found}
        if len(names) > 1:
            raise ServiceError(
                f"the servers of {self.settings.url_flag} serve different models ({', '.join(sorted(names))}); "
                f"name one with {self.settings.model_flag}"
            )
        lengths = [info.max_model_len for info in found if info.max_model_len is not None]
        return ServerInfo(
            model=found[0].model,
            max_model_len=min(lengths) if lengths else None,
            root=found[0].root,
            has_tokenize=all(info.has_tokenize for info in found),
        )

    async def _check_one(self, endpoint: Endpoint) -> ServerInfo:
        answer = await self._ask_at_start(endpoint, _MODELS, lambda failure: failure.busy)
        if isinstance(answer, Failure):
            raise ServiceError(explain_failure(endpoint, answer, self.settings))
        entry = pick_model(endpoint, answer, self.settings)
        length = entry.get("max_model_len")
        root = entry.get("root")
        question = {"model": str(entry["id"]), "prompt": "a", "add_special_tokens": False}
        tokenize = _Request("/tokenize", json.dumps(question).encode(), at_root=True)
        tokens = await self._ask_at_start(endpoint, tokenize, lambda failure: failure.again)
        return ServerInfo(
            model=str(entry["id"]),
            max_model_len=length if isinstance(length, int) and length > 0 else None,
            root=root if isinstance(root, str) else None,
            has_tokenize=tells_tokens(endpoint, tokens, self.settings),
        )

    async def _ask_at_start(
        self, endpoint: Endpoint, request: _Request, passes: Callable[[Failure], bool]
    ) -> dict[str, Any] | Failure:
        """The answer of one server, which is asked again for `CHECK_SECONDS` while its failure is one that passes."""
        loop, seconds = asyncio.get_running_loop(), min(CHECK_SECONDS, self.settings.timeout)
        deadline, attempts = loop.time() + seconds, 0
        while True:
            answer = await self._send(endpoint, request, seconds)
            attempts += 1
            if not isinstance(answer, Failure) or not passes(answer):
                return answer
            pause = max(self._backoff(attempts), answer.retry_after or 0.0)
            if loop.time() + pause >= deadline:
                return answer.counted(attempts)
            await asyncio.sleep(pause)


def _asked_to_wait(endpoint: Endpoint, seconds: float) -> Failure:
    """Why a call is not even sent: every server said that it would turn it away."""
    detail = f"{endpoint.base} asked to be left alone for {seconds:.0f} s more, which is beyond the deadline"
    return Failure(Missing(MissingReason.HTTP_STATUS, detail), again=False, status=TOO_MANY_REQUESTS)
