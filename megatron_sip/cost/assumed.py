"""Numbers that a plan assumes: each is a field with a meaning and a source, a flag, and a line of the result."""

from __future__ import annotations

from dataclasses import field, fields
from typing import Any

from megatron_sip.config.fields import flag_of


def assumed(default: Any, meaning: str, source: str) -> Any:
    """A dataclass field with `default`. `source` says where the number is from; "ours" is a guess of this project."""
    return field(default=default, metadata={"meaning": meaning, "source": source})


def setting(default: Any, meaning: str) -> Any:
    """A dataclass field that the user decides, so that it needs no source."""
    return field(default=default, metadata={"meaning": meaning})


def assumptions(*groups: Any) -> list[dict[str, Any]]:
    """Flag, value, meaning and source of every assumed field of these dataclasses.

    The source of a value that is not the default is "given".
    """
    rows = []
    for group in groups:
        for item in fields(group):
            if "source" not in item.metadata:
                continue
            value = getattr(group, item.name)
            source = item.metadata["source"] if value == item.default else "given"
            rows.append(
                {"flag": flag_of(item.name), "value": value, "meaning": item.metadata["meaning"], "source": source}
            )
    return rows
