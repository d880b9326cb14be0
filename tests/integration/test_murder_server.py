"""Ranks are killed at random moments while a live server judges, which never answers alike; the journal makes it so.

The broken run comes first. Then an unbroken one starts from nothing with a copy of its journal, asks nobody, and
must repeat it bit for bit.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from forks import shared
from launches import Launcher, Torchrun
from murder import AIMED, Course, Kill, broken, check_losses, plan, table, unbroken
from repeats import differences, records
from tiny_corpus import make_corpus
from tiny_run import MODEL

from megatron_sip.metrics.jsonl import read_jsonl

ITERATIONS = 6
MANY_ITERATIONS = 12
"""For ten kills, of which each may let a checkpoint or two pass before it hits."""
INTERVAL = 2
SETTINGS = (
    "--seq-length 96 --suffix-length 16 --min-prefix-length 16 --global-batch-size 2 --micro-batch-size 1 --lr 1e-3 "
    "--judge-reading logit --quality-weight 1 --likelihood-weight 1 --judge-timeout 240 --reference-update-interval 2 "
    f"--save-interval {INTERVAL}"
)


def course(root: Path, name: str, judge_url: str, flags: str, iterations: int) -> Course:
    """A run that the server judges, at a place of its own under `root`."""
    if not (root / "data").exists():
        make_corpus(root / "data")
    places = ["--tokenizer-model", str(root / "data" / "tokenizer"), "--judge-url", judge_url]
    places += ["--data-path", str(root / "data" / "corpus_text_document")]
    places += ["--train-iters", str(iterations), "--lr-decay-iters", str(iterations)]
    return Course(root / name, 2, (*MODEL, *SETTINGS.split(), *flags.split(), *places))


def copy_journal(source: Course, target: Course) -> None:
    """All that was ever written into the journal of one run becomes that of another, which has not begun.

    Every file gets a launch of its own: a journal that was deleted to its last file begins with the first name again.
    """
    target.journal.mkdir(parents=True)
    files = [file for folder in (source.folder / "journal", source.journal) for file in sorted(folder.glob("*.jsonl"))]
    for launch, file in enumerate(files, start=1):
        shutil.copy(file, target.journal / f"{launch:06d}-0000-000000.jsonl")


def murder(
    launcher: Launcher,
    root: Path,
    url: str,
    flags: str,
    *,
    seed: int,
    kills: int,
    restarts: int,
    iterations: int = MANY_ITERATIONS,
) -> list[Kill]:
    """Break a run `kills` times and compare it with an unbroken one that has its journal; print what was hit."""
    pieces, whole = (course(root, name, url, flags, iterations) for name in ("broken", "unbroken"))
    aims = plan(seed, kills, 2, iterations - INTERVAL, waits=True)
    done = broken(launcher, pieces, aims, restarts)
    print("\n" + table(done))
    assert len(done) == kills
    check_losses(done, pieces.resumed_at(), INTERVAL - 1)
    copy_journal(pieces, whole)
    unbroken(launcher, whole)
    for step in read_jsonl(whole.metrics):
        assert step["judge/from_journal"] >= step["judge/asked"] > 0, "somebody was asked again"
    assert [line["iteration"] for line in records(whole.metrics)] == list(range(1, iterations + 1))
    assert sum(line["pairs/valid"] for line in records(whole.metrics)) > 0
    assert differences(whole, pieces) == []
    return done


@pytest.mark.server
def test_three_kills_with_a_live_judge_change_nothing(judge_url: str, tmp_path: Path) -> None:
    flags = "--tensor-model-parallel-size 2 --pool original rollout --num-rollouts 1"
    done = murder(shared(), tmp_path, judge_url, flags, seed=3, kills=3, restarts=2, iterations=ITERATIONS)
    assert {kill.stage for kill in done} >= {"judge"}


@pytest.mark.server
@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_ten_kills_with_a_live_judge_and_rewriter_change_nothing(judge_url: str, tmp_path: Path) -> None:
    flags = "--tensor-model-parallel-size 2 --pool original rewrite rollout --num-rollouts 2"
    done = murder(Torchrun(), tmp_path, judge_url, flags, seed=10, kills=10, restarts=5)
    assert {kill.stage for kill in done} >= set(AIMED), "a stage was never hit"
    # The contrast: the server alone does not repeat itself, as a rule. That it may is no fault.
    alone = course(tmp_path, "alone", judge_url, flags, MANY_ITERATIONS)
    unbroken(Torchrun(), alone)
    found = differences(course(tmp_path, "unbroken", judge_url, flags, MANY_ITERATIONS), alone)
    print(f"asked again without the journal: {len(found)} differences, such as {found[:3]}")


@pytest.mark.server
@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_ten_kills_of_two_leaders_change_nothing(judge_url: str, tmp_path: Path) -> None:
    """Two data parallel ranks, each with a journal of its own."""
    flags = "--pool original rollout --num-rollouts 2"
    done = murder(Torchrun(), tmp_path, judge_url, flags, seed=11, kills=10, restarts=5)
    assert {kill.stage for kill in done} >= set(AIMED), "a stage was never hit"
