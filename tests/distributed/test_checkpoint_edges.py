"""Checkpoints that are lawful but odd, and damaged ones; on one rank, by the command line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from spawn import complaint, torchrun
from tiny_corpus import make_corpus

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
    result = torchrun(1, *flags, "--hidden-size", "32", "--train-iters", "1")
    assert result.returncode == 0, complaint(result)
    assert "checkpoint of iteration 1" in result.stdout
    return root / "saved", flags


def test_a_truncated_file_is_one_line(stopped: tuple[Path, list[str]], tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(stopped[0], damaged)
    for file in (damaged / "iter_0000001").glob("*.distcp"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 3])
    flags = [str(damaged) if flag == str(stopped[0]) else flag for flag in stopped[1]]
    result = torchrun(1, *flags, "--hidden-size", "32", "--train-iters", "3")
    assert result.returncode != 0
    [said] = [line for line in complaint(result).splitlines() if "error" in line]
    assert said.startswith(f"megatron_sip: error: --load {damaged / 'iter_0000001'} does not fit this run: ")
    assert "Traceback" not in complaint(result)


def test_a_run_goes_on_after_a_checkpoint_without_update(stopped: tuple[Path, list[str]]) -> None:
    started = torchrun(1, *stopped[1], "--hidden-size", "32", "--train-iters", "3", "--exit-duration-in-mins", "1e-6")
    assert started.returncode == 0, complaint(started)
    assert "stopping after iteration 1" in started.stdout
    assert "checkpoint of" not in started.stdout  # nothing new was trained
    result = torchrun(1, *stopped[1], "--hidden-size", "32", "--train-iters", "3")
    assert result.returncode == 0, complaint(result)
    assert "iteration        3/" in result.stdout
    assert (stopped[0] / "latest_checkpointed_iteration.txt").read_text().strip() == "3"
