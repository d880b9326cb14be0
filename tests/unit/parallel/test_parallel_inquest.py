"""Who is at fault when a run does not move, by what the ranks report."""

from __future__ import annotations

import os
import sys

import pytest

from megatron_sip.parallel.inquest import Finding, Home, Place, Report, find_fault, hang_text, standing


def report(entries: int, *, waiting: bool, stage: str = "train") -> Report:
    return Report(Place(stage, 3, (8, 11), entries), waiting, f"loss.py:{entries} in loss")


WAITS, WORKS = report(7, waiting=True), report(7, waiting=False)
BEHIND = report(6, waiting=True, stage="judge")


@pytest.mark.parametrize(
    ("reports", "ranks", "what"),
    [
        ({0: WAITS, 1: WORKS}, (1,), "is in loss.py:7 in loss"),
        ({0: WAITS}, (1,), "does not answer"),
        ({0: WORKS}, (1,), "does not answer"),  # whoever is silent keeps even a busy rank's group waiting
        ({0: WAITS, 1: BEHIND}, (1,), "waits in loss.py:6 in loss, behind all others"),
        ({0: WORKS, 1: BEHIND}, (1,), "waits in loss.py:6 in loss, behind all others"),
        ({0: BEHIND, 1: report(6, waiting=False)}, (1,), "is in loss.py:6 in loss"),
        ({0: WAITS, 1: WAITS}, (), "every rank waits for another"),
    ],
)
def test_the_rank_at_fault(reports: dict[int, Report], ranks: tuple[int, ...], what: str) -> None:
    assert find_fault(reports, 2) == Finding(ranks, what)


def test_among_four_ranks_only_the_busy_one_furthest_behind_is_blamed() -> None:
    reports = {0: WAITS, 1: BEHIND, 2: report(6, waiting=False), 3: WORKS}
    assert find_fault(reports, 4).ranks == (2,)


def test_the_sentence_names_rank_process_stage_and_samples() -> None:
    homes = {1: Home("node7 pid:[1]", 4242, "99", 4242)}
    text = hang_text(find_fault({0: WAITS, 1: WORKS}, 2), {0: WAITS, 1: WORKS}, homes, "no progress for 5 s")
    assert text == (
        "no progress for 5 s: rank 1 (process 4242 on node7) is in loss.py:7 in loss, "
        "in stage train of iteration 3 (samples 8 to 11)"
    )
    everyone = hang_text(Finding((), "every rank waits"), {0: WAITS, 1: BEHIND}, {}, "no progress for 5 s")
    assert (
        "rank 0 in stage train of iteration 3 (samples 8 to 11): loss.py:7 in loss; rank 1 in stage judge" in everyone
    )


def test_reports_pass_through_text() -> None:
    for whole in (WAITS, Report(Place(), False, "", done=True)):
        assert Report.loads(whole.dumps()) == whole


def test_a_process_knows_its_home() -> None:
    home = Home.here()
    assert home.pid == os.getpid()
    assert home.alive
    assert not Home(home.machine, home.pid, "1", home.group).alive  # the number now belongs to another process


def test_a_frame_outside_of_torch_is_shown() -> None:
    waiting, line = standing(sys._getframe())
    assert not waiting
    assert line.endswith("in test_a_frame_outside_of_torch_is_shown")
    assert "test_parallel_inquest.py:" in line
