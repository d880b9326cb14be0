"""The saved settings read back to the same settings, and never hold a secret."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_sip.config import run_config
from megatron_sip.config.cli import parse_config
from megatron_sip.config.groups import Config
from megatron_sip.config.presets import resolve_model
from megatron_sip.config.run_config import from_yaml, load_run_config, save_run_config, to_yaml
from megatron_sip.errors import ConfigError

UNUSUAL = [
    "--model-preset=llama3.2-1b --bf16 --no-untie-embeddings-and-output-weights --lr 5e-06 --adam-eps 1e-8",
    "--data-path a b --pool rollout --judge-url http://a/v1 http://b:8100/v1 --save out:dir --wandb-exp-name 0017",
    "--save true --load 1e3 --wandb-project 2026-11-21 --wandb-exp-name=- --metrics-file '' --min-lr 0",
    "--objective ntp --curriculum schedule --judge-reasoning-effort low --exit-duration-in-mins 0.1 --judge-timeout 7",
]


def _changed_everywhere() -> Config:
    """Every number, switch and text away from its default, so that a setting that is not written shows."""
    groups: dict[str, Any] = {}
    for group in fields(Config):
        part = getattr(Config(), group.name)
        changes: dict[str, Any] = {}
        for item in fields(part):
            value = getattr(part, item.name)
            if isinstance(value, bool):
                changes[item.name] = not value
            elif isinstance(value, (int, float)):
                changes[item.name] = type(value)(value + 3) if isinstance(value, int) else value + 0.1
            elif item.type == "str | None":
                changes[item.name] = f"{item.name}: #1"
            elif item.type in ("int | None", "float | None"):
                changes[item.name] = 7 if item.type.startswith("int") else 0.3
            elif item.type == "tuple[str, ...]":
                changes[item.name] = ("http://a/v1", "b c")
        groups[group.name] = replace(part, **changes)
    return Config(**groups)


@pytest.mark.parametrize("line", ["", *UNUSUAL])
def test_flags_survive_the_file(tmp_path: Path, line: str) -> None:
    config = parse_config([word.replace("''", "") for word in line.split()])
    path = tmp_path / "run_config.yaml"
    save_run_config(config, path)
    assert load_run_config(path) == config
    assert parse_config(["--config", str(path)]) == config


def test_every_setting_survives_the_file(tmp_path: Path) -> None:
    config = _changed_everywhere()
    save_run_config(config, tmp_path / "run_config.yaml")
    assert load_run_config(tmp_path / "run_config.yaml") == config


def test_a_resolved_model_survives_the_file() -> None:
    config = resolve_model(parse_config(["--model-preset", "llama-tiny"]), 4096)
    assert from_yaml(to_yaml(config), "text") == config


def test_the_file_is_plain_yaml_in_the_order_of_help() -> None:
    raw = yaml.safe_load(to_yaml(Config()))
    assert list(raw) == [group.name for group in fields(Config)]
    assert raw["preference"]["pool"] == ["original", "rollout"]
    assert raw["model"]["num_layers"] is None


def test_what_an_older_version_did_not_write_keeps_its_default() -> None:
    assert from_yaml("training: {seed: 5}\n", "old").training.seed == 5


def test_a_setting_of_a_newer_version_is_named() -> None:
    with pytest.raises(ConfigError, match=r"new\.yaml: unknown key judge_lagg"):
        from_yaml("judge: {judge_lagg: 1}", "new.yaml")


def test_a_password_in_a_url_is_never_written(tmp_path: Path) -> None:
    config = Config()
    config = replace(config, rewriter=replace(config.rewriter, rewriter_url=("http://me:hidden@host/v1",)))
    with pytest.raises(ConfigError, match="--rewriter-url http://host/v1") as caught:
        save_run_config(config, tmp_path / "run_config.yaml")
    assert "hidden" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run_config.yaml"
    save_run_config(Config(), path)
    before = path.read_bytes()

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_config.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_run_config(parse_config(["--seed", "5"]), path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["run_config.yaml"]
