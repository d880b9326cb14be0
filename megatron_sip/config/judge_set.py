"""`--judge-set`: several judges, each with its own weight, servers and reading, over the flags that hold for all.

    --judge-url http://a:8100/v1 --safety-weight 1
    --judge-set safety.url=http://s:8100/v1 safety.votes=5 quality-b.kind=quality quality-b.weight=0.5

The names quality, safety, factuality, likelihood, reward and classifier are there without being named; any other name
makes a further judge and needs a kind. Pure: nothing is connected here.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal
from urllib.parse import urlsplit

from megatron_sip.config.fields import flag_of, looks_secret, nearest, without_secrets
from megatron_sip.config.groups import JudgeConfig
from megatron_sip.config.ranges import wanted_range
from megatron_sip.errors import ConfigError

JudgeKind = Literal["quality", "safety", "factuality", "likelihood", "reward", "classifier"]
KINDS: tuple[JudgeKind, ...] = typing.get_args(JudgeKind)
CHAT_KINDS = ("quality", "safety", "factuality")
PAIRWISE_KINDS = ("quality",)
SAFETY_KINDS = ("safety", "classifier")
"""Kinds whose score tells how safe a text is, by which a screen may go."""

_ASKED = ("weight", "interval")
_SERVER = ("url", "model", "max_context", "concurrency", "timeout", "retries")
_CHAT = ("reading", "votes", "temperature", "top_p", "max_tokens", "reasoning_effort")
_FIELDS: dict[JudgeKind, tuple[str, ...]] = {
    "quality": (*_ASKED, *_SERVER, *_CHAT, "option_order"),
    "safety": (*_ASKED, *_SERVER, *_CHAT),
    "factuality": (*_ASKED, *_SERVER, *_CHAT),
    "likelihood": (*_ASKED, *_SERVER),
    "reward": (*_ASKED, *_SERVER, "input", "route", "label", "scale", "offset"),
    "classifier": (*_ASKED, "classifier", "classifier_path"),
}
_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
# The journal keeps rewrites beside verdicts, by the name of who answered.
_TAKEN_NAME = "rewriter"
_WEIGHT_OF_A_NEW_JUDGE = 1.0
_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class JudgeSettings:
    """All that holds for one judge, with nothing left to look up.

    `url` are base URLs; `timeout` is in seconds. A field that its kind does not use holds the setting for all.
    `votes` is 1 where the same question again would have the same answer, whatever `wanted_votes` says. `own` names
    the fields that `--judge-set` gave for this very judge. `shares_key` tells whether all its servers are hosts of
    `--judge-url`, whose key they may know.
    """

    name: str
    kind: JudgeKind
    weight: float
    interval: int
    url: tuple[str, ...]
    model: str | None
    max_context: int | None
    concurrency: int
    timeout: float
    retries: int
    reading: Literal["generate", "logit"]
    votes: int
    wanted_votes: int
    temperature: float
    top_p: float
    max_tokens: int
    reasoning_effort: str | None
    option_order: Literal["random", "both"]
    input: Literal["text", "chat"]
    route: Literal["classify", "score"]
    label: int | None
    scale: float
    offset: float
    classifier: Literal["profanity-check", "toxic-bilstm"]
    classifier_path: str | None
    own: frozenset[str] = frozenset()
    shares_key: bool = True

    @property
    def pairwise(self) -> bool:
        """Whether it compares two candidates."""
        return self.kind in PAIRWISE_KINDS

    @property
    def served(self) -> bool:
        """Whether a server answers for it."""
        return self.kind != "classifier"

    @property
    def key_variables(self) -> tuple[str, ...]:
        """Environment variables that may hold its key, the first that is set counts; there is no other place."""
        return (_key_variable(self.name), "JUDGE_API_KEY") if self.shares_key else (_key_variable(self.name),)

    def flag(self, field: str) -> str:
        """Where the value of `field` comes from, for messages."""
        return f"--judge-set {self.name}.{_shown(field)}" if field in self.own else flag_of(_flat(self.kind, field))


def resolve_judges(judge: JudgeConfig) -> list[JudgeSettings]:
    """Every judge that there is, those of weight 0 too: first the built-in ones, then the others in their order.

    Raises:
        ConfigError: an entry of `--judge-set` that is no NAME.FIELD=VALUE, with an unknown name or field (the nearest
            is named), a value that the field does not take, or a field that stands twice.
    """
    own: dict[str, dict[str, str]] = {}
    for text in judge.judge_set:
        name, field, value = _split(text)
        fields = own.setdefault(name, {})
        if field in fields:
            raise ConfigError(f"--judge-set gives {name}.{_shown(field)} twice; keep one")
        fields[field] = value
    kinds: dict[str, JudgeKind] = {kind: kind for kind in KINDS}
    for name, fields in own.items():
        kinds[name] = _kind(name, fields, [*KINDS, *(other for other in own if "kind" in own[other])])
    return [_resolve(judge, name, kind, own.get(name, {})) for name, kind in kinds.items()]


def active_judges(judge: JudgeConfig) -> list[JudgeSettings]:
    """The judges of weight above 0. ConfigError as `resolve_judges`."""
    return [settings for settings in resolve_judges(judge) if settings.weight > 0]


def _split(text: str) -> tuple[str, str, str]:
    """Name, field (with underscores) and value of one entry. What may be a key is in no message."""
    place, equals, value = text.partition("=")
    name, dot, field = place.partition(".")
    if not equals or not dot:
        raise ConfigError(f"--judge-set {without_secrets(place)}: write NAME.FIELD=VALUE, as in safety.votes=5")
    if not _NAME.fullmatch(name) or name == _TAKEN_NAME:
        raise ConfigError(
            f"--judge-set {place}: {name!r} cannot be a judge's name; take lower-case letters, digits and single "
            f"hyphens, and not {_TAKEN_NAME}"
        )
    return name, field.replace("-", "_"), value.strip()


def _kind(name: str, fields: Mapping[str, str], known: Sequence[str]) -> JudgeKind:
    """The kind of a judge: its own name for a built-in one, its `kind` for any other."""
    given = fields.get("kind")
    if name in KINDS:
        if given not in (None, name):
            raise ConfigError(
                f"--judge-set {name}.kind={given}: {name} is of its own kind; give the judge another name"
            )
        return name
    if given is None:
        guess = nearest(name, [other for other in known if other != name])
        hint = f"; did you mean {guess}?" if guess else "."
        raise ConfigError(
            f"--judge-set {name}.{_shown(next(iter(fields)))}: there is no judge {name}{hint} A judge of your own "
            f"needs {name}.kind=KIND, one of {', '.join(KINDS)}"
        )
    if given not in KINDS:
        raise ConfigError(f"--judge-set {name}.kind={given}: {_one_of(given, KINDS)}")
    return given


def _resolve(judge: JudgeConfig, name: str, kind: JudgeKind, given: Mapping[str, str]) -> JudgeSettings:
    own = {field: _value(name, kind, field, text) for field, text in given.items() if field != "kind"}
    fields = [*_ASKED, *_SERVER, *_CHAT, "option_order", *_FIELDS["reward"], *_FIELDS["classifier"]]
    values = {field: getattr(judge, _flat(kind, field)) for field in fields if field != "weight"}
    values["weight"] = getattr(judge, _flat(kind, "weight")) if name in KINDS else _WEIGHT_OF_A_NEW_JUDGE
    if kind == "classifier":
        values["interval"] = 1  # it costs next to nothing
    if "url" in own:  # the name and context of another server's model say nothing of this one's
        values |= {"model": None, "max_context": None}
    values |= own
    values["wanted_votes"] = values["votes"]
    if values["reading"] == "logit" or values["temperature"] == 0:
        values["votes"] = 1
    if values["option_order"] == "auto":
        values["option_order"] = "both" if values["reading"] == "logit" else "random"
    shares_key = on_hosts_of(values["url"], judge.judge_url)
    return JudgeSettings(name=name, kind=kind, own=frozenset(own), shares_key=shares_key, **values)


def on_hosts_of(urls: Sequence[str], others: Sequence[str]) -> bool:
    """Whether each of `urls` agrees with some of `others` in scheme, host and port, so that it may know their key."""
    return {_host(url) for url in urls} <= {_host(url) for url in others}


def _host(url: str) -> tuple[str, str, int] | str:
    """Scheme, host and port of a base URL; a text that is no URL stands for itself."""
    try:
        parts = urlsplit(url.strip())
        port = parts.port or _PORTS[parts.scheme]
    except (ValueError, KeyError):
        return url
    return parts.scheme, parts.hostname or "", port


def _flat(kind: JudgeKind, field: str) -> str:
    """The setting that holds `field` for all judges of a kind."""
    if field == "weight":
        return f"{kind}_weight"
    if field == "interval" and kind == "likelihood":
        return "likelihood_interval"
    if field in ("classifier", "classifier_path"):
        return field
    return f"reward_{field}" if field in ("input", "route", "label", "scale", "offset") else f"judge_{field}"


def _value(name: str, kind: JudgeKind, field: str, text: str) -> Any:
    """The value of one entry in the type and range of the setting for all."""
    where = f"--judge-set {name}.{_shown(field)}"
    if field not in _FIELDS[kind]:
        if looks_secret(field):
            raise ConfigError(f"{where}: a key is read from the environment only, here from {_key_variable(name)}")
        guess = nearest(field, _FIELDS[kind])
        hint = f"; did you mean {_shown(guess)}?" if guess else "."
        listing = ", ".join(_shown(known) for known in _FIELDS[kind])
        raise ConfigError(f"{where}: a judge of kind {kind} has no such field{hint} It has {listing}")
    setting = _flat(kind, field)
    hint = _hints()[setting]
    members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if type(None) in members and text.lower() in ("none", "null"):
        return None
    value = _parse(next(member for member in members if member is not type(None)), text, where)
    wanted = wanted_range(setting, value) if isinstance(value, int | float) else None
    if wanted:
        raise ConfigError(f"{where}={text}: it must be {wanted}")
    return value


def _parse(kind: Any, text: str, where: str) -> Any:
    if typing.get_origin(kind) is tuple:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if typing.get_origin(kind) is Literal:
        if text not in typing.get_args(kind):
            raise ConfigError(f"{where}={text}: {_one_of(text, typing.get_args(kind))}")
        return text
    if kind is str:
        return text
    try:
        return kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise ConfigError(f"{where}={text}: it must be {what}") from None


def _one_of(text: str, choices: Sequence[str]) -> str:
    guess = nearest(text, choices)
    return (f"did you mean {guess}? " if guess else "") + f"It must be one of {', '.join(choices)}"


def _key_variable(name: str) -> str:
    return f"{name.upper().replace('-', '_')}_JUDGE_API_KEY"


def _shown(field: str) -> str:
    return field.replace("_", "-")


@cache
def _hints() -> dict[str, Any]:
    return typing.get_type_hints(JudgeConfig)
