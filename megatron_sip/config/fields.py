"""The fields of the settings by name: what both the command line and YAML files look up."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

from megatron_sip.config.groups import Config

# Whole words, so that judge_max_tokens or tokenizer_model are no secrets.
_SECRET_WORDS = {"key", "apikey", "token", "secret", "password", "passwd", "credential", "credentials", "authorization"}
SECRET_HELP = (
    "keys and tokens are read from the environment only (JUDGE_API_KEY, REWRITER_API_KEY, ROLLOUT_API_KEY, "
    "WANDB_API_KEY), so that no log, process list or checkpoint holds them"
)


@dataclass(frozen=True)
class Setting:
    """One setting: its group in `Config` and what values it takes."""

    name: str
    group: str
    optional: bool
    """None is a value."""
    is_list: bool
    is_bool: bool
    is_text: bool
    """Free text, in which YAML's numbers keep their spelling."""

    @property
    def flag(self) -> str:
        """The flag on the command line."""
        return flag_of(self.name)


def flag_of(name: str) -> str:
    """`micro_batch_size` as `--micro-batch-size`."""
    return "--" + name.replace("_", "-")


@cache
def group_types() -> dict[str, type[Any]]:
    """The dataclass of each group of `Config`."""
    return dict(typing.get_type_hints(Config))


@cache
def settings() -> dict[str, Setting]:
    """Every setting by its name with underscores."""
    found: dict[str, Setting] = {}
    for group, kind in group_types().items():
        hints = typing.get_type_hints(kind)
        for item in fields(kind):
            found[item.name] = _setting(item.name, group, hints[item.name])
    return found


def _setting(name: str, group: str, hint: Any) -> Setting:
    members: tuple[Any, ...] = (hint,)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        members = typing.get_args(hint)
    kinds = [typing.get_origin(member) or member for member in members]
    return Setting(name, group, type(None) in kinds, tuple in kinds, bool in kinds, str in kinds)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most like `name` or begins with it; None where nothing is near."""
    names = list(known)
    found = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    found += [other for other in names if len(name) >= 3 and other.startswith(name)]
    return found[0] if found else None


def looks_secret(name: str) -> bool:
    """Whether a name that is no setting of ours is meant to hold a key."""
    return not _SECRET_WORDS.isdisjoint(re.split(r"[^a-z0-9]+", name.lower()))


def without_secrets(url: str) -> str:
    """The URL without what may hold a key: `user:password@`, query and fragment. It need not be a sound URL."""
    bare = re.split(r"[?#]", url, maxsplit=1)[0]
    scheme, mark, rest = bare.partition("://")
    if not mark:
        return bare.rpartition("@")[2]
    authority, slash, path = rest.partition("/")
    return scheme + mark + authority.rpartition("@")[2] + slash + path
