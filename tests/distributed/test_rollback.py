"""Steps that go wrong: skipped and counted, taken back in a row, jumped over; and what the audit log proves of it.

The classifier that judges is deterministic.
"""

from __future__ import annotations

import pytest
from repeats import record_differences, tensor_differences
from runs import Case, Runs

from megatron_sip.training.audit import Record
from megatron_sip.training.audit_check import check_audit

STEPS = 6
FLAGS = (
    *("--train-iters", str(STEPS), "--lr-decay-iters", str(STEPS), "--save-interval", "2"),
    *("--max-skipped-iterations", "2"),
)
JUMPED = ((12, 20),)
"""The samples of iterations 4 and 5."""
SPIKES = ("--loss-spike-threshold", "10", "--loss-spike-window", "4")


CASES = (
    Case("told", FLAGS, {"jumped": [list(part) for part in JUMPED]}),
    Case("nan", FLAGS, {"samples": [12, 19], "factor": "nan"}),
    Case("poisoned", FLAGS, {"poisoned_at": 4, "rank": 1}),
    Case("damaged", (*FLAGS, "--save-interval", "1"), {"samples": [12, 19], "factor": "nan", "damaged": 3}),
    Case("resumed", FLAGS, copy_of=("nan", 4)),
    Case("hopeless", (*FLAGS, "--max-rollbacks", "1"), {"samples": [*range(12, 100)], "factor": "nan"}),
    # The last stage alone knows the loss here.
    Case("spike", (*FLAGS, *SPIKES, "--pipeline-model-parallel-size", "2"), {"samples": [17], "factor": 50}),
)
"""Most at DP 2, so that a fault strikes one rank alone; checkpoints behind iterations 2, 4 and 6."""


def shape(records: list[Record]) -> list[str]:
    """The records in short: `s4` for a step, with `!` for one without an update."""
    return [record["kind"][0] + str(record["iteration"]) + "!" * bool(record.get("skipped")) for record in records]


@pytest.mark.parametrize("name", ["nan", "poisoned", "damaged"])
def test_a_run_that_rolled_back_equals_one_that_was_told_to_jump(runs: Runs, name: str) -> None:
    """Bad samples, weights that went bad in memory, and a checkpoint that went bad on the disk: bit for bit what a run
    does that never saw these samples."""
    runs.require_success("told", name)
    assert shape(runs.audit("told")) == ["s0", "s1", "s2", "s3", "s4", "s5", "s6"]
    assert shape(runs.audit(name)) == ["s0", "s1", "s2", "s3", "s4!", "s5!", "r2", "s3", "s4", "s5", "s6"]
    assert runs.steps(name) == runs.steps("told")
    assert record_differences(runs.metrics(name), runs.metrics("told")) == []
    for iteration in (4, STEPS):
        saved = runs.tensors(name, iteration)
        assert len(saved) > 30
        assert tensor_differences(saved, runs.tensors("told", iteration)) == []
    assert "rolled back from iteration 5 to 2 after a non-finite loss or gradient; samples 12 to 19 are left out" in (
        runs.said(name)
    )


def test_the_audit_log_proves_what_became_of_every_sample(runs: Runs) -> None:
    for name in ("told", "nan", "poisoned", "damaged", "resumed"):
        report = check_audit(runs.audit(name))
        assert report.faults == ()
        assert report.consumed == ((0, 12), (20, 32))
        assert report.jumped == JUMPED
        assert report.trained + sum(report.without_pair.values()) == 4 * STEPS
    bad = runs.audit("nan")[4]
    assert (bad["loss"], bad["consumed"], bad["trained"]) == ("NaN", [[12, 16]], [])
    assert sum(stop - start for start, stop in bad["skipped"]["non_finite"]) > 0


def test_a_rollback_passes_over_a_checkpoint_that_is_no_longer_whole(runs: Runs) -> None:
    runs.require_success("damaged")
    said = runs.said("damaged")
    assert "iter_0000003 is damaged: " in said
    assert "has changed since it was written (its checksum differs); taking " in said
    assert "iter_0000002, the newest whole checkpoint before it" in said


def test_a_later_resume_jumps_too(runs: Runs) -> None:
    runs.require_success("resumed")
    assert runs.steps("resumed") == runs.steps("told")
    assert record_differences(runs.metrics("resumed"), runs.metrics("told")[4:]) == []
    assert tensor_differences(runs.tensors("resumed", STEPS), runs.tensors("told", STEPS)) == []


def test_going_back_has_an_end(runs: Runs) -> None:
    assert {outcome.status for outcome in runs.outcomes["hopeless"]} == {2}
    [said] = [line for line in runs.said("hopeless").splitlines() if "megatron_sip: error" in line]
    assert "2 iterations in a row had a non-finite loss or gradient again after 1 rollbacks" in said
    assert "--max-rollbacks" in said
    assert shape(runs.audit("hopeless")) == [
        *("s0", "s1", "s2", "s3", "s4!", "s5!", "r2", "s3", "s4!", "s5!"),
    ]
    assert (runs.saved("hopeless") / "latest_checkpointed_iteration.txt").read_text().split() == ["2"]


def test_a_spike_makes_no_update_and_is_counted(runs: Runs) -> None:
    runs.require_success("spike")
    assert shape(runs.audit("spike")) == ["s0", "s1", "s2", "s3", "s4", "s5!", "s6"]
    step = runs.steps("spike")[4]
    assert step["loss"] > 5
    assert list(step["skipped"]) == ["spike"]
    lines = runs.metrics("spike")
    assert [line["steps/spike"] for line in lines] == [0, 0, 0, 0, 1, 0]
    assert [line["steps/nan"] for line in lines] == [0] * STEPS
    assert lines[5]["learning_rate"] == lines[4]["learning_rate"]  # the schedule did not move
    assert check_audit(runs.audit("spike")).faults == ()
