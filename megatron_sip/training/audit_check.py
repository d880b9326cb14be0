"""What an audit log proves: every sample once, none twice, none lost, and which were skipped and why.

The check does not use the arithmetic by which the run chose its samples (`data.cursor`): it counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sip.data.cursor import Ranges, ranges_of
from megatron_sip.training.audit import Record, effective_steps, samples


@dataclass(frozen=True)
class AuditReport:
    """What became of the samples.

    iterations    first and last effective iteration; None where no step was made
    consumed      samples that the effective steps took
    trained       how many of them were trained
    without_pair  how many had no pair, by reason
    skipped       how many were in a step without an update, by reason
    jumped        samples that rollbacks left out
    rollbacks     a sentence for each
    faults        a sentence for everything that is wrong; empty for a sound log
    """

    iterations: tuple[int, int] | None
    consumed: Ranges
    trained: int
    without_pair: dict[str, int]
    skipped: dict[str, int]
    jumped: Ranges
    rollbacks: tuple[str, ...]
    faults: tuple[str, ...]


def check_audit(records: Sequence[Record]) -> AuditReport:
    """Count what the records of an audit log say, and find what contradicts them."""
    steps = effective_steps(records)
    faults: list[str] = []
    taken_by: dict[int, int] = {}
    without_pair: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    trained = 0
    for step in steps:
        iteration: int = step["iteration"]
        consumed = samples(step["consumed"])
        faults += _classes(step, consumed)
        faults += [
            f"sample {sample} was taken twice, in iterations {taken_by[sample]} and {iteration}"
            for sample in consumed
            if sample in taken_by
        ]
        taken_by.update(dict.fromkeys(consumed, iteration))
        trained += len(samples(step["trained"]))
        without_pair.update({reason: len(samples(part)) for reason, part in step["without_pair"].items()})
        skipped.update({reason: len(samples(part)) for reason, part in step["skipped"].items()})
    jumped = _jumped(records)
    faults += _order(records)
    faults += _gaps(records, taken_by, jumped)
    return AuditReport(
        iterations=(steps[0]["iteration"], steps[-1]["iteration"]) if steps else None,
        consumed=ranges_of(taken_by),
        trained=trained,
        without_pair=dict(without_pair),
        skipped=dict(skipped),
        jumped=ranges_of(jumped),
        rollbacks=tuple(_rollback_words(record) for record in records if record["kind"] == "rollback"),
        faults=tuple(faults),
    )


def _classes(step: Record, consumed: list[int]) -> list[str]:
    """Every consumed sample must be in one class."""
    classes = [samples(step["trained"])]
    classes += [samples(part) for kind in ("without_pair", "skipped") for part in step[kind].values()]
    classified = sorted(sample for part in classes for sample in part)
    if classified == sorted(consumed):
        return []
    return [f"iteration {step['iteration']} took samples {consumed} and accounts for {classified}"]


def _jumped(records: Sequence[Record]) -> set[int]:
    """Samples that a rollback, or the run that came before the log, left out."""
    return {
        sample for record in records if record["kind"] in ("start", "rollback") for sample in samples(record["jumped"])
    }


def _order(records: Sequence[Record]) -> list[str]:
    """Iterations must follow one another, also over starts and rollbacks."""
    faults = []
    if records and records[0]["kind"] != "start":
        faults.append("the log does not say where it begins")
    at: int | None = None
    for record in records:
        here = record["iteration"]
        if record["kind"] == "step":
            if at is not None and here != at + 1:
                faults.append(f"iteration {here} follows iteration {at}")
        elif record["kind"] == "start" and at is not None and here != at:
            faults.append(f"a launch begins behind iteration {here}, the log stands at {at}")
        elif record["kind"] == "rollback" and at is not None and (here > at or record["from_iteration"] != at):
            faults.append(
                f"a rollback goes from iteration {record['from_iteration']} to {here}, the log stands at {at}"
            )
        at = here
    return faults


def _gaps(records: Sequence[Record], taken_by: dict[int, int], jumped: set[int]) -> list[str]:
    """From the first sample on, all are taken or jumped over, none is both, and none is taken out of order."""
    faults = [f"sample {sample} was jumped over and yet taken" for sample in sorted(jumped & taken_by.keys())]
    starts = [record["next_sample"] for record in records if record["kind"] == "start"][:1]
    if not starts or not taken_by:
        return faults
    # A rollback may go behind the first start. Those of an early version do not say where they begin.
    back = [record["next_sample"] for record in records if record["kind"] == "rollback" and "next_sample" in record]
    begin = min(starts + back)
    early = sorted(sample for sample in taken_by if sample < begin)
    faults += [f"sample {sample} was taken before, the log begins with {begin}" for sample in early]
    wanted = range(begin, max(taken_by) + 1)
    lost = ranges_of(sample for sample in wanted if sample not in taken_by and sample not in jumped)
    return faults + [f"samples [{start}, {stop}) are lost" for start, stop in lost]


def _rollback_words(record: Record) -> str:
    return (
        f"from iteration {record['from_iteration']} to {record['iteration']} after {record['reason']}, jumping over "
        + ranges_text(record["jumped"])
    )


def ranges_text(ranges: Sequence[Sequence[int]]) -> str:
    """Ranges in words: `24 to 35, 40`."""
    parts = [str(start) if stop == start + 1 else f"{start} to {stop - 1}" for start, stop in ranges]
    return ", ".join(parts) or "none"
