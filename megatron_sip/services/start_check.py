"""What the first answers of a server tell: the model that is to be used, or what is wrong and how to mend it."""

from __future__ import annotations

from typing import Any

from megatron_sip.errors import ServiceError
from megatron_sip.services.circuit import Endpoint
from megatron_sip.services.endpoint import ClientSettings
from megatron_sip.services.transport import Failure
from megatron_sip.types import MissingReason


def pick_model(endpoint: Endpoint, answer: dict[str, Any], flags: ClientSettings) -> dict[str, Any]:
    """The entry of the wanted model in the answer of /models.

    Raises:
        ServiceError: there is none, or several and no name.
    """
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
        raise ServiceError(f"{endpoint.base} serves {len(served)} models ({listing}); name one with {flags.model_flag}")
    return served[flags.model] if flags.model is not None else next(iter(served.values()))


def tells_tokens(endpoint: Endpoint, answer: dict[str, Any] | Failure, flags: ClientSettings) -> bool:
    """Whether /tokenize is there, by what was answered at that address: not only where the server says so itself.

    Raises:
        ServiceError: it cannot be told. How all verdicts are read depends on it, and each leader asks for itself.
    """
    if not isinstance(answer, Failure):
        return bool(answer.get("tokens")) and isinstance(answer["tokens"], list)
    if answer.again or not (answer.refusal or 400 <= (answer.status or 0) < 500):
        raise ServiceError(
            f"{endpoint.root}/tokenize failed ({answer.missing.detail}), so it is not known how to ask the "
            f"server of {flags.url_flag}; start again when it is well (a server without /tokenize answers 404 there)"
        )
    return False


def explain_failure(endpoint: Endpoint, failure: Failure, flags: ClientSettings) -> str:
    """A failure of /models at the start, in words that name the way out."""
    detail = failure.missing.detail
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
    advice = "start again when it takes calls" if failure.busy else f"check {flags.url_flag}"
    return f"{endpoint.base} cannot be used{' now' if failure.busy else ''} ({detail}); {advice}"
