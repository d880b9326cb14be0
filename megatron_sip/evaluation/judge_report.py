"""The check of a judge as tables on the console, Markdown and JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_sip.errors import ConfigError
from megatron_sip.evaluation.bootstrap import Estimate
from megatron_sip.evaluation.judge_check import Prices, Result, Spent
from megatron_sip.evaluation.report import ABSENT, Grid, interval_cell, markdown_page

RIGHT_HEADS = (
    "reading",
    "set",
    "records",
    "accuracy (%)",
    "AUC",
    "order consistency (%)",
    "position bias",
    "ties",
    "missing verdicts",
)


@dataclass(frozen=True)
class CheckReport:
    """A whole check. `versions[label]` is the version of a reading's words, `model` None where no server was asked."""

    model: str | None
    date: str
    results: tuple[Result, ...]
    versions: Mapping[str, str]
    settings: Mapping[str, Any]
    prices: Prices | None


def title(report: CheckReport) -> str:
    """What was checked, and when."""
    return f"Check of the judge {report.model or '(local classifiers)'} on {report.date}"


def grids(report: CheckReport) -> list[Grid]:
    """What is right, and what it costs."""
    heads = ["reading", "set", "calls", "prompt tokens", "answer tokens", "seconds"]
    heads += ["money"] if report.prices else []
    return [
        Grid("Right", RIGHT_HEADS, tuple(_right_row(result) for result in report.results)),
        Grid(
            "Cost of a thousand verdicts",
            tuple(heads),
            tuple(_cost_row(result, report.prices is not None) for result in report.results),
        ),
    ]


def remarks(report: CheckReport) -> list[str]:
    """How to read the numbers, and what is missing."""
    lines = [
        "Intervals are 95 %: Wilson for shares, bootstrap for AUC (over texts), position bias (over pairs) and cost "
        "(over groups of records asked at once). A judge that knows nothing has an accuracy of 50 % on pairs, and an "
        "AUC of 0.5.",
        "Accuracy is over the records with a verdict; a tie counts as half right. Position bias is the mean belief in "
        "the option shown first less one half, of 0.5 at most. A missing verdict is in no number but its own.",
        "A text's accuracy is at a score of one half: a judge with a good AUC and an accuracy near that of a guess "
        "ranks well and is calibrated badly.",
        "A verdict is a record with an answer; in both orders, and with several votes, it takes several calls. Calls "
        "that fail cost, too. Seconds are wall time with the given calls in flight.",
    ]
    for result in report.results:
        if result.missing:
            why = ", ".join(f"{reason.replace('_', ' ')} {count}" for reason, count in sorted(result.missing.items()))
            lines.append(
                f"{result.reading} on {result.set}: {sum(result.missing.values())} of {result.asked} verdicts are "
                f"missing ({why}); {result.unanswered} records have none."
                + (_in_vain(result.cost.spent) if result.unanswered == result.records else "")
            )
    unmetered = Counter({r.reading: r.cost.spent.unmetered for r in report.results if r.cost.spent.unmetered})
    lines += [f"{label}: {count} answers do not tell their tokens." for label, count in unmetered.items()]
    lines.append("Prompts: " + ", ".join(f"{label}: {version}" for label, version in report.versions.items()) + ".")
    return lines


def markdown(report: CheckReport) -> str:
    """The check as a Markdown page."""
    return markdown_page(title(report), grids(report), remarks(report))


def as_json(report: CheckReport) -> dict[str, Any]:
    """The check as plain data; what is not known is null."""
    return {**asdict(report), "remarks": remarks(report)}


def silent(results: Sequence[Result]) -> list[str]:
    """Readings that gave no verdict on any record."""
    answered: dict[str, int] = {}
    for result in results:
        answered[result.reading] = answered.get(result.reading, 0) + result.records - result.unanswered
    return [label for label, count in answered.items() if count == 0]


def write_file(path: Path, text: str, flag: str, mode: Literal["w", "a"] = "w") -> None:
    """Write a report. ConfigError, which names the flag, if it cannot be written; an empty "a" only tries."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open(mode, encoding="utf-8") as stream:
            stream.write(text)
    except OSError as error:
        raise ConfigError(f"cannot write {flag} {path} ({error.strerror}); name another file") from error


def json_text(report: CheckReport) -> str:
    """What goes into the JSON file."""
    return json.dumps(as_json(report), indent=2, allow_nan=False) + "\n"


def _in_vain(spent: Spent) -> str:
    """What was spent where no verdict came of it, and so no cost of one can be told."""
    tokens = "" if spent.unmetered else f", {spent.prompt_tokens} prompt and {spent.answer_tokens} answer tokens"
    return f" In vain: {spent.calls} calls{tokens}, {spent.seconds:.1f} seconds."


def _right_row(result: Result) -> tuple[str, ...]:
    missing = sum(result.missing.values())
    return (
        result.reading,
        result.set,
        str(result.records),
        interval_cell(result.accuracy, 100, 1),
        interval_cell(result.auc, 1, 3) if result.auc else "",
        interval_cell(result.consistency, 100, 1) if result.consistency else "",
        interval_cell(result.position_bias, 1, 3, sign=True) if result.position_bias else "",
        str(result.ties),
        f"{missing} of {result.asked}" if missing else "0",
    )


def _cost_row(result: Result, priced: bool) -> tuple[str, ...]:
    cost = result.cost
    cells = [result.reading, result.set]
    cells += [_amount(value, 0) for value in (cost.calls, cost.prompt_tokens, cost.answer_tokens)]
    cells += [_amount(cost.seconds, 1)]
    return (*cells, _amount(cost.money, 4)) if priced else tuple(cells)


def _amount(estimate: Estimate | None, digits: int) -> str:
    """A cost; one that is the same in every group is written without an interval."""
    if estimate is not None and estimate.low == estimate.high == estimate.mean:
        return f"{estimate.mean:.{digits}f}"
    return interval_cell(estimate, 1, digits) if estimate is not None else ABSENT
