"""`KEY=VALUE` overrides of a configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from megatron_sip.config.cli import config_from_entries
from megatron_sip.config.fields import Setting, group_types
from megatron_sip.config.groups import Config
from megatron_sip.config.yaml_file import YamlEntry, find_setting
from megatron_sip.errors import ConfigError


def apply_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """`config` with `KEY=VALUE` words on top, the last word on a key winning.

    KEY is a flag's name with underscores or hyphens, bare or under its group (`training.seed`). VALUE is written
    as in YAML: `true`, `none`, `[original, rollout]`; text settings take it as it stands.

    Raises:
        ConfigError: no `=`, an unknown key (the nearest is named), or a value that the setting does not take.
    """
    entries: dict[str, YamlEntry] = {}
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals:
            raise ConfigError(f"override {word!r} is no KEY=VALUE; write for instance micro_batch_size=2")
        entry = _entry(key.strip(), text.strip())
        entries.pop(entry.setting.name, None)
        entries[entry.setting.name] = entry
    return config_from_entries(list(entries.values()), config)


def _entry(key: str, text: str) -> YamlEntry:
    group, dot, name = key.partition(".")
    if dot and group not in group_types():
        raise ConfigError(f"override {key}: there is no group {group}; groups are {', '.join(group_types())}")
    setting = find_setting(name if dot else key, "override")
    if dot and setting.group != group:
        raise ConfigError(f"override {key}: {setting.name} belongs to {setting.group}; write {setting.name}=VALUE")
    return YamlEntry("override", setting, _value(setting, text))


def _value(setting: Setting, text: str) -> Any:
    if setting.optional and text.lower() in ("none", "null"):
        return None
    if setting.is_text and not setting.is_list:
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {setting.name}: {text!r} is not valid YAML; a list is [one, two]") from error
