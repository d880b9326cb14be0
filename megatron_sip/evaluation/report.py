"""The comparison of arms as tables on the console, report.md and report.json."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_sip.errors import ConfigError
from megatron_sip.evaluation.bootstrap import Estimate
from megatron_sip.evaluation.compare import ArmResult, Comparison, PointScore
from megatron_sip.evaluation.safety import SafetyComparison
from megatron_sip.evaluation.text_measures import TextMeasures

ABSENT = "n/a"


@dataclass(frozen=True)
class Report:
    """Everything that is reported of a run.

    `training_weights` names the models whose weights scored or rewrote the training candidates, in the
    words of `Reader.weights` and `Classifier.weights`. `facts` are single numbers (such as held-out
    losses), printed in their order. `notes` are sentences to print below.
    """

    quality: Comparison
    safety: SafetyComparison | None
    training_weights: tuple[str, ...]
    facts: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Grid:
    """One table: a title, column heads, rows of cells."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def grids(report: Report) -> list[Grid]:
    """The tables of a report, arms as rows."""
    tables = [_quality_grid(report.quality)]
    if report.safety is not None:
        tables.append(_safety_grid(report.safety))
    arms = {name: arm.texts for name, arm in report.quality.arms.items()}
    tables.append(_text_grid(f"Text on the {report.quality.prefixes} held-out prefixes", arms))
    if report.safety is not None:
        tables.append(_text_grid(f"Text on the {report.safety.prefixes} unsafe prefixes", report.safety.texts))
    if report.facts:
        rows = tuple((name, f"{value:.4f}") for name, value in report.facts.items())
        tables.append(Grid("Numbers of the run", ("what", "value"), rows))
    return tables


def remarks(report: Report) -> list[str]:
    """Sentences that belong to the numbers: whose judges these are, what is missing, how to read intervals."""
    base = report.quality.base
    lines = [f"Intervals: 95 %, bootstrap over prefixes, paired with {base}. A win rate of 50 % is no difference."]
    lines += _independence(report)
    for label, share in report.quality.first_option_share.items():
        if share is not None:
            lines.append(
                f"{label} prefers the option shown first with a mean belief of {share:.3f} (0.5 is no position "
                "bias); each pair was asked in both orders and averaged."
            )
    for arm, result in report.quality.arms.items():
        lines += _gaps(arm, result)
    if report.safety is not None:
        for arm, scores in report.safety.safety.items():
            lines += [_missing_line(arm, label, score.missing) for label, score in scores.items() if score.missing]
    return [*lines, *report.notes]


def print_report(report: Report, console: Console) -> None:
    """Print tables and remarks."""
    print_grids(grids(report), remarks(report), console)


def print_grids(tables: Sequence[Grid], lines: Sequence[str], console: Console) -> None:
    """Print tables and the sentences that belong to them."""
    for grid in tables:
        table = Table(title=grid.title, title_justify="left")
        for position, head in enumerate(grid.heads):
            table.add_column(Text(head), justify="left" if position == 0 else "right", overflow="fold")
        for row in grid.rows:
            table.add_row(*(Text(cell) for cell in row))
        console.print(table)
    for line in lines:
        console.print(f"- {line}", markup=False, highlight=False)


def markdown(report: Report) -> str:
    """The report as a Markdown page."""
    return markdown_page("Comparison of the arms", grids(report), remarks(report))


def markdown_page(title: str, tables: Sequence[Grid], notes: Sequence[str]) -> str:
    """A Markdown page of tables and the sentences that belong to them."""
    parts = [f"# {title}"]
    for grid in tables:
        lines = [_markdown_row(grid.heads), _markdown_row(["---", *["---:"] * (len(grid.heads) - 1)])]
        lines += [_markdown_row(row) for row in grid.rows]
        parts.append(f"## {grid.title}\n\n" + "\n".join(lines))
    parts.append("## How to read this\n\n" + "\n".join(f"- {line}" for line in notes))
    return "\n\n".join(parts) + "\n"


def as_json(report: Report) -> dict[str, Any]:
    """The report as plain data; what was not measured is null."""
    return {**asdict(report), "remarks": remarks(report)}


def make_folder(folder: Path) -> None:
    """Make the folder of a report. ConfigError if it cannot be made or written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _refused(folder, error.strerror) from error
    if not os.access(folder, os.W_OK):
        raise _refused(folder, "no right to write")


def write_report(report: Report, folder: str | Path) -> tuple[Path, Path]:
    """Write report.json and report.md into `folder`; returns their paths. ConfigError if it cannot be written."""
    target = Path(folder)
    make_folder(target)
    data, page = target / "report.json", target / "report.md"
    try:
        data.write_text(json.dumps(as_json(report), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        page.write_text(markdown(report), encoding="utf-8")
    except OSError as error:
        raise _refused(target, error.strerror) from error
    return data, page


def _refused(folder: Path, reason: str | None) -> ConfigError:
    return ConfigError(f"cannot write the report to {folder} ({reason}); give another folder with --out")


def _quality_grid(comparison: Comparison) -> Grid:
    pairwise = [reader.label for reader in comparison.readers if reader.pairwise]
    pointwise = [reader.label for reader in comparison.readers if not reader.pairwise]
    heads = ["arm"]
    for label in pairwise:
        heads += [f"{label}: win rate vs {comparison.base} (%)", f"{label}: mean belief (%)"]
    for label in pointwise:
        heads += [label, f"{label}: less {comparison.base}"]
    rows = []
    for name, arm in comparison.arms.items():
        cells = [name]
        for label in pairwise:
            rate = arm.win_rates.get(label)
            if rate is None:
                cells += ["(50 by definition)", "(50 by definition)"]
            else:
                cells += [interval_cell(rate.estimate, 100, 1), interval_cell(rate.belief, 100, 1)]
        for label in pointwise:
            cells += _score_cells(arm.scores[label])
        rows.append(tuple(cells))
    return Grid(f"Quality on the {comparison.prefixes} held-out prefixes", tuple(heads), tuple(rows))


def _safety_grid(comparison: SafetyComparison) -> Grid:
    heads = ["arm"]
    for label in comparison.weights:
        heads += [f"{label}: safe texts (%)", f"{label}: mean safety", f"{label}: less {comparison.base}"]
    rows = []
    for name, scores in comparison.safety.items():
        cells = [name]
        for label in comparison.weights:
            cells.append(interval_cell(comparison.safe_share[name][label].estimate, 100, 1))
            cells += _score_cells(scores[label])
        rows.append(tuple(cells))
    return Grid(f"Safety on the {comparison.prefixes} unsafe prefixes", tuple(heads), tuple(rows))


def _text_grid(title: str, arms: Mapping[str, TextMeasures]) -> Grid:
    heads = ("arm", "distinct-1", "distinct-2", "distinct-3", "repeated 4-grams", "looping", "empty", "words")
    rows = tuple(
        (
            name,
            *(_number(texts.distinct[n], 3) for n in (1, 2, 3)),
            _number(texts.repetition, 3),
            _number(texts.looping, 3),
            _number(texts.empty, 3),
            _number(texts.mean_words, 1),
        )
        for name, texts in arms.items()
    )
    return Grid(title, heads, rows)


def _independence(report: Report) -> list[str]:
    """Which readings are of weights that also scored the training."""
    weights = {reader.label: reader.weights for reader in report.quality.readers}
    groups = [("quality", weights)]
    if report.safety is not None:
        groups.append(("safety", dict(report.safety.weights)))
    lines = []
    for topic, group in groups:
        for label, name in group.items():
            if name in report.training_weights:
                lines.append(
                    f"{label} reads {name}, which also scored the candidates in training: another reading of the same "
                    "weights is not another judge."
                )
            else:
                lines.append(f"{label} reads {name}, which had no part in the training scores.")
        if group and all(name in report.training_weights for name in group.values()):
            lines.append(f"For {topic} there is no independent judge in this report.")
    return lines


def _gaps(arm: str, result: ArmResult) -> list[str]:
    lines = []
    for label, rate in result.win_rates.items():
        if rate.identical:
            lines.append(
                f"{arm}: {rate.identical} prefixes where both arms wrote the same text count as half a win for {label}."
            )
        if rate.missing:
            lines.append(
                _missing_line(arm, label, rate.missing)[:-1]
                + f"; {rate.unanswered} prefixes are in no mean, {rate.one_order} were judged in one order only."
            )
    lines += [_missing_line(arm, label, score.missing) for label, score in result.scores.items() if score.missing]
    return lines


def _missing_line(arm: str, label: str, missing: Mapping[str, int]) -> str:
    reasons = ", ".join(f"{reason.replace('_', ' ')} {count}" for reason, count in sorted(missing.items()))
    return f"{arm}: {label} has {sum(missing.values())} missing verdicts ({reasons})."


def _score_cells(score: PointScore) -> list[str]:
    return [interval_cell(score.estimate, 1, 3), interval_cell(score.over_base, 1, 3, sign=True)]


def interval_cell(estimate: Estimate | None, factor: float, digits: int, *, sign: bool = False) -> str:
    """`factor` times a mean and its interval, as in "54.5 [46.0, 63.0]"; `sign` writes a plus, too."""
    if estimate is None:
        return ABSENT
    form = f"{'+' if sign else ''}.{digits}f"
    mean = f"{factor * estimate.mean:{form}}"
    if estimate.low is None or estimate.high is None:
        return f"{mean} [{ABSENT}]"
    return f"{mean} [{factor * estimate.low:{form}}, {factor * estimate.high:{form}}]"


def _number(value: float | None, digits: int) -> str:
    return ABSENT if value is None else f"{value:.{digits}f}"


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
