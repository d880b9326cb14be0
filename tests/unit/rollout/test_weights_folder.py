"""The folder of the weights that are sent: only the last are kept, and nothing stays behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sip.errors import CheckpointError
from megatron_sip.rollout.weights_folder import WeightsFolder


def test_only_the_last_weights_are_kept(tmp_path: Path) -> None:
    folder = WeightsFolder(str(tmp_path / "weights"))
    paths = [folder.next(f"run-{number}") for number in range(3)]
    for path in paths:
        path.mkdir()
    folder.only_last()
    assert [path.exists() for path in paths] == [False, False, True]
    folder.close()
    assert list((tmp_path / "weights").iterdir()) == []


def test_what_a_killed_run_left_is_removed_and_a_living_one_keeps_its_own(tmp_path: Path) -> None:
    living = WeightsFolder(str(tmp_path)).next("run-1")
    living.mkdir()
    made = "import sys; from megatron_sip.rollout.weights_folder import WeightsFolder as W; W(sys.argv[1]).next('x')"
    root = Path(__file__).resolve().parents[3]
    subprocess.run([sys.executable, "-c", made, str(tmp_path)], check=True, cwd=root)
    assert len(list(tmp_path.iterdir())) == 2
    (tmp_path / "of-somebody-else").mkdir()
    WeightsFolder(str(tmp_path)).close()
    assert living.exists()
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.skipif(os.getuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(CheckpointError, match="--rollout-weights-dir"):
        WeightsFolder(str(tmp_path / "closed" / "weights"))


def test_a_file_in_its_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="--rollout-weights-dir"):
        WeightsFolder(str(tmp_path / "file"))


def test_without_a_name_nobody_else_can_read_it() -> None:
    folder = WeightsFolder(None)
    own = folder.next("run-1").parent
    assert own.stat().st_mode & 0o077 == 0
    folder.close()
    assert not own.exists()
