"""The audit log: what became of every sample of the stream, one JSON line an iteration.

    {"kind": "start", "iteration": 0, "next_sample": 0, "jumped": []}
    {"kind": "step", "iteration": 1, "loss": 0.69, "consumed": [[0, 4]],
     "trained": [[0, 3]], "without_pair": {"tie": [[3, 4]]}, "skipped": {}}
    {"kind": "step", "iteration": 2, "loss": "NaN", "consumed": [[4, 8]],
     "trained": [], "without_pair": {}, "skipped": {"non_finite": [[4, 8]]}}
    {"kind": "rollback", "iteration": 1, "from_iteration": 2, "next_sample": 8, "reason": "...", "jumped": [[4, 8]]}
    {"kind": "step", "iteration": 2, "consumed": [[8, 12]], ...}

Samples stand as half-open ranges of their global index. Every consumed sample is in exactly one of `trained`,
`without_pair` and `skipped`. What a rollback took back stays in the file: a step counts unless a later rollback went
back beyond it (`effective_steps`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_sip.data.cursor import Ranges, indices_in, ranges_of
from megatron_sip.errors import DataError
from megatron_sip.metrics.jsonl import JsonlWriter, read_jsonl, replace_records, set_aside
from megatron_sip.training.rollback import Rollback
from megatron_sip.types import NoPairReason

Record = dict[str, Any]

OUTCOMES: tuple[str, ...] = ("trained", *NoPairReason)
"""What becomes of a sample before the step as a whole is accepted; ranks send each other the place in here."""


def start_record(iteration: int, next_sample: int, jumped: Ranges) -> Record:
    """A launch begins behind `iteration` with the sample `next_sample`."""
    return {"kind": "start", "iteration": iteration, "next_sample": next_sample, "jumped": _lists(jumped)}


def step_record(iteration: int, outcomes: Mapping[int, int], skipped: str, loss: float | None) -> Record:
    """What a finished iteration did.

    outcomes  by global sample index the place in OUTCOMES
    skipped   as in `StepResult`; the samples that would have been trained then count as skipped for this reason
    """
    by_outcome: dict[str, list[int]] = {}
    for sample, outcome in outcomes.items():
        by_outcome.setdefault(OUTCOMES[outcome], []).append(sample)
    valid = ranges_of(by_outcome.pop("trained", []))
    return {
        "kind": "step",
        "iteration": iteration,
        "loss": loss,
        "consumed": _lists(ranges_of(outcomes)),
        "trained": [] if skipped else _lists(valid),
        "without_pair": {reason: _lists(ranges_of(by_outcome[reason])) for reason in sorted(by_outcome)},
        "skipped": {skipped: _lists(valid)} if skipped and valid else {},
    }


def rollback_record(done: Rollback) -> Record:
    """The run went back; what it jumps over is left out from now on."""
    return {
        "kind": "rollback",
        "iteration": done.to_iteration,
        "from_iteration": done.from_iteration,
        "next_sample": done.next_sample,
        "reason": done.reason,
        "jumped": _lists(done.jumped),
    }


def _lists(ranges: Ranges) -> list[list[int]]:
    return [list(part) for part in ranges]


def samples(ranges: Iterable[Sequence[int]]) -> list[int]:
    """The sample indices of a record's ranges."""
    return indices_in(tuple((start, stop) for start, stop in ranges))


def effective_steps(records: Iterable[Record]) -> list[Record]:
    """The steps that no rollback took back, in their order."""
    steps: list[Record] = []
    for record in records:
        if record["kind"] == "step":
            steps.append(record)
        elif record["kind"] == "rollback":
            steps = [step for step in steps if step["iteration"] <= record["iteration"]]
    return steps


def up_to(records: Sequence[Record], iteration: int, jumped: Ranges = ()) -> list[Record] | None:
    """The records that led to the checkpoint of `iteration`, which leaves `jumped` out; None if they do not lead there.

    A step is written before its checkpoint is, and a rollback goes back to the newest checkpoint: so the state of a
    checkpoint belongs to the last step of its number, or to a rollback behind it. The latter saves what it leaves out
    under the number that it went back to; a checkpoint that does not know of it was there before.
    """
    known = set(indices_in(jumped))
    for last in range(len(records) - 1, -1, -1):
        record = records[last]
        if record["iteration"] != iteration:
            continue
        if record["kind"] == "step" or (record["kind"] == "rollback" and known.issuperset(samples(record["jumped"]))):
            return list(records[: last + 1])
    begins_there = bool(records) and records[0]["kind"] == "start" and records[0]["iteration"] == iteration
    return [] if begins_there else None


class AuditLog:
    """Appends to the audit log of a run; each line is on disk before the next iteration begins."""

    def __init__(self, path: str | Path, *, iteration: int, next_sample: int, jumped: Ranges) -> None:
        """Open the log of a launch that begins behind `iteration`; what an earlier launch wrote beyond it is cut off.

        The log of another run is set aside as `<name>.1` and so on, never lost.

        Raises:
            ConfigError: the file cannot be written.
            DataError: what stands there is no audit log.
        """
        self._writer = JsonlWriter(
            path, start_iteration=iteration, flag="--audit-log", cut=partial(_cut, jumped=jumped), durable=True
        )
        self._writer.write(start_record(iteration, next_sample, jumped))

    def write(self, record: Record) -> None:
        """Append a record. ConfigError if the disk refuses it."""
        self._writer.write(record)

    def close(self) -> None:
        """Let go of the file."""
        self._writer.close()


def _cut(path: Path, iteration: int, jumped: Ranges) -> None:
    """Leave in the file what led to `iteration`, with the rollbacks that made `jumped`."""
    if not path.exists():
        return
    records = read_audit(path)
    kept = up_to(records, iteration, jumped)
    if kept is None:
        set_aside(path)
    else:
        replace_records(path, kept)


def read_audit(path: str | Path) -> list[Record]:
    """The records of an audit log; a last line that a crash cut short is left out.

    Raises:
        DataError: it cannot be read, or it is no audit log.
    """
    records = list(read_jsonl(path))
    for number, record in enumerate(records, start=1):
        if record.get("kind") not in ("start", "step", "rollback") or not isinstance(record.get("iteration"), int):
            raise DataError(f"{path}, line {number} is no record of an audit log; name a file that --audit-log wrote")
    return records
