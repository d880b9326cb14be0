"""A run saved at TP 2 goes on at DP 2, at PP 2 and on one rank: the same samples, and the same losses for 20 steps.

All that is random is a function of the sample index, and the curriculum one of the iteration; a schedule is on here so
that the pool grows over the resume. Samples are jumped over behind it, as after a rollback.
"""

from __future__ import annotations

import pytest
from runs import Case, Runs

from megatron_sip.training.audit_check import check_audit

RESUMED, STEPS = 5, 25
JUMPED = ((26, 34),)
FLAGS = (
    *("--train-iters", str(STEPS), "--lr-decay-iters", str(STEPS), "--save-interval", str(RESUMED)),
    *("--curriculum", "schedule", "--curriculum-rollout-ramp", "12"),
    *("--curriculum-bonus", "0.05", "--curriculum-bonus-iters", "16"),
)
BEGUN = ("unbroken", RESUMED)
CASES = (
    Case("unbroken", (*FLAGS, "--tensor-model-parallel-size", "2"), {"jumped": [list(part) for part in JUMPED]}),
    Case("dp2", (*FLAGS, "--save-interval", "100"), copy_of=BEGUN),
    Case("pp2", (*FLAGS, "--save-interval", "100", "--pipeline-model-parallel-size", "2"), copy_of=BEGUN),
    Case("one", (*FLAGS, "--save-interval", "100"), copy_of=BEGUN, ranks=1),
    Case("wider", (*FLAGS, "--global-batch-size", "8", "--train-iters", "8"), copy_of=BEGUN, ranks=1),
)
LAYOUTS = ("dp2", "pp2", "one")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_are_those_of_the_unbroken_run(runs: Runs, layout: str) -> None:
    runs.require_success("unbroken", layout)
    wanted, found = runs.steps("unbroken"), runs.steps(layout)
    assert [step["iteration"] for step in found] == list(range(1, STEPS + 1))
    losses = [(step["loss"], other["loss"]) for step, other in zip(found, wanted, strict=True) if other["loss"]]
    assert len(losses) > 20
    largest = max(abs(loss - other) / other for loss, other in losses)
    print(f"{layout}: losses within {largest:.1e} relative over {STEPS - RESUMED} steps")
    assert largest < 1e-4
    # They are no constant that any run would have.
    assert len({round(other, 3) for _, other in losses}) > 15


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_sample_is_taken_twice_or_lost(runs: Runs, layout: str) -> None:
    report = check_audit(runs.audit(layout))
    assert report.faults == ()
    assert report.consumed == ((0, 26), (34, 4 * STEPS + 8))
    assert report.jumped == JUMPED
    assert [record["iteration"] for record in runs.audit(layout) if record["kind"] == "start"] == [0, RESUMED]
    what = ("iteration", "consumed", "trained", "without_pair", "skipped")
    wanted = [[step[key] for key in what] for step in runs.steps("unbroken")]
    assert [[step[key] for key in what] for step in runs.steps(layout)] == wanted


def test_the_curriculum_goes_on_where_it_was(runs: Runs) -> None:
    def pools(name: str) -> list[float]:
        return [line["candidates/pool"] for line in runs.metrics(name)]

    unbroken = pools("unbroken")
    assert set(unbroken[RESUMED:]) == {2, 3}  # it grows behind the resume
    for layout in LAYOUTS:
        assert pools(layout) == unbroken[RESUMED:]


def test_a_larger_batch_steps_over_the_jump_and_loses_nothing(runs: Runs) -> None:
    runs.require_success("wider")
    report = check_audit(runs.audit("wider"))
    assert report.faults == ()
    assert report.consumed == ((0, 26), (34, 4 * RESUMED + 8 * 3 + 8))
    assert runs.steps("wider")[RESUMED]["consumed"] == [[20, 26], [34, 36]]
