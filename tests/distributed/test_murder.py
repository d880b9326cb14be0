"""Ranks are killed at random moments; the run that starts again repeats the unbroken one bit for bit.

A classifier in the process scores the candidates. tests/integration/test_murder_server.py is the same with a server.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from forks import shared
from launches import Launcher, Torchrun
from murder import AIMED, Course, broken, check_losses, plan, table, unbroken
from repeats import differences, record_differences, records, tensor_differences
from tiny_corpus import make_corpus
from tiny_run import DATA, MODEL, TRAINING

ITERATIONS = 12
INTERVAL = 3
VARIANTS = {
    "tp2": ("--tensor-model-parallel-size 2", 10, 3),
    "tp2-lag": ("--tensor-model-parallel-size 2 --judge-lag 1 --rollout-batch-size 2 --lr 2e-2", 10, 12),
    "pp2": ("--pipeline-model-parallel-size 2", 10, 4),
    "dp2": ("--rollout-batch-size 1", 10, 6),
    "tp2-async": ("--tensor-model-parallel-size 2 --async-save --keep-last-n 2", 10, 9),
}
"""Flags, how many ranks are killed, and the seed of when and where; the ordinary trial has seed 5."""


def course(root: Path, name: str, layout: str) -> Course:
    """A run with a checkpoint every third step."""
    if not (root / "data").exists():
        make_corpus(root / "data")
    flags = [*MODEL, *DATA, *TRAINING, *layout.split(), "--tokenizer-model", str(root / "data" / "tokenizer")]
    flags += ["--data-path", str(root / "data" / "corpus_text_document"), "--save-interval", str(INTERVAL)]
    flags += ["--train-iters", str(ITERATIONS), "--lr-decay-iters", str(ITERATIONS)]
    return Course(root / name, 2, tuple(flags))


def murder(launcher: Launcher, root: Path, layout: str, *, seed: int, kills: int, restarts: int) -> None:
    """Break a run `kills` times, compare it with an unbroken one, and print what was hit."""
    whole, pieces = course(root, "unbroken", layout), course(root, "broken", layout)
    unbroken(launcher, whole)
    done = broken(launcher, pieces, plan(seed, kills, 2, ITERATIONS - INTERVAL), restarts)
    print("\n" + table(done))
    assert len(done) == kills
    assert {kill.stage for kill in done} >= set(AIMED), "a stage was never hit"
    # An asynchronous save may take as long as the next interval.
    check_losses(done, pieces.resumed_at(), 2 * INTERVAL - 1 if "--async-save" in layout else INTERVAL - 1)
    assert [line["iteration"] for line in records(whole.metrics)] == list(range(1, ITERATIONS + 1))
    assert len(records(whole.samples)) == 4 * ITERATIONS
    assert whole.checkpoint() == ITERATIONS
    assert differences(whole, pieces) == []


def test_five_kills_change_nothing(tmp_path: Path) -> None:
    murder(shared(), tmp_path, VARIANTS["tp2"][0], seed=5, kills=5, restarts=3)


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("variant", VARIANTS)
def test_fifty_kills_change_nothing(variant: str, tmp_path: Path) -> None:
    """Fifty in all variants together, every rank a process of its own under torchrun."""
    layout, kills, seed = VARIANTS[variant]
    murder(Torchrun(), tmp_path, layout, seed=seed, kills=kills, restarts=kills // 2)


def test_the_plan_has_fifty_kills_and_is_seeded() -> None:
    assert sum(kills for _, kills, _ in VARIANTS.values()) == 50
    assert len({seed for *_, seed in VARIANTS.values()} | {5}) == len(VARIANTS) + 1
    for seed in range(20):
        aims = plan(seed, 10, 2, 9)
        assert aims == plan(seed, 10, 2, 9) != plan(seed + 1, 10, 2, 9)
        assert sorted(str(aim.stage) for aim in aims) == sorted([*AIMED, "None"] * 2)
        assert all(1 <= aim.iteration <= 9 for aim in aims)
        assert [aim.iteration for aim in aims] == sorted(aim.iteration for aim in aims)


def test_one_bit_is_a_difference() -> None:
    line = {"iteration": 3, "loss": 0.6931471805599453}
    assert record_differences([line], [dict(line)]) == []
    assert record_differences([line], [{"iteration": 3, "loss": 0.6931471805599454}])
    assert record_differences([line], [{"iteration": 3}])
    assert record_differences([line], [])
    weight = torch.ones(4)
    other = weight.clone()
    assert tensor_differences({"w": weight}, {"w": other}) == []
    other.view(torch.int32)[2] ^= 1
    assert tensor_differences({"w": weight}, {"w": other}) == ["w differs"]
    assert tensor_differences({"w": torch.zeros(1)}, {"w": -torch.zeros(1)}) == ["w differs"]
    assert tensor_differences({"w": weight}, {}) == ["w is in one run alone"]
