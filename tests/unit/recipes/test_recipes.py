"""Recipes hold the paper's settings, take overrides, and print what the trainer reads back."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from megatron_sip.config.cli import parse_config
from megatron_sip.config.groups import Config
from megatron_sip.config.presets import resolve_model
from megatron_sip.config.run_config import load_run_config, to_flags
from megatron_sip.config.validate import data_parallel_size, validate
from megatron_sip.errors import ConfigError
from megatron_sip.recipes.__main__ import build, main
from megatron_sip.recipes.llama import (
    llama3_8b_sip,
    llama_1b4_from_scratch,
    llama_1b4_sip,
    llama_tiny_smoke,
    recipe_of_preset,
    recipes,
)
from megatron_sip.recipes.nemo import nemo_run_task
from megatron_sip.recipes.overrides import apply_overrides

NEEDED = ["data_path=[corpus]", "tokenizer_model=tokenizer", "judge_url=http://127.0.0.1:8100/v1"]


def test_the_continual_run_is_the_papers() -> None:
    config = llama_1b4_sip()
    assert config.training.objective == "online-dpo"
    assert (config.training.train_iters, config.training.global_batch_size) == (2000, 256)
    assert (config.rollout.num_rollouts, config.rollout.temperature, config.rollout.top_p) == (16, 1.0, 1.0)
    assert (config.data.seq_length, config.data.suffix_length, config.data.split_mode) == (2048, 128, "random")
    assert config.optimizer.lr == pytest.approx(5e-6)
    assert (config.optimizer.lr_decay_style, config.optimizer.lr_warmup_iters) == ("cosine", 100)
    # None means a tenth of the peak, over all steps.
    assert (config.optimizer.min_lr, config.optimizer.lr_decay_iters) == (None, None)
    assert config.preference.scoring == "all-pairs"


def test_the_run_from_scratch_is_the_papers() -> None:
    config = llama_1b4_from_scratch()
    assert config.training.objective == "rf-nll"
    assert (config.training.train_iters, config.training.global_batch_size) == (21_000, 256)
    assert config.optimizer.lr == pytest.approx(5e-4)
    assert config.optimizer.lr_warmup_iters == 2000
    assert config.rollout.num_rollouts == 1
    assert set(config.preference.pool) == {"rewrite", "rollout"}


@pytest.mark.parametrize(
    ("goal", "pool", "weights"),
    [
        ("quality", {"rollout"}, (1, 0, 0)),
        ("factuality", {"rollout"}, (0, 1, 0)),
        ("safety", {"original", "rollout"}, (1, 0, 1)),
    ],
)
def test_goals_choose_pool_and_judges(goal: str, pool: set[str], weights: tuple[int, int, int]) -> None:
    config = build("llama3_2_1b_sip", goal=goal)  # type: ignore[arg-type]
    judge = config.judge
    assert set(config.preference.pool) == pool
    assert (judge.quality_weight, judge.factuality_weight, judge.safety_weight) == weights


@pytest.mark.parametrize("name", recipes())
@pytest.mark.parametrize("ranks", [8, 64])
def test_every_recipe_validates_on_one_node_and_on_64_gpus(name: str, ranks: int) -> None:
    if name == "llama_tiny_smoke":
        ranks = 2
    config = build(name, NEEDED)
    validate(config, ranks)
    resolved = resolve_model(config, 32_000)
    validate(resolved, ranks)
    assert data_parallel_size(resolved, ranks) >= 1


def test_the_smoke_recipe_needs_no_server() -> None:
    validate(apply_overrides(llama_tiny_smoke(), NEEDED[:2]), 2)


@pytest.mark.parametrize("name", recipes())
def test_flags_and_yaml_give_the_recipe_back(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = build(name, NEEDED)
    assert parse_config(to_flags(expected)) == expected
    assert main([name, *NEEDED, "--print-flags"]) == 0
    assert parse_config(capsys.readouterr().out.splitlines()) == expected
    assert main([name, *NEEDED, "--yaml", str(tmp_path / "recipe.yaml")]) == 0
    assert load_run_config(tmp_path / "recipe.yaml") == expected
    assert main([name, *NEEDED]) == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out, encoding="utf-8")
    assert load_run_config(tmp_path / "printed.yaml") == expected


def test_overrides_of_each_kind() -> None:
    config = apply_overrides(
        llama_1b4_sip(),
        [
            "micro_batch_size=2",
            "global-batch-size=64",
            "training.seed=7",
            "bf16=false",
            "lr=1e-5",
            "pool=[original, rollout]",
            "judge_url=http://a:1/v1",
            "save=runs/a=b: c",
            "rope_scaling_factor=none",
            "micro_batch_size=4",
        ],
    )
    assert (config.training.micro_batch_size, config.training.global_batch_size, config.training.seed) == (4, 64, 7)
    assert not config.training.bf16
    assert config.optimizer.lr == pytest.approx(1e-5)
    assert config.preference.pool == ("original", "rollout")
    assert config.judge.judge_url == ("http://a:1/v1",)
    assert config.checkpoint.save == "runs/a=b: c"
    assert config.training.train_iters == 2000, "what is not overridden stays the recipe's"


def test_no_override_changes_nothing() -> None:
    assert apply_overrides(llama3_8b_sip(), []) == llama3_8b_sip()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("micro_batch_siz=2", ["unknown key micro_batch_siz", "did you mean micro_batch_size?"]),
        ("micro=2", ["unknown key micro", "did you mean micro_batch_size?"]),
        ("micro_batch_size", ["no KEY=VALUE"]),
        ("micro_batch_size=two", ["micro_batch_size", "'two'"]),
        ("train.seed=1", ["no group train", "training"]),
        ("data.seed=1", ["seed belongs to training"]),
        ("pool=[original", ["pool", "not valid YAML"]),
        ("pool=[human]", ["pool", "human"]),
        ("bf16=2", ["bf16", "true or false"]),
        ("judge_api_key=sk-hidden", ["JUDGE_API_KEY"]),
    ],
)
def test_wrong_overrides_are_named(override: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["llama_1b4_sip", override]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert all(word in shown.err for word in words), shown.err
    assert "sk-hidden" not in shown.err
    assert len(shown.err.splitlines()) == 1


def test_a_preset_names_its_recipe() -> None:
    assert all(build(name).model.model_preset == name for name in recipe_of_preset())
    assert build("llama3-8b", goal="safety") == llama3_8b_sip("safety")


def test_unknown_recipes_and_goals_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["llama_8b_sip"]) == 2
    assert "did you mean llama3_8b_sip?" in capsys.readouterr().err
    assert main(["llama_tiny_smoke", "--goal", "safety"]) == 2
    assert "has no --goal" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["llama_1b4_sip", "--yaml", str(tmp_path / "absent" / "recipe.yaml")]) == 2
    assert "--yaml" in capsys.readouterr().err


def test_the_nemo_run_task_carries_the_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("nemo_run")
    module.Script = SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nemo_run", module)
    config = replace(Config(), training=replace(Config().training, micro_batch_size=2))
    task = nemo_run_task(config)
    assert (task.entrypoint, task.m, task.path) == ("python", True, "megatron_sip.pretrain")
    assert task.args == ["--micro-batch-size=2"]


def test_without_nemo_run_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nemo_run", None)
    with pytest.raises(ConfigError, match=r"megatron-sip\[nemo\]"):
        nemo_run_task(Config())
