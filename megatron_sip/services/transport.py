"""One HTTP exchange with one server: a parsed JSON object, or a failure that says whether to try again."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NoReturn

import aiohttp

from megatron_sip.types import Missing, MissingReason

BODY_LIMIT = 1_000_000
RETRY_STATUSES = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
REFUSALS = frozenset({401, 403, 404, 405, 407, 501})
DETAIL_LIMIT = 300
TOO_LARGE = f"a body of more than {BODY_LIMIT} bytes"


@dataclass(frozen=True)
class Failure:
    """Why one attempt failed. `retry_after` is in seconds, where the server named it."""

    missing: Missing
    again: bool
    status: int | None = None
    retry_after: float | None = None
    server_at_fault: bool = False

    @property
    def refusal(self) -> bool:
        """Whether it speaks of key, address or route, so that another server may well take the same question."""
        return self.status is not None and (300 <= self.status < 400 or self.status in REFUSALS)

    @property
    def busy(self) -> bool:
        """Whether the server itself says that it may take the same call later."""
        return self.status in RETRY_STATUSES

    def counted(self, attempts: int) -> Failure:
        """The same with the number of attempts in its words, where there were several."""
        if attempts < 2:
            return self
        missing = Missing(self.missing.reason, f"{self.missing.detail} (after {attempts} attempts)")
        return replace(self, missing=missing)


async def exchange(
    session: aiohttp.ClientSession,
    method: str,
    url: str,
    body: bytes | None,
    headers: Mapping[str, str],
    seconds: float,
    hide: Callable[[str], str] = str,
) -> dict[str, Any] | Failure:
    """Send one request and read its answer within `seconds`; never raises for what a server or network does.

    `body` is JSON already, with the header that says so among `headers`: a retry need not write it anew.
    `hide` takes the key out of what a server says, before that is cut to a length: half a key is a secret, too.
    """
    answer = await _exchange(session, method, url, body, headers, seconds, hide)
    if not isinstance(answer, Failure):
        return answer
    return replace(answer, missing=Missing(answer.missing.reason, one_line(hide(answer.missing.detail))))


async def _exchange(
    session: aiohttp.ClientSession,
    method: str,
    url: str,
    body: bytes | None,
    headers: Mapping[str, str],
    seconds: float,
    hide: Callable[[str], str],
) -> dict[str, Any] | Failure:
    try:
        async with asyncio.timeout(seconds):
            # Redirects are refused: they could carry the key and the documents to another host.
            async with session.request(method, url, data=body, headers=headers, allow_redirects=False) as response:
                return await _read(response, hide)
    except TimeoutError:
        return _failure(MissingReason.TIMEOUT, f"no whole answer within {seconds:.1f} s", again=True, fault=True)
    except (aiohttp.ClientError, OSError) as error:
        # A reset inside a body arrives here as well (ClientPayloadError).
        detail = f"{type(error).__name__}: {error}"
        return _failure(MissingReason.CONNECTION, detail, again=True, fault=True)
    except ValueError as error:
        # aiohttp raises plain ValueError for some malformed status lines, headers and chunk sizes.
        return _failure(MissingReason.MALFORMED, f"{type(error).__name__}: {error}", again=True, fault=True)


async def _read(response: aiohttp.ClientResponse, hide: Callable[[str], str]) -> dict[str, Any] | Failure:
    """Read and judge one response."""
    if 300 <= response.status < 400:
        return _failure(MissingReason.HTTP_STATUS, f"{response.status}: a redirect, which is refused", response.status)
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        return _failure(MissingReason.MALFORMED, "a compressed body, which was not asked for", response.status)
    raw = await _read_body(response)
    if raw is None:
        response.close()  # the rest of the body is not read, so the connection cannot be kept
        return _failure(MissingReason.MALFORMED, TOO_LARGE, response.status)
    parsed = _parse(raw)
    if response.status == 200:
        if isinstance(parsed, dict):
            return parsed
        return _failure(MissingReason.MALFORMED, describe_body(raw, hide), 200, again=True)
    return _status_failure(response, error_message(parsed) or describe_body(raw, hide))


async def _read_body(response: aiohttp.ClientResponse) -> bytes | None:
    """The body, or None when it is too long; at most the limit and one chunk are held."""
    if response.content_length is not None and response.content_length > BODY_LIMIT:
        return None
    parts: list[bytes] = []
    size = 0
    async for part in response.content.iter_any():
        size += len(part)
        if size > BODY_LIMIT:
            return None
        parts.append(part)
    return b"".join(parts)


def _status_failure(response: aiohttp.ClientResponse, said: str) -> Failure:
    """A status other than 200, and what the server said of it."""
    status = response.status
    reason = MissingReason.HTTP_STATUS
    if status in (400, 413, 422) and any(
        mark in said.lower() for mark in ("context length", "too long", "max_model_len")
    ):
        reason = MissingReason.TOO_LONG
    return Failure(
        missing=Missing(reason, f"{status}: {said}"),
        again=status in RETRY_STATUSES,
        status=status,
        retry_after=parse_retry_after(response.headers.get("Retry-After")),
        server_at_fault=status >= 500,
    )


def _failure(
    reason: MissingReason, detail: str, status: int | None = None, again: bool = False, fault: bool = False
) -> Failure:
    return Failure(Missing(reason, detail), again=again, status=status, server_at_fault=fault)


def one_line(text: str) -> str:
    """The beginning of what a server said, fit for a log: one line, without what moves a terminal's cursor."""
    printable = "".join(character if character.isprintable() else " " for character in text)
    return " ".join(printable.split())[:DETAIL_LIMIT]


def _parse(raw: bytes) -> object:
    """JSON or None. NaN and Infinity are no JSON, and a body nested thousands deep is none of ours."""
    try:
        return json.loads(raw, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def error_message(parsed: object) -> str | None:
    """The message of an error body: `{"error": "text"}`, `{"error": {"message": ...}}` or `{"detail": ...}`."""
    if not isinstance(parsed, dict):
        return None
    error = parsed.get("error", parsed.get("message", parsed.get("detail")))
    if isinstance(error, dict):
        error = error.get("message")
    return str(error) if error else None


def describe_body(raw: bytes, hide: Callable[[str], str] = str) -> str:
    """What an unusable body looks like, in a few words."""
    start = hide(raw.decode("utf-8", "replace"))[:200].strip()
    if not start:
        return "an empty body"
    if start.startswith("<"):
        return "an HTML or XML page instead of JSON"
    return f"no JSON object: {start[:80]!r}"


def parse_retry_after(value: str | None) -> float | None:
    """Seconds to wait from a Retry-After header (a number or an HTTP date), or None."""
    if not value:
        return None
    try:
        return max(0.0, float(value)) if float(value) < float("inf") else None
    except ValueError:
        pass
    try:
        moment = parsedate_to_datetime(value)
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        return max(0.0, (moment - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError, OverflowError):  # OverflowError: an offset that fits no C integer
        return None
