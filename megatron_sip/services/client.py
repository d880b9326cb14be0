"""A client for one OpenAI-compatible service on one or several servers.

Every call ends: with the parsed JSON object, or with `Missing` and a reason. It has one deadline over all its
attempts. A call in the queue for a free slot has not begun, so a batch of n calls ends after at most
ceil(n / concurrency) deadlines.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp

from megatron_sip.errors import ServiceError
from megatron_sip.services.endpoint import ClientSettings, Endpoint, choose_endpoint, parse_endpoints, read_key
from megatron_sip.services.transport import Failure, exchange
from megatron_sip.services.usage import Usage
from megatron_sip.types import Missing, MissingReason

FIRST_BACKOFF_SECONDS = 0.25
LONGEST_BACKOFF_SECONDS = 8.0
CHECK_SECONDS = 20.0
NOT_IMPLEMENTED = 501


@dataclass(frozen=True)
class ServerInfo:
    """What a service serves. `max_model_len` is in tokens, None where the server does not say.

    `root` is the model folder as the server names it (vLLM); `has_tokenize` tells whether /tokenize answers.
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
        self.calls = 0
        self.attempts = 0
        self.usage = Usage()

    def __repr__(self) -> str:
        return f"ServiceClient({', '.join(e.base for e in self._endpoints)})"

    async def open(self) -> None:
        """Make the connection pool. Proxy variables of the environment count only if asked for."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, ttl_dns_cache=60),
                timeout=aiohttp.ClientTimeout(total=None),  # the deadline is set around each attempt
                trust_env=self.settings.trust_env_proxy,
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"Accept": "application/json", "Accept-Encoding": "identity"},
            )

    async def close(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def post(self, path: str, body: Mapping[str, Any], at_root: bool = False) -> dict[str, Any] | Missing:
        """POST `body` to `path` below the base URL (`at_root`: beside /v1). Retries within one deadline."""
        async with self._slots:
            self.calls += 1
            answer = await self._until_deadline(path, body, at_root)
            self.usage.add(answer)
            return answer

    async def _until_deadline(self, path: str, body: Mapping[str, Any], at_root: bool) -> dict[str, Any] | Missing:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.settings.timeout
        tried: set[str] = set()
        for attempt in range(self.settings.retries + 1):
            remaining = deadline - loop.time()
            endpoint = choose_endpoint(self._endpoints, loop.time(), tried)
            last = attempt == self.settings.retries
            # With another server to turn to, a silent one may cost half of what is left, not all of it.
            share = remaining if last or len(self._endpoints) == 1 else remaining / 2
            answer = await self._attempt(endpoint, "POST", path, body, at_root, share)
            if not isinstance(answer, Failure):
                return answer
            tried.add(endpoint.base)
            pause = self._pause(answer, attempt, bool({e.base for e in self._endpoints} - tried))
            if last or not answer.again or loop.time() + pause >= deadline:
                return self._counted(answer, attempt + 1)
            if len(tried) == len(self._endpoints):
                tried.clear()
            await asyncio.sleep(pause)
        raise AssertionError("unreachable: the last attempt returns")

    def _pause(self, failure: Failure, attempt: int, another_server: bool) -> float:
        """Seconds before the next attempt; none when an untried server is left."""
        if another_server:
            return 0.0
        backoff = min(FIRST_BACKOFF_SECONDS * 2**attempt, LONGEST_BACKOFF_SECONDS) * self._jitter.uniform(0.5, 1.5)
        return max(backoff, failure.retry_after or 0.0)

    def _counted(self, failure: Failure, attempts: int) -> Missing:
        many = f" (after {attempts} attempts)" if attempts > 1 else ""
        return Missing(failure.missing.reason, failure.missing.detail + many)

    async def _attempt(
        self, endpoint: Endpoint, method: str, path: str, body: Mapping[str, Any] | None, at_root: bool, seconds: float
    ) -> dict[str, Any] | Failure:
        """One exchange with one server, with its state kept and the key taken out of what is reported."""
        if self._session is None:
            raise RuntimeError("ServiceClient.open was not awaited")
        headers = {"Authorization": f"Bearer {self._key.reveal()}"} if self._key else {}
        url = (endpoint.root if at_root else endpoint.base) + path
        self.attempts += 1
        endpoint.calls += 1
        endpoint.in_flight += 1
        hide = self._key.hide_in if self._key else str
        try:
            answer = await exchange(self._session, method, url, body, headers, max(seconds, 0.001), hide)
        finally:
            endpoint.in_flight -= 1
        if not isinstance(answer, Failure):
            endpoint.worked()
        elif answer.server_at_fault or answer.status == 429:
            endpoint.failed(asyncio.get_running_loop().time())
        return answer

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
        seconds = min(CHECK_SECONDS, self.settings.timeout)
        answer = await self._attempt(endpoint, "GET", "/models", None, False, seconds)
        if isinstance(answer, Failure):
            raise ServiceError(self._explain(endpoint, answer))
        entry = self._pick_model(endpoint, answer)
        length = entry.get("max_model_len")
        root = entry.get("root")
        return ServerInfo(
            model=str(entry["id"]),
            max_model_len=length if isinstance(length, int) and length > 0 else None,
            root=root if isinstance(root, str) else None,
            has_tokenize=await self._has_tokenize(endpoint, str(entry["id"]), seconds),
        )

    async def _has_tokenize(self, endpoint: Endpoint, model: str, seconds: float) -> bool:
        """Whether /tokenize is there. ServiceError where that cannot be told: it decides how all verdicts are read."""
        probe = {"model": model, "prompt": "a", "add_special_tokens": False}
        answer = await self._attempt(endpoint, "POST", "/tokenize", probe, True, seconds)
        if isinstance(answer, Failure):
            if answer.server_at_fault and answer.status != NOT_IMPLEMENTED:
                raise ServiceError(
                    f"{endpoint.root}/tokenize failed ({answer.missing.detail}), so it is not known how to ask the "
                    f"server of {self.settings.url_flag}; start again when it is well"
                )
            return False
        return isinstance(answer.get("tokens"), list)

    def _pick_model(self, endpoint: Endpoint, answer: dict[str, Any]) -> dict[str, Any]:
        """The entry of the wanted model in the answer of /models."""
        flags = self.settings
        entries = answer.get("data")
        if not isinstance(entries, list):
            raise ServiceError(
                f"{endpoint.base} is no OpenAI-compatible server: /models lists nothing; check {flags.url_flag}"
            )
        served = {str(entry["id"]): entry for entry in entries if isinstance(entry, dict) and entry.get("id")}
        listing = ", ".join(sorted(served)) or "none"
        if flags.model is not None and flags.model not in served:
            raise ServiceError(
                f"{endpoint.base} serves no model {flags.model!r}; it serves: {listing}. "
                f"Set {flags.model_flag} to one of them"
            )
        if flags.model is None and len(served) != 1:
            raise ServiceError(
                f"{endpoint.base} serves {len(served)} models ({listing}); name one with {flags.model_flag}"
            )
        return served[flags.model] if flags.model is not None else next(iter(served.values()))

    def _explain(self, endpoint: Endpoint, failure: Failure) -> str:
        """A start-up failure in words that name the way out."""
        flags, detail = self.settings, failure.missing.detail
        if failure.status in (401, 403):
            return (
                f"{endpoint.base} rejects the key ({detail}); "
                f"set the environment variable {flags.key_variables[0]} to the server's key"
            )
        if failure.status == 404:
            advice = f"the base URL of {flags.url_flag} usually ends in /v1"
            return f"{endpoint.base}/models does not exist ({detail}); {advice}"
        if failure.missing.reason is MissingReason.CONNECTION:
            return f"cannot connect to {endpoint.base} ({detail}); start the server or correct {flags.url_flag}"
        if failure.missing.reason is MissingReason.TIMEOUT:
            return f"{endpoint.base} does not answer ({detail}); is it still loading, or is {flags.url_flag} wrong?"
        if failure.missing.reason is MissingReason.MALFORMED:
            return f"{endpoint.base} is no OpenAI-compatible server ({detail}); check host and port of {flags.url_flag}"
        return f"{endpoint.base} cannot be used ({detail}); check {flags.url_flag}"
