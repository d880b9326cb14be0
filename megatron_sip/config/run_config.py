"""The resolved settings as YAML: printed at the start, saved as `run_config.yaml` in every checkpoint, read back."""

from __future__ import annotations

import os
import tempfile
from dataclasses import asdict
from pathlib import Path

import yaml

from megatron_sip.config.cli import config_from_entries, refuse_secrets
from megatron_sip.config.fields import settings
from megatron_sip.config.groups import Config
from megatron_sip.config.yaml_file import YamlEntry, entries_of, read_entries


def to_yaml(config: Config) -> str:
    """All settings by group, in the order of `--help`; `--config` reads it. It holds no key: there is no such setting.

    Raises:
        ConfigError: a server's URL with a user, password, query or fragment in it.
    """
    refuse_secrets(config)
    plain = {
        group: {name: list(value) if isinstance(value, tuple) else value for name, value in members.items()}
        for group, members in asdict(config).items()
    }
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100)


def to_flags(config: Config) -> list[str]:
    """The command line arguments that give `config`; settings at their defaults are left out.

    Raises:
        ConfigError: a server's URL with a user, password, query or fragment in it.
    """
    refuse_secrets(config)
    default = Config()
    arguments: list[str] = []
    for setting in settings().values():
        value = getattr(getattr(config, setting.group), setting.name)
        if value != getattr(getattr(default, setting.group), setting.name):
            plain = list(value) if isinstance(value, tuple) else value
            arguments += YamlEntry("the configuration", setting, plain).arguments()
    return arguments


def from_yaml(text: str, source: str) -> Config:
    """The settings of a YAML text; `source` names it in messages.

    Raises:
        ConfigError: as `parse_config` with `--config`.
    """
    return config_from_entries(entries_of(text, source))


def save_run_config(config: Config, path: Path) -> None:
    """Write `to_yaml` to `path`, wholly or not at all: an interrupted run leaves no half file."""
    text = to_yaml(config)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load_run_config(path: Path) -> Config:
    """The settings of a file that `save_run_config` wrote; what an older version did not write keeps its default.

    Raises:
        ConfigError: the file cannot be read, or holds what this version does not know.
    """
    return config_from_entries(read_entries(path))
