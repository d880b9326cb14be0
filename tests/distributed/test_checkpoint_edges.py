"""Checkpoints that are lawful but odd, and damaged ones; on one rank, by the command line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from forks import forked
from spawn import complaint
from tiny_corpus import make_corpus

from megatron_sip.checkpoint.latest import LATEST

MODEL = (
    "--num-layers 2 --ffn-hidden-size 64 --num-attention-heads 4 --num-query-groups 2 --max-position-embeddings 128 "
    "--rotary-base 10000 --norm-epsilon 1e-5 --untie-embeddings-and-output-weights"
).split()
# Greedy rollouts are identical and make no pair, so that iterations are counted and the optimizer never moves.
TRAINING = (
    "--objective online-dpo --pool rollout --num-rollouts 2 --top-p 1e-6 --quality-weight 0 --classifier-weight 1 "
    "--seq-length 64 --suffix-length 16 --min-prefix-length 8 --global-batch-size 2 --lr 1e-3 --lr-decay-iters 3"
).split()


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run of one iteration without an update, and the flags to go on with it."""
    root = tmp_path_factory.mktemp("edges")
    data_path, tokenizer = make_corpus(root / "data")
    saved = str(root / "saved")
    flags = [
        *("-m", "megatron_sip.pretrain", "--data-path", data_path, "--tokenizer-model", tokenizer),
        *(*MODEL, *TRAINING, "--load", saved, "--save", saved),
    ]
    result = forked(1, *flags, "--hidden-size", "32", "--train-iters", "1")
    assert result.returncode == 0, complaint(result)
    assert "checkpoint of iteration 1" in result.stdout
    return root / "saved", flags


def test_with_no_whole_checkpoint_left_it_is_one_line(stopped: tuple[Path, list[str]], tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(stopped[0], damaged)
    [file] = (damaged / "iter_0000001").glob("*.distcp")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 3])
    flags = [str(damaged) if flag == str(stopped[0]) else flag for flag in stopped[1]]
    result = forked(1, *flags, "--hidden-size", "32", "--train-iters", "3")
    assert result.returncode != 0
    [said] = [line for line in complaint(result).splitlines() if "error" in line]
    assert said.startswith(f"megatron_sip: error: {file.parent} is damaged: {file.name} has ")
    assert said.endswith(f"no whole checkpoint is left under {damaged}. Restore one of them")
    assert "Traceback" not in complaint(result)


def test_a_lost_latest_file_does_not_begin_a_new_run(stopped: tuple[Path, list[str]], tmp_path: Path) -> None:
    lost = tmp_path / "lost"
    shutil.copytree(stopped[0], lost)
    (lost / LATEST).unlink()
    flags = [str(lost) if flag == str(stopped[0]) else flag for flag in stopped[1]]
    result = forked(1, *flags, "--hidden-size", "32", "--train-iters", "2")
    assert result.returncode == 0, complaint(result)
    assert f"WARNING: {lost / LATEST} is missing; taking {lost / 'iter_0000001'}, the last one written" in result.stdout
    assert f"resumed from {lost} at iteration 1 " in result.stdout
    assert (lost / LATEST).read_text() == "2\n"


def test_a_run_goes_on_after_it_was_killed_in_a_save(stopped: tuple[Path, list[str]]) -> None:
    """From a checkpoint without an update, once of the form of the first versions, and once more after damage."""
    root, flags = stopped
    first = root / "iter_0000001"
    (first / "manifest.json").unlink()

    main = str(Path(__file__).with_name("kill_in_save.py"))
    flags = [*flags[2:], "--hidden-size", "32", "--save-interval", "1", "--async-save"]
    killed = forked(1, main, "3", *flags, "--train-iters", "4")
    assert killed.returncode != 0
    assert "resumed from" in killed.stdout
    assert "checkpoint of iteration 2 saved" in killed.stdout
    assert (root / LATEST).read_text() == "2\n"
    assert {path.name for path in root.glob("iter_*")} == {first.name, "iter_0000002", "iter_0000003.incomplete"}

    (root / "iter_0000002" / "common.pt").unlink()
    result = forked(1, "-m", "megatron_sip.pretrain", *flags, "--train-iters", "3")
    assert result.returncode == 0, complaint(result)
    assert "iter_0000003.incomplete of an interrupted save removed" in result.stdout
    assert f"{root / 'iter_0000002'} is damaged: common.pt is missing" in result.stdout
    assert f"taking {first}, the newest whole checkpoint before it" in result.stdout
    assert f"resumed from {root} at iteration 1 " in result.stdout
    assert "save of iteration 2 started, " in result.stdout
    assert "checkpoint of iteration 3 saved" in result.stdout
    assert (root / LATEST).read_text() == "3\n"
    assert {path.name for path in root.glob("iter_*")} == {first.name, "iter_0000002", "iter_0000003"}
