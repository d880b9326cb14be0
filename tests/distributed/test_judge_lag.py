"""`--judge-lag 1` over stops, resumes, other layouts and rollbacks; a deterministic classifier judges.

The rate is high, so that rollouts that were written anew by other weights would be others.
"""

from __future__ import annotations

import gzip
import json

import pytest
from repeats import record_differences, tensor_differences
from runs import Case, Runs

from megatron_sip.training.audit_check import check_audit

STEPS, SAVED = 6, 3
TP2 = ("--tensor-model-parallel-size", "2")
LAG = (
    *("--judge-lag", "1", "--rollout-batch-size", "1", "--lr", "2e-2"),
    *("--train-iters", str(STEPS), "--lr-decay-iters", str(STEPS)),
)
TRACE = ("--profile", "--profile-step-start", "3", "--profile-step-end", "6")
BEGUN = ("lag", SAVED)
AHEAD = ("--save-interval", "2", "--max-skipped-iterations", "2")
CASES = (
    Case("lag", (*LAG, *TP2, "--save-interval", str(SAVED))),
    Case("lag-resumed", (*LAG, *TP2), copy_of=BEGUN),
    Case("lag-dp2", LAG, copy_of=BEGUN),
    Case("lag-pp2", (*LAG, "--pipeline-model-parallel-size", "2"), copy_of=BEGUN),
    # The step under way is discarded, with the half of it that belongs to the next batch.
    Case("lag-stopped", (*LAG, *TP2, *TRACE, "--sigterm-grace", "0"), {"stopped_at": 5, "rank": 1}),
    Case("lag-continued", (*LAG, *TP2), copy_of=("lag-stopped", 4)),
    Case("lag-told", (*LAG, *AHEAD), {"jumped": [[12, 20]]}),
    Case("lag-nan", (*LAG, *AHEAD), {"samples": [12, 19], "factor": "nan"}),
    # Here the batch that waits at the checkpoint is itself at fault.
    Case("lag-next", (*LAG, *AHEAD), {"samples": [*range(8, 16)], "factor": "nan"}),
)
FROM_CHECKPOINT = "takes its rollouts from the checkpoint"


@pytest.mark.parametrize(("name", "since"), [("lag-resumed", SAVED), ("lag-continued", 4)])
def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit(runs: Runs, name: str, since: int) -> None:
    runs.require_success("lag", "lag-stopped", name)
    assert f"iteration {since + 1} {FROM_CHECKPOINT}" in runs.said(name)
    assert runs.steps(name) == runs.steps("lag")
    assert record_differences(runs.metrics(name), runs.metrics("lag")[since:]) == []
    assert tensor_differences(runs.tensors(name, STEPS), runs.tensors("lag", STEPS)) == []
    assert "common state dict differs" not in runs.said("lag"), "what one rank knows is not told as known to all"
    assert len({round(step["loss"], 3) for step in runs.steps("lag") if step["loss"]}) > 3


def test_a_stop_with_a_waiting_batch_saves_the_last_whole_step(runs: Runs) -> None:
    assert "stopping after iteration 4: " in runs.said("lag-stopped")
    assert [step["iteration"] for step in runs.steps("lag-stopped")] == [1, 2, 3, 4]


def test_a_stop_ends_the_trace_that_is_recorded(runs: Runs) -> None:
    folder = runs.saved("lag-stopped") / "profile"
    with gzip.open(folder / "rank_0.iterations_4_5.pt.trace.json.gz") as file:
        names = {event["name"] for event in json.load(file)["traceEvents"]}
    assert {"sip::iteration 4", "sip::iteration 5", "sip::save"} <= names
    assert "sip::optimizer" in (folder / "rank_0.iterations_4_5.txt").read_text()


@pytest.mark.parametrize("layout", ["lag-dp2", "lag-pp2"])
def test_another_layout_shares_the_waiting_batch_out_anew(runs: Runs, layout: str) -> None:
    runs.require_success(layout)
    assert f"iteration {SAVED + 1} {FROM_CHECKPOINT}" in runs.said(layout)
    report = check_audit(runs.audit(layout))
    assert report.faults == ()
    assert report.consumed == ((0, 4 * STEPS),)
    what = ("iteration", "consumed", "trained", "without_pair", "skipped")
    found, wanted = runs.steps(layout), runs.steps("lag")
    assert [[step[key] for key in what] for step in found] == [[step[key] for key in what] for step in wanted]
    losses = [(step["loss"], other["loss"]) for step, other in zip(found, wanted, strict=True) if other["loss"]]
    assert max(abs(loss - other) / other for loss, other in losses) < 1e-4


def test_a_rollback_takes_the_waiting_batch_of_its_checkpoint(runs: Runs) -> None:
    runs.require_success("lag-told", "lag-nan")
    assert f"iteration 3 {FROM_CHECKPOINT}" in runs.said("lag-nan")
    assert runs.steps("lag-nan") == runs.steps("lag-told")
    assert record_differences(runs.metrics("lag-nan"), runs.metrics("lag-told")) == []
    assert tensor_differences(runs.tensors("lag-nan", STEPS), runs.tensors("lag-told", STEPS)) == []


def test_a_waiting_batch_at_fault_is_written_anew_without_its_samples(runs: Runs) -> None:
    runs.require_success("lag-next")
    assert "samples 8 to 15 are left out" in runs.said("lag-next")
    assert FROM_CHECKPOINT not in runs.said("lag-next")
    report = check_audit(runs.audit("lag-next"))
    assert report.faults == ()
    assert report.consumed == ((0, 8), (16, 4 * STEPS + 8))
