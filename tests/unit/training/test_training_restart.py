"""What a worker group that torchrun started again loads."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pytest

from megatron_sip.checkpoint.latest import newest_whole
from megatron_sip.config.groups import CheckpointConfig, Config, ModelConfig
from megatron_sip.config.run_config import save_run_config
from megatron_sip.training import restart
from megatron_sip.training.restart import continued

RESOLVED = ModelConfig(num_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=2)


def problem_of(folder: Path) -> str | None:
    """Whole is what has its run_config.yaml; the tests of manifests tell what else must be there."""
    return None if (folder / "run_config.yaml").is_file() else "run_config.yaml is missing"


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a checkpoint of iteration 20."""
    monkeypatch.setattr(restart, "newest_whole", partial(newest_whole, problem_of=problem_of))
    folder = tmp_path / "iter_0000020"
    folder.mkdir()
    save_run_config(Config(model=RESOLVED), folder / "run_config.yaml")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("20\n")
    return tmp_path


def test_a_later_start_goes_on_from_what_its_launch_saved(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(checkpoint=CheckpointConfig(save=str(saved), load="/models/base", finetune=True))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    again = continued(config, print)
    assert again.checkpoint == replace(config.checkpoint, load=str(saved), finetune=False)
    assert again.model == RESOLVED
    assert replace(again, model=config.model, checkpoint=config.checkpoint) == config


def test_a_damaged_one_is_passed_over(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    (saved / "iter_0000030").mkdir()
    (saved / "latest_checkpointed_iteration.txt").write_text("30\n")
    said: list[str] = []
    assert continued(Config(checkpoint=CheckpointConfig(save=str(saved))), said.append).model == RESOLVED
    assert "iter_0000030 is damaged" in said[0]


def test_one_that_a_killed_save_moved_away_is_put_back(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    (saved / "iter_0000020").rename(saved / "iter_0000020.replaced")
    assert continued(Config(checkpoint=CheckpointConfig(save=str(saved))), print).model == RESOLVED


def test_the_first_start_does_as_it_is_told(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(checkpoint=CheckpointConfig(save=str(saved), load="/models/base", finetune=True))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert continued(config, print) == config


def test_a_checkpoint_of_an_earlier_launch_is_none_of_ours(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    before = psutil.Process(os.getppid()).create_time() - 60
    os.utime(saved / "latest_checkpointed_iteration.txt", (before, before))
    config = Config(checkpoint=CheckpointConfig(save=str(saved), load="/models/base"))
    assert continued(config, print) == config


def test_a_launch_that_saved_nothing_yet_begins_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    for checkpoint in (CheckpointConfig(), CheckpointConfig(save=str(tmp_path / "none"))):
        assert continued(Config(checkpoint=checkpoint), print) == Config(checkpoint=checkpoint)
