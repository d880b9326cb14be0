"""YAML files with settings: read safely, keys checked, values put as flags."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_sip.config.fields import SECRET_HELP, Setting, group_types, looks_secret, nearest, settings
from megatron_sip.errors import ConfigError


@dataclass(frozen=True)
class YamlEntry:
    """One key of a file with its value."""

    source: str
    setting: Setting
    value: Any

    @property
    def where(self) -> str:
        """File and key, for messages."""
        return f"{self.source}, key {self.setting.name}"

    def arguments(self) -> list[str]:
        """The entry as command line arguments.

        Raises:
            ConfigError: a value that the setting cannot take.
        """
        setting, value = self.setting, self.value
        if value is None:
            if not setting.optional:
                raise self._error("is empty (null); give a value or leave the key out")
            return [f"{setting.flag}=None"]
        if setting.is_list:
            values = value if isinstance(value, list) else [value]
            return [setting.flag, *(self._scalar(item) for item in values)]
        if setting.is_bool:
            if not isinstance(value, bool):
                raise self._error(f"is {value!r}; it takes true or false")
            if setting.optional:
                return [f"{setting.flag}={value}"]
            return [setting.flag if value else "--no-" + setting.flag.removeprefix("--")]
        return [f"{setting.flag}={self._scalar(value)}"]

    def _scalar(self, value: Any) -> str:
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            what = "a list" if isinstance(value, list) else repr(value)
            takes = "a list of values" if self.setting.is_list else "one value"
            raise self._error(f"holds {what}; it takes {takes}, in quotes where YAML reads it as something else")
        if self.setting.is_list and str(value).startswith("-"):
            raise self._error(f"holds {value!r}; such a value must not begin with a hyphen")
        return str(value)

    def _error(self, text: str) -> ConfigError:
        return ConfigError(f"{self.where} {text}")


class _UniqueKeyLoader(yaml.SafeLoader):
    """The safe loader; a key that stands twice is an error instead of a silent overwrite."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """A mapping whose keys differ."""
        seen: set[str] = set()
        for key_node, _ in node.value:
            name = str(key_node.value)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {name} stands twice", key_node.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def read_entries(path: Path) -> list[YamlEntry]:
    """The settings of a YAML file.

    The file is a mapping of keys to values; keys may stand under the name of their group (`model:`,
    `training:` and so on, one level), and be spelt with hyphens.

    Raises:
        ConfigError: the file cannot be read, is no such mapping, or has an unknown or doubled key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return entries_of(text, str(path))


def entries_of(text: str, source: str) -> list[YamlEntry]:
    """As `read_entries`, from the text of a file; `source` names it in messages.

    Raises:
        ConfigError: as `read_entries`.
    """
    try:
        raw = yaml.load(text, _UniqueKeyLoader)  # a subclass of the safe loader
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not valid YAML: {_one_line(error)}") from error
    if raw is None:
        return []
    if not isinstance(raw, dict):
        raise ConfigError(f"{source} must be a mapping of settings (micro_batch_size: 2), not a {type(raw).__name__}")
    entries: dict[str, YamlEntry] = {}
    for key, value in _flat(raw, source):
        setting = find_setting(key, source)
        if setting.name in entries:
            raise ConfigError(f"{source}: {setting.name} is given twice; keep one")
        entries[setting.name] = YamlEntry(source, setting, value)
    return list(entries.values())


def _one_line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or "it cannot be parsed"
    return f"{problem} in line {mark.line + 1}" if mark else str(problem)


def _flat(raw: dict[Any, Any], source: str) -> Iterator[tuple[str, Any]]:
    """Keys and values with the one allowed level of groups taken away."""
    for key, value in raw.items():
        if not isinstance(value, dict):
            yield str(key), value
            continue
        if key not in group_types():
            find_setting(str(key), source)  # a setting, or the better message for an unknown key
            raise ConfigError(f"{source}: {key} holds a mapping; only {', '.join(group_types())} group settings")
        for inner, inner_value in value.items():
            if isinstance(inner_value, dict):
                raise ConfigError(f"{source}: {key}.{inner} holds a mapping; settings are grouped one level deep")
            yield str(inner), inner_value


def find_setting(key: str, source: str) -> Setting:
    """The setting that a key names, with hyphens or underscores; `source` is what the message says first.

    Raises:
        ConfigError: there is none; the message names the nearest.
    """
    name = key.replace("-", "_")
    table = settings()
    if name in table:
        return table[name]
    if looks_secret(name):
        raise ConfigError(f"{source}: {key} is no setting: {SECRET_HELP}")
    guess = nearest(name, [*table, *group_types()])
    raise ConfigError(f"{source}: unknown key {key}" + (f"; did you mean {guess}?" if guess else ""))
