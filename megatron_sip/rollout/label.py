"""The name that weights have on a rollout server, which tells whose they are and whether they were proven.

    3f9c.2/9b1e-7           weights 9b1e-7 of a run, proven in the second attempt of a sender
    3f9c.2/9b1e-7/loading   that attempt is under way
    3f9c.2/9b1e-7/failed    it failed, and the server may have half of the weights

A server keeps it in memory only, so one that was started anew has lost it. No two attempts share a label: one that is
the same before and behind some rollouts says that nobody sent weights in between, not even the same ones again.
"""

from __future__ import annotations

_LOADING, _FAILED = "loading", "failed"


def proven_label(version: str, attempt: str) -> str:
    """Of weights that were proven in this attempt."""
    return f"{attempt}/{version}"


def loading_label(version: str, attempt: str) -> str:
    """Of a server whose weights are replaced in this attempt, and are nobody's until they are proven."""
    return f"{proven_label(version, attempt)}/{_LOADING}"


def failed_label(version: str, attempt: str) -> str:
    """Of a server whose weights are nobody's, and which nobody is about to give others."""
    return f"{proven_label(version, attempt)}/{_FAILED}"


def is_proven(label: str, version: str) -> bool:
    """Whether a server with this label has these weights whole."""
    _, slash, rest = label.partition("/")
    return bool(slash) and rest == version


def loaded_by(label: str, version: str) -> str | None:
    """The sender who loads these weights there; None where nobody does."""
    attempt, slash, rest = label.partition("/")
    return attempt.partition(".")[0] if slash and rest == f"{version}/{_LOADING}" else None
