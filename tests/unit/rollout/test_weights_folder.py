"""The folder of the weights that are sent: only the last are kept, and nothing stays behind."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_sip.checkpoint.safetensors_io import new_folder
from megatron_sip.errors import CheckpointError
from megatron_sip.parallel.inquest import Home
from megatron_sip.rollout import vllm
from megatron_sip.rollout.vllm import VllmEngine
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


@pytest.mark.parametrize(
    ("change", "stays"),
    [
        ({}, True),
        ({"started": "1"}, False),  # the number of a process that was killed, which another one has now
        ({"pid": 2**22, "started": "1"}, False),
        ({"pid": 2**22, "machine": "container"}, True),  # whose processes have numbers of their own
        ({"pid": "text"}, True),
        ({"started": ""}, True),
    ],
)
def test_only_what_is_surely_left_is_removed(tmp_path: Path, change: dict[str, Any], stays: bool) -> None:
    folder = tmp_path / "sip-rollout-weights-0123"
    folder.mkdir()
    (folder / "owner.json").write_text(json.dumps({**asdict(Home.here()), **change}))
    WeightsFolder(str(tmp_path)).close()
    assert folder.exists() == stays


def test_a_folder_without_its_owner_stays(tmp_path: Path) -> None:
    """Another run may be about to write it down."""
    (tmp_path / "sip-rollout-weights-0123").mkdir()
    WeightsFolder(str(tmp_path)).close()
    assert (tmp_path / "sip-rollout-weights-0123").exists()


def test_the_weights_go_though_the_connections_do_not_close(tmp_path: Path) -> None:
    engine = object.__new__(VllmEngine)
    engine._folder = WeightsFolder(str(tmp_path / "weights"))

    def fail() -> None:
        raise RuntimeError("a connection")

    engine._fleet = SimpleNamespace(close=fail)  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="a connection"):
        engine.close()
    assert list((tmp_path / "weights").iterdir()) == []


def test_weights_that_find_no_room_name_the_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's folder in memory is small."""

    def full(folder: Path, *_: object, **__: object) -> None:
        with new_folder(folder):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(vllm, "export_hf", full)
    monkeypatch.setattr(vllm, "first_layer", lambda _policy: 0)
    engine = object.__new__(VllmEngine)
    engine.policy = SimpleNamespace(named_parameters=dict)  # type: ignore[assignment]
    engine.world = SimpleNamespace(model_parallel_group=None, tp_rank=0)  # type: ignore[assignment]
    engine.config = SimpleNamespace(model=None)  # type: ignore[assignment]
    with pytest.raises(CheckpointError, match=r"No space left.*--rollout-weights-dir name a folder"):
        engine._export(tmp_path / "run-1")
    assert list(tmp_path.iterdir()) == []


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
