"""Whether a saved stream position still means the same samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_sip.errors import DataError

_FLAGS = {
    "kind": "--objective (packed next-token windows or cuts)",
    "data_fingerprint": "--data-path (the corpus itself)",
}


def check_same(state: Mapping[str, Any], identity: Mapping[str, Any]) -> int:
    """The consumed samples of `state` if all of `identity` is in it, unchanged.

    Raises:
        DataError: something differs or is not there; the message names each flag with both values.
    """
    differences = []
    for name, now in identity.items():
        if name not in state:
            differences.append(f"{_flag(name)} is not recorded")
        elif state[name] != now:
            differences.append(f"{_flag(name)} was {_short(state[name])} and is {_short(now)}")
    if differences:
        raise DataError(
            "the checkpoint was trained on another stream of samples: "
            + "; ".join(differences)
            + ". Give the settings "
            "of its run_config.yaml, or start anew from its weights with --finetune"
        )
    consumed = state.get("consumed_samples")
    if not isinstance(consumed, int) or consumed < 0:
        raise DataError(f"the checkpoint's stream position is {consumed!r}, not a count of samples; load another one")
    return consumed


def _flag(name: str) -> str:
    return _FLAGS.get(name, "--" + name.replace("_", "-"))


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 20 else text[:12] + "..."
