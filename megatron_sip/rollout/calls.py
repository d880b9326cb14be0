"""Calls to the endpoints of one rollout server, and why it cannot be used."""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any

from megatron_sip.services.client import ServiceClient
from megatron_sip.types import Missing, MissingReason

_HOW_TO_START = "start it with VLLM_SERVER_DEV_MODE=1 (tools/serve_vllm.py --rollouts)"


class UnusableError(Exception):
    """Why a server cannot be used now. `passing`: it may be well again by itself."""

    def __init__(self, text: str, passing: bool = False) -> None:
        super().__init__(text)
        self.passing = passing


@dataclass(frozen=True)
class Reach:
    """How one server is reached: its base URL, a client that repeats a failed call, and one that does not."""

    url: str
    client: ServiceClient
    single: ServiceClient


async def answered(call: Awaitable[dict[str, Any] | Missing], *, development: bool = True) -> dict[str, Any]:
    """What a route answers; `development` ones are there in development mode only.

    Raises:
        UnusableError: the call failed; how to mend it where the route is not there.
    """
    answer = await call
    if not isinstance(answer, Missing):
        return answer
    if development and answer.reason is MissingReason.HTTP_STATUS and answer.detail.startswith("404"):
        raise UnusableError(f"it has no development endpoints ({answer.detail}); {_HOW_TO_START}")
    raise UnusableError(f"it does not answer as it should ({answer.detail})", passing=is_away(answer))


def is_away(missing: Missing) -> bool:
    """Whether the server did not answer at all, or says that it is not ready."""
    return missing.reason in (MissingReason.CONNECTION, MissingReason.TIMEOUT) or missing.detail.startswith("503")
