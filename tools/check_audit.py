"""Tell from an audit log what became of every sample: once, twice, lost, skipped and why.

python tools/check_audit.py runs/sip/audit.jsonl

The exit status is 0 if every sample from the log's first on was taken once or is said to be jumped over, 1 if not,
and 2 for a file that is no audit log.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_sip.data.cursor import count
from megatron_sip.errors import SipError
from megatron_sip.training.audit import read_audit
from megatron_sip.training.audit_check import AuditReport, check_audit, ranges_text

FAULTS_SHOWN = 20


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Check the audit log of a run (--audit-log).")
    parser.add_argument("log", type=Path, help="the file, by default <save>/audit.jsonl of the run")
    return parser.parse_args(arguments)


def lines(report: AuditReport) -> list[str]:
    """The report in words, without its faults."""
    if report.iterations is None:
        return ["no iteration yet"]
    first, last = report.iterations
    return [
        f"iterations {first} to {last}, samples {ranges_text(report.consumed)}: {count(report.consumed)} taken",
        f"trained {report.trained}, without a pair {_counts(report.without_pair)}, "
        f"without an update {_counts(report.skipped)}, jumped over {count(report.jumped)}",
        *(f"rollback {words}" for words in report.rollbacks),
    ]


def _counts(counts: Mapping[str, int]) -> str:
    reasons = ", ".join(f"{reason} {number}" for reason, number in sorted(counts.items()))
    return f"{sum(counts.values())}" + (f" ({reasons})" if reasons else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report and the faults."""
    options = parse_arguments(arguments)
    try:
        report = check_audit(read_audit(options.log))
    except SipError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines(report)))
    for fault in report.faults[:FAULTS_SHOWN]:
        print(f"FAULT: {fault}")
    if len(report.faults) > FAULTS_SHOWN:
        print(f"and {len(report.faults) - FAULTS_SHOWN} more faults")
    if not report.faults:
        print("every sample once, none twice, none lost")
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
