"""Command line and YAML files to `Config`, by tyro.

tyro reads the dataclasses themselves (types, defaults and the help text under each field), so that a setting
is written once. A YAML file goes through the same parser: its keys become flags, and what it gives is the
default of the command line, which therefore wins.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import tyro

from megatron_sip.config.fields import (
    SECRET_HELP,
    Setting,
    flag_of,
    group_types,
    looks_secret,
    nearest,
    settings,
    without_secrets,
)
from megatron_sip.config.groups import Config
from megatron_sip.config.yaml_file import YamlEntry, read_entries
from megatron_sip.errors import ConfigError

PROGRAM = "megatron_sip.pretrain"
_DESCRIPTION = "Self-Improving Pretraining on megatron-core, with a judge and a rewriter behind vLLM."
_BORDER = "│| "
_RULE = "╭╮╰╯─+-"


@dataclass(frozen=True)
class _CommandLine(Config):
    """The settings and the files that they may come from."""

    config: tuple[str, ...] = ()
    """YAML files with settings, a key for each flag (micro_batch_size: 2). Flags win over them, later files over
    earlier ones. Keys of servers come from the environment only: JUDGE_API_KEY, REWRITER_API_KEY, ROLLOUT_API_KEY,
    WANDB_API_KEY."""


def parse_config(argv: Sequence[str]) -> Config:
    """The configuration of a command line, with the YAML files that it names under it.

    `--help` prints the flags by topic and exits with status 0 (on rank 0 alone it prints).

    Raises:
        ConfigError: an unknown or wrong flag or key; the message names it, its file, and the nearest real one.
    """
    arguments = _normalise(argv)
    if {"-h", "--help"} & set(arguments):
        _print_help()
    line = _run_tyro(arguments, _CommandLine())
    if line.config:
        below = _CommandLine()
        for file in line.config:
            below = _with_file(Path(file), below)
        line = _run_tyro(arguments, below)
    config = Config(**{name: getattr(line, name) for name in group_types()})
    refuse_secrets(config)
    return config


def config_from_entries(entries: Sequence[YamlEntry], below: Config | None = None) -> Config:
    """The settings of YAML entries on top of `below` (default: our defaults).

    Raises:
        ConfigError: an unknown key or a wrong value; the message names the entry's source and key.
    """
    start = Config() if below is None else below
    line = _CommandLine(**{item.name: getattr(start, item.name) for item in fields(Config)})
    line = _apply(entries, line)
    config = Config(**{name: getattr(line, name) for name in group_types()})
    refuse_secrets(config)
    return config


def refuse_secrets(config: Config) -> None:
    """Raise ConfigError where a server's URL carries what may be a key, which would end in every log."""
    places = [("--judge-url", config.judge.judge_url), ("--rewriter-url", config.rewriter.rewriter_url)]
    for entry in config.judge.judge_set:
        place, _, value = entry.partition("=")
        if place.endswith(".url"):
            places.append((f"--judge-set {place}", tuple(value.split(","))))
    for flag, urls in places:
        for url in urls:
            if without_secrets(url) != url:
                bare = without_secrets(url)
                raise ConfigError(f"{flag} {bare} was given with a user, password, query or fragment; {SECRET_HELP}")


def _with_file(path: Path, below: _CommandLine) -> _CommandLine:
    return _apply(read_entries(path), below)


def _apply(entries: Sequence[YamlEntry], below: _CommandLine) -> _CommandLine:
    """Entries through the parser, all at once; where that fails, one by one to name the key at fault."""
    arguments = [argument for entry in entries for argument in entry.arguments()]
    try:
        return _run_tyro(arguments, below)
    except ConfigError as together:
        for entry in entries:
            try:
                _run_tyro(entry.arguments(), below)
            except ConfigError as error:
                raise ConfigError(f"{entry.where}: {error}") from None
        raise together


def _normalise(argv: Sequence[str]) -> list[str]:
    """Flags checked against the known ones and put into tyro's spelling.

    Underscores in flags are taken as hyphens; `none`, `true` and `false` in any case; and a bare
    `--untie-embeddings-and-output-weights` (a switch in Megatron, with three values here) means true.

    Raises:
        ConfigError: a flag that does not exist, or one that looks like a key.
    """
    result: list[str] = []
    current: Setting | None = None
    for argument in argv:
        if not argument.startswith("--"):
            result.append(_spell(argument, current))
            continue
        _close_switch(result, current)
        flag, equals, value = argument.partition("=")
        flag = flag.replace("_", "-")
        current = _known(flag)
        if current and current.is_bool and current.optional and flag.startswith("--no-"):
            flag, equals, value = current.flag, "=", "False"
        result.append(flag + equals + _spell(value, current) if equals else flag)
    _close_switch(result, current)
    return result


def _close_switch(result: list[str], current: Setting | None) -> None:
    """Give a bare three-valued switch the value True."""
    if current and current.is_bool and current.optional and result[-1] == current.flag:
        result.append("True")


def _spell(value: str, setting: Setting | None) -> str:
    """tyro's own spelling of none, true and false where the setting takes them."""
    if setting is None:
        return value
    words = {"none": "None", "null": "None"} if setting.optional else {}
    if setting.is_bool:
        words |= {"true": "True", "false": "False"}
    return words.get(value.lower(), value)


def _known(flag: str) -> Setting | None:
    """The setting of a flag; None for --help and --config."""
    name = flag.removeprefix("--").replace("-", "_")
    table = settings()
    if name in ("help", "config"):
        return None
    if name in table:
        return table[name]
    positive = table.get(name.removeprefix("no_"))
    if name.startswith("no_") and positive is not None and positive.is_bool:
        return positive
    if looks_secret(name):
        raise ConfigError(f"{flag} is no flag: {SECRET_HELP}")
    guess = nearest(name, [*table, "config"])
    hint = f"; did you mean {flag_of(guess)}?" if guess else ";"
    raise ConfigError(f"unknown flag {flag}{hint} --help lists all flags")


def _run_tyro(arguments: Sequence[str], default: _CommandLine) -> _CommandLine:
    """Parse with tyro; its framed message becomes the text of a ConfigError."""
    shown = io.StringIO()
    try:
        with _columns(200), contextlib.redirect_stderr(shown), contextlib.redirect_stdout(shown):
            return tyro.cli(
                tyro.conf.OmitArgPrefixes[_CommandLine], prog=PROGRAM, args=list(arguments), default=default
            )
    except SystemExit:
        raise ConfigError(_plain(shown.getvalue())) from None


def _print_help() -> None:
    """Print the help once over all ranks and leave."""
    if os.environ.get("RANK", "0") == "0":
        cli: Any = tyro.conf.OmitArgPrefixes[_CommandLine]
        tyro.cli(cli, prog=PROGRAM, description=_DESCRIPTION, args=["--help"])
    sys.exit(0)


def _plain(framed: str) -> str:
    """The first paragraph of tyro's framed message (a title, then paragraphs between lines) as one line."""
    words: list[str] = []
    for line in framed.splitlines()[1:]:
        body = line.strip(_BORDER)
        if body.strip(_RULE):
            words.append(body)
        elif words:
            break
    return " ".join(words).rstrip(".") + "; --help explains each flag"


@contextlib.contextmanager
def _columns(width: int) -> Iterator[None]:
    """Set the width that tyro wraps to, so that a message is not cut by the terminal's."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(width)
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
