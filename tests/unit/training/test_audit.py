"""The audit log: what it says of a step, where it is cut, and what the checker finds in sound and in doctored logs."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest

from megatron_sip.data.cursor import Ranges
from megatron_sip.errors import DataError
from megatron_sip.training.audit import (
    OUTCOMES,
    AuditLog,
    Record,
    effective_steps,
    read_audit,
    rollback_record,
    start_record,
    step_record,
    up_to,
)
from megatron_sip.training.audit_check import check_audit, ranges_text
from megatron_sip.training.rollback import Rollback
from tools.check_audit import main

TIE = OUTCOMES.index("tie")


def step(iteration: int, first: int, skipped: str = "") -> Record:
    """A step on four samples from `first` on, the last of them a tie."""
    outcomes = {first: 0, first + 1: 0, first + 2: 0, first + 3: TIE}
    return step_record(iteration, outcomes, skipped, 0.5)


def rolled_back() -> list[Record]:
    """Checkpoint behind 2, bad at 4 and 5, back to 2, then on to 5 past samples 12 to 19; a resume behind 4."""
    return [
        start_record(0, 0, ()),
        *(step(1, 0), step(2, 4), step(3, 8)),
        *(step(4, 12, "non_finite"), step(5, 16, "spike")),
        rollback_record(Rollback(5, 2, "trouble", ((12, 20),), 8)),
        *(step(3, 8), step(4, 20)),
        start_record(4, 24, ((12, 20),)),
        step(5, 24),
    ]


def test_a_step_puts_every_sample_into_one_class() -> None:
    assert step(3, 8) == {
        "kind": "step",
        "iteration": 3,
        "loss": 0.5,
        "consumed": [[8, 12]],
        "trained": [[8, 11]],
        "without_pair": {"tie": [[11, 12]]},
        "skipped": {},
    }
    spike = step(3, 8, "spike")
    assert (spike["trained"], spike["skipped"]) == ([], {"spike": [[8, 11]]})
    nothing = step_record(4, {5: TIE, 6: TIE}, "no_pairs", None)
    assert (nothing["trained"], nothing["skipped"], nothing["without_pair"]) == ([], {}, {"tie": [[5, 7]]})


def test_a_sound_log() -> None:
    report = check_audit(rolled_back())
    assert report.faults == ()
    assert report.iterations == (1, 5)
    assert report.consumed == ((0, 12), (20, 28))
    assert report.trained == 15
    assert report.without_pair == {"tie": 5}
    assert report.skipped == {}
    assert report.jumped == ((12, 20),)
    assert [record["iteration"] for record in effective_steps(rolled_back())] == [1, 2, 3, 4, 5]
    assert check_audit(rolled_back()[:5]).skipped == {"non_finite": 3}


def test_a_rollback_behind_the_beginning_of_the_log() -> None:
    """Of a run that went on from a checkpoint of 3 in another folder, and fell back to the one of 2 there."""
    log = [start_record(3, 12, ()), *(step(4, 12, "spike"), step(5, 16, "spike"))]
    log += [rollback_record(Rollback(5, 2, "trouble", ((12, 20),), 8)), step(3, 8), step(4, 20)]
    assert check_audit(log).faults == ()
    assert check_audit(log).consumed == ((8, 12), (20, 24))
    lossy = [*log[:4], step(3, 20)]
    assert check_audit(lossy).faults == ("samples [8, 12) are lost",)
    del log[3]["next_sample"]  # by an early version
    assert "sample 8 was taken before, the log begins with 12" in check_audit(log).faults


def doctored(change: str) -> list[Record]:
    records = copy.deepcopy(rolled_back())
    last = records[-1]
    if change == "twice":
        last["consumed"], last["trained"], last["without_pair"] = [[8, 12]], [[8, 12]], {}
    elif change == "lost":
        last["consumed"], last["trained"], last["without_pair"] = [[32, 36]], [[32, 36]], {}
    elif change == "jumped":
        last["consumed"], last["trained"], last["without_pair"] = [[16, 20]], [[16, 20]], {}
    elif change == "unaccounted":
        last["without_pair"] = {}
    elif change == "iteration":
        del records[7]
    elif change == "start":
        del records[0]
    elif change == "forgotten jump":
        del records[6]["jumped"][0]
        del records[9]["jumped"][0]
    elif change == "before":
        records[0]["next_sample"] = 4
    return records


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("twice", "sample 8 was taken twice, in iterations 3 and 5"),
        ("lost", "samples [24, 32) are lost"),
        ("jumped", "sample 16 was jumped over and yet taken"),
        ("unaccounted", "iteration 5 took samples [24, 25, 26, 27] and accounts for [24, 25, 26]"),
        ("iteration", "iteration 4 follows iteration 2"),
        ("start", "the log does not say where it begins"),
        ("forgotten jump", "samples [12, 20) are lost"),
        ("before", "sample 3 was taken before, the log begins with 4"),
    ],
)
def test_doctored_logs_are_found_out(change: str, words: str) -> None:
    assert words in check_audit(doctored(change)).faults


def test_a_log_is_cut_where_its_checkpoint_was_made() -> None:
    records = rolled_back()
    assert up_to(records, 4) == records[:9]  # the last step 4, not the bad one
    assert up_to(records, 2) == records[:3]  # the rollback itself comes again
    assert up_to(records[:1], 0) == []
    assert up_to(records, 9) is None


def test_a_rollback_stays_where_its_checkpoint_was_saved(tmp_path: Path) -> None:
    """It is saved under the number that it went back to; a kill before the next step must not lose what it took back.

    Killed before that save, the checkpoint of this number is the old one, and the rollback comes again.
    """
    jumped, records = ((12, 20),), rolled_back()
    assert up_to(records, 2, jumped) == records[:7]
    assert up_to(records, 2, ((12, 16),)) == records[:3]
    assert up_to(records, 4, jumped) == records[:9]
    path = tmp_path / "audit.jsonl"
    launch(path, 0, 0, *records[1:7])
    launch(path, 2, 8, step(3, 8), step(4, 20), jumped=jumped)
    kinds = [(record["kind"], record["iteration"]) for record in read_audit(path)]
    assert kinds[5:] == [("step", 5), ("rollback", 2), ("start", 2), ("step", 3), ("step", 4)]
    report = check_audit(read_audit(path))
    assert (report.faults, report.jumped, len(report.rollbacks)) == ((), jumped, 1)
    # The same at the beginning of a log, behind a checkpoint of another folder.
    moved = [start_record(2, 8, ()), *records[3:7]]
    assert up_to(moved, 2, jumped) == moved
    assert up_to(moved, 2) == []


def launch(path: Path, iteration: int, first: int, *records: Record, jumped: Ranges = ()) -> None:
    log = AuditLog(path, iteration=iteration, next_sample=first, jumped=jumped)
    for record in records:
        log.write(record)
    log.close()


def test_a_resume_cuts_what_lies_beyond_and_a_crash_costs_one_line(tmp_path: Path) -> None:
    path = tmp_path / "saved" / "audit.jsonl"
    launch(path, 0, 0, step(1, 0), step(2, 4), step(3, 8))
    with path.open("a") as file:
        file.write('{"kind": "step", "iterat')
    launch(path, 2, 8, step(3, 8), step(4, 12))
    assert [(record["kind"], record["iteration"]) for record in read_audit(path)] == [
        *(("start", 0), ("step", 1), ("step", 2)),
        *(("start", 2), ("step", 3), ("step", 4)),
    ]
    assert check_audit(read_audit(path)).faults == ()


def test_each_line_is_in_the_file_at_once(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl", iteration=0, next_sample=0, jumped=())
    log.write(step_record(1, {0: 0}, "non_finite", math.nan))
    assert read_audit(tmp_path / "audit.jsonl")[-1]["loss"] == "NaN"
    log.close()


def test_the_log_of_another_run_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    launch(path, 0, 0, step(1, 0))
    before = path.read_text()
    launch(path, 7, 28, step(8, 28))  # this log does not lead to iteration 7
    assert (tmp_path / "audit.jsonl.1").read_text() == before
    assert check_audit(read_audit(path)).faults == ()
    launch(path, 7, 28, step(8, 28))
    assert not (tmp_path / "audit.jsonl.2").exists()
    launch(path, 0, 0)  # a fresh start
    assert (tmp_path / "audit.jsonl.2").exists()


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 1, "loss": 0.5}\n')
    with pytest.raises(DataError, match="line 1 is no record of an audit log"):
        read_audit(path)


def test_the_tool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "audit.jsonl"

    def tool(records: list[Record]) -> tuple[int, str]:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        status = main([str(path)])
        return status, "".join(capsys.readouterr())

    status, said = tool(rolled_back())
    assert status == 0
    assert said.splitlines() == [
        "iterations 1 to 5, samples 0 to 11, 20 to 27: 20 taken",
        "trained 15, without a pair 5 (tie 5), without an update 0, jumped over 8",
        "rollback from iteration 5 to 2 after trouble, jumping over 12 to 19",
        "every sample once, none twice, none lost",
    ]
    status, said = tool(doctored("twice"))
    assert status == 1
    assert "FAULT: sample 8 was taken twice" in said
    path.write_text("{}\n")
    assert main([str(path)]) == 2
    assert ranges_text([[3, 4], [6, 9]]) == "3, 6 to 8"
