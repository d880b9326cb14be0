"""Flags and YAML files to one Config, and the message of each wrong one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sip.config.cli import parse_config
from megatron_sip.config.fields import settings
from megatron_sip.config.groups import Config
from megatron_sip.errors import ConfigError


def _yaml(folder: Path, text: str, name: str = "run.yaml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def _error(arguments: list[str]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(arguments)
    return str(caught.value)


def test_no_flags_give_the_defaults() -> None:
    assert parse_config([]) == Config()


def test_flags_of_each_kind() -> None:
    config = parse_config(
        "--tensor-model-parallel-size 2 --lr 5e-4 --bf16 --no-sequence-parallel --objective rf-nll "
        "--data-path one two --pool original rewrite --judge-url http://a/v1 --save=out --num-layers 6".split()
    )
    assert config.parallel.tensor_model_parallel_size == 2
    assert config.optimizer.lr == pytest.approx(5e-4)
    assert config.training.bf16
    assert not config.parallel.sequence_parallel
    assert config.training.objective == "rf-nll"
    assert config.data.data_path == ("one", "two")
    assert config.preference.pool == ("original", "rewrite")
    assert config.judge.judge_url == ("http://a/v1",)
    assert config.checkpoint.save == "out"
    assert config.model.num_layers == 6


def test_underscores_are_hyphens_and_the_last_flag_wins() -> None:
    assert parse_config(["--micro_batch_size", "2", "--micro-batch-size", "4"]).training.micro_batch_size == 4


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--untie-embeddings-and-output-weights"], True),
        (["--untie-embeddings-and-output-weights", "--bf16"], True),
        (["--untie-embeddings-and-output-weights", "false"], False),
        (["--untie-embeddings-and-output-weights=None"], None),
        (["--no-untie-embeddings-and-output-weights"], False),
        ([], None),
    ],
)
def test_the_switch_that_may_be_unset(arguments: list[str], expected: bool | None) -> None:
    assert parse_config(arguments).model.untie_embeddings_and_output_weights is expected


def test_none_in_any_case_unsets() -> None:
    assert parse_config(["--model-preset", "none", "--save", "NONE"]).model.model_preset is None


def test_none_stays_a_word_where_it_is_a_choice() -> None:
    assert parse_config(["--curriculum", "none"]).preference.curriculum == "none"


def test_flags_win_over_yaml_and_later_files_over_earlier_ones(tmp_path: Path) -> None:
    first = _yaml(tmp_path, "micro_batch_size: 2\nglobal-batch-size: 32\nseed: 1\n", "first.yaml")
    second = _yaml(tmp_path, "seed: 2\npool: [original, rewrite]\n", "second.yaml")
    config = parse_config(["--config", first, second, "--micro-batch-size", "4", "--pool", "rollout"])
    assert config.training.micro_batch_size == 4
    assert config.training.global_batch_size == 32
    assert config.training.seed == 2
    assert config.preference.pool == ("rollout",)


def test_yaml_values_of_each_kind(tmp_path: Path) -> None:
    text = """
model: {num_layers: null, untie_embeddings_and_output_weights: true}
reference: {reference: frozen}
lr: 5e-6
bf16: true
sequence_parallel: no
data_path: corpus
judge-url: [http://a/v1, "http://b/v1"]
wandb_exp_name: 17
save: "-odd=name"
"""
    config = parse_config(["--config", _yaml(tmp_path, text)])
    assert config.model.num_layers is None
    assert config.model.untie_embeddings_and_output_weights is True
    assert config.reference.reference == "frozen"
    assert config.optimizer.lr == pytest.approx(5e-6)
    assert config.training.bf16
    assert not config.parallel.sequence_parallel
    assert config.data.data_path == ("corpus",)
    assert config.judge.judge_url == ("http://a/v1", "http://b/v1")
    assert config.logging.wandb_exp_name == "17"
    assert config.checkpoint.save == "-odd=name"


def test_a_name_is_a_group_or_a_setting_by_what_it_holds(tmp_path: Path) -> None:
    assert parse_config(["--config", _yaml(tmp_path, "reference: periodic\n")]).reference.reference == "periodic"


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert parse_config(["--config", _yaml(tmp_path, "# nothing\n")]) == Config()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--micro-batch-siz", "2"], ["unknown flag --micro-batch-siz", "did you mean --micro-batch-size?"]),
        (["--tensor-parallel-size=2"], ["--tensor-parallel-size", "--tensor-model-parallel-size"]),
        (["--no-micro-batch-size"], ["unknown flag --no-micro-batch-size"]),
        (["--micro-batch-size", "two"], ["--micro-batch-size", "'two'"]),
        (["--micro-batch-size", "2.5"], ["--micro-batch-size", "'2.5'"]),
        (["--num-layers", "few"], ["--num-layers", "'few'"]),
        (["--lr"], ["--lr", "Missing value"]),
        (["--objective", "ppo"], ["--objective", "'ppo'", "online-dpo"]),
        (["--pool", "original", "human"], ["--pool", "human"]),
        (["stray"], ["stray"]),
    ],
)
def test_a_wrong_flag_is_named_in_one_line(arguments: list[str], words: list[str]) -> None:
    message = _error(arguments)
    assert all(word in message for word in words), message
    assert "\n" not in message
    assert "│" not in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("micro_batch_siz: 2", ["unknown key micro_batch_siz", "did you mean micro_batch_size?"]),
        ("training: {trainiters: 2}", ["unknown key trainiters", "did you mean train_iters?"]),
        ("trainin: {seed: 2}", ["unknown key trainin", "did you mean training?"]),
        ("micro_batch_size: two", ["key micro_batch_size", "'two'"]),
        ("seed: 5\nobjective: ppo", ["key objective", "'ppo'"]),
        ("micro_batch_size: null", ["key micro_batch_size", "null"]),
        ("micro_batch_size: [1, 2]", ["key micro_batch_size", "a list"]),
        ("save: yes", ["key save", "True"]),
        ("bf16: 1", ["key bf16", "true or false"]),
        ("data_path: [--bf16]", ["key data_path", "hyphen"]),
        ("save: 2026-11-21", ["key save", "quotes"]),
        ("lr: {peak: 1}", ["lr holds a mapping"]),
        ("training: {data: {seed: 2}}", ["training.data", "one level"]),
        ("seed: 1\nseed: 2", ["seed", "twice"]),
        ("micro_batch_size: 1\nmicro-batch-size: 2", ["micro_batch_size", "twice"]),
        ("seed: 1\ntraining: {seed: 2}", ["seed", "twice"]),
        ("- seed", ["mapping", "list"]),
        ("seed: [1", ["not valid YAML"]),
        ("save: !!python/object/apply:os.getcwd []", ["not valid YAML"]),
    ],
)
def test_a_wrong_yaml_file_is_named_with_its_key(tmp_path: Path, text: str, words: list[str]) -> None:
    path = _yaml(tmp_path, text)
    message = _error(["--config", path])
    assert all(word in message for word in [path, *words]), message
    assert "\n" not in message


def test_a_missing_yaml_file(tmp_path: Path) -> None:
    assert "absent.yaml cannot be read" in _error(["--config", str(tmp_path / "absent.yaml")])


@pytest.mark.parametrize("name", ["judge_api_key", "hf_token", "password", "client-secret"])
def test_secrets_are_refused_and_not_repeated(tmp_path: Path, name: str) -> None:
    for arguments in (
        ["--" + name.replace("_", "-"), "sk-hidden"],
        ["--config", _yaml(tmp_path, f"{name}: sk-hidden\n")],
        ["--config", _yaml(tmp_path, f"judge: {{{name}: sk-hidden}}\n")],
    ):
        message = _error(arguments)
        assert "JUDGE_API_KEY" in message
        assert "sk-hidden" not in message


@pytest.mark.parametrize(
    "url",
    ["http://me:hidden@judge:8100/v1", "http://judge:8100/v1?key=hidden", "http://judge:8100/v1#hidden?a=http://b"],
)
def test_a_url_with_what_may_be_a_key_is_refused_and_not_repeated(url: str) -> None:
    # Also where no judge is asked: the resolved configuration is printed and saved all the same.
    message = _error(["--objective", "ntp", "--judge-url", url])
    assert "--judge-url http://judge:8100/v1" in message
    assert "hidden" not in message


def _help(rank: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from megatron_sip.config.cli import parse_config; parse_config(sys.argv[1:])"
    environment = os.environ | {"COLUMNS": "100", "RANK": rank, "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(
        [sys.executable, "-c", code, "--help"], capture_output=True, text=True, env=environment, check=False
    )


def test_help_is_grouped_complete_and_fits_100_columns() -> None:
    shown = _help("0")
    assert shown.returncode == 0
    groups = ("model", "parallel", "data", "training", "optimizer", "rollout", "preference", "judge", "checkpoint")
    assert all(f"─ {group} options ─" in shown.stdout for group in groups)
    missing = [setting.flag for setting in settings().values() if setting.flag not in shown.stdout]
    assert not missing
    assert max(len(line) for line in shown.stdout.splitlines()) <= 100


def test_help_is_printed_by_one_rank_only() -> None:
    shown = _help("1")
    assert (shown.returncode, shown.stdout, shown.stderr) == (0, "", "")
