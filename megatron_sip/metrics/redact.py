"""Takes secrets out of what is sent to or written by a tracker."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from megatron_sip.config.fields import looks_secret, without_secrets

REMOVED = "<removed>"
_SECRET_ENV = re.compile(r"(^|_)(API_?KEY|KEY|TOKEN|SECRET|PASSWORD)$", re.IGNORECASE)


def secrets_in_environment(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Values of the variables that hold keys, such as JUDGE_API_KEY; those under 6 characters are no secrets."""
    found = {value for name, value in environment.items() if _SECRET_ENV.search(name) and len(value) >= 6}
    return tuple(sorted(found, key=len, reverse=True))


def redact(value: Any, secrets: tuple[str, ...] = ()) -> Any:
    """A copy of a configuration without keys.

    Entries named like a key lose their value, URLs lose user, password and query, and every occurrence
    of one of `secrets` in a string is taken out. `judge_max_tokens` or `tokenizer_model` stay.
    """
    if isinstance(value, Mapping):
        return {
            str(name): REMOVED if looks_secret(str(name)) and item is not None else redact(item, secrets)
            for name, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [redact(item, secrets) for item in value]
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, REMOVED)
        return without_secrets(value) if "://" in value else value
    return value
