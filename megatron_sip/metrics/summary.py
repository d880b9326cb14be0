"""What a metrics file says of a run, as tables and curves for a terminal.

The curves are block characters: they show on any terminal, need no plotting library, and rich turns the
same output into an SVG for a page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_sip.errors import DataError
from megatron_sip.metrics.jsonl import decode_number, read_jsonl
from megatron_sip.metrics.names import MetricSpec, metric_specs

BARS = "▁▂▃▄▅▆▇█"
NOT_FINITE = "!"
ABSENT = " "
_GENERAL = {"iteration", "unix_time"}


@dataclass(frozen=True)
class Series:
    """One metric over a run: `values[i]` belongs to `iterations[i]`; lines without the metric are left out."""

    iterations: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Run:
    """The metrics of one run, by name."""

    name: str
    iterations: tuple[int, ...]
    series: dict[str, Series]


def read_run(path: str | Path) -> Run:
    """Read a file of --metrics-file. DataError for a file without a record, a bad line or a bad number."""
    records = list(read_jsonl(path))
    if not records:
        raise DataError(f"{path} holds no metrics; give the file that --metrics-file wrote")
    columns: dict[str, list[tuple[int, float]]] = {}
    iterations = []
    for record in records:
        iteration = _iteration(record, path)
        iterations.append(iteration)
        for name, value in record.items():
            if name not in _GENERAL:
                columns.setdefault(name, []).append((iteration, decode_number(value)))
    series = {
        name: Series(tuple(step for step, _ in pairs), tuple(value for _, value in pairs))
        for name, pairs in columns.items()
    }
    return Run(Path(path).stem, tuple(iterations), series)


def sparkline(values: Sequence[float | None], width: int) -> str:
    """At most `width` block characters: means over equal stretches of `values`, scaled from lowest to highest.

    A stretch with a non-finite value shows `!`, one without any value a blank. Equal values show a low line.
    """
    if width < 1:
        raise ValueError("a curve needs a width of at least 1")
    count = min(width, len(values))
    stretches = [values[index * len(values) // count : (index + 1) * len(values) // count] for index in range(count)]
    points = [_stretch_mean(stretch) for stretch in stretches]
    finite = [point for point in points if point is not None and math.isfinite(point)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    return "".join(_bar(point, low, high) for point in points)


def summary_table(run: Run, width: int = 40) -> Table:
    """First, last, lowest and highest value and the curve of every metric of the log line."""
    first, last = run.iterations[0], run.iterations[-1]
    table = Table(title=f"{run.name}: iterations {first} to {last}", title_justify="left")
    for head in ("metric", "first", "last", "low", "high"):
        table.add_column(head, justify="left" if head == "metric" else "right", no_wrap=True)
    table.add_column("curve", no_wrap=True)
    for spec in _shown(run):
        series = run.series[spec.name]
        finite = [value for value in series.values if math.isfinite(value)]
        extremes = [_text(min(finite)), _text(max(finite))] if finite else ["n/a", "n/a"]
        by_step = dict(zip(series.iterations, series.values, strict=True))
        curve = sparkline([by_step.get(step) for step in run.iterations], width)
        cells = [spec.name, _text(series.values[0]), _text(series.values[-1]), *extremes, curve]
        table.add_row(*(Text(cell) for cell in cells))
    return table


def totals_table(run: Run) -> Table:
    """Seconds per part with their share, and what was counted over the whole run.

    Times are means over the iterations of a log line, so with --log-interval above 1 they are given per
    iteration, not as a sum.
    """
    table = Table(title=f"{run.name}: per iteration and in total", title_justify="left")
    for head, side in (("what", "left"), ("value", "right"), ("share", "right")):
        table.add_column(head, justify="right" if side == "right" else "left")
    seconds = {
        name: sum(series.values) / len(series.values) for name, series in run.series.items() if name.startswith("time/")
    }
    together = sum(seconds.values())
    for name, value in sorted(seconds.items()):
        share = f"{100 * value / together:.0f} %" if together > 0 else "n/a"
        table.add_row(f"{name} (s per iteration)", f"{value:.3f}", share)
    if "elapsed_ms" in run.series:
        elapsed = run.series["elapsed_ms"].values
        table.add_row("whole iteration (s)", f"{sum(elapsed) / len(elapsed) / 1000:.3f}", "")
    for spec in metric_specs():
        if spec.reduction == "total" and spec.name in run.series:
            total = sum(run.series[spec.name].values)
            if total or spec.show_zero:
                table.add_row(f"{spec.name} (total)", f"{total:.0f}", "")
    return table


def comparison_table(first: Run, second: Run) -> Table:
    """Last values of two runs side by side, with their difference, for the metrics that both have."""
    table = Table(title=f"{second.name} against {first.name}: last values", title_justify="left")
    for position, head in enumerate(("metric", first.name, second.name, "difference")):
        table.add_column(Text(head), justify="left" if position == 0 else "right")
    for spec in _shown(first):
        if spec.name in second.series:
            one, other = first.series[spec.name].values[-1], second.series[spec.name].values[-1]
            table.add_row(spec.name, _text(one), _text(other), _text(other - one))
    return table


def print_summary(runs: Sequence[Run], console: Console) -> None:
    """Print the tables of one run or of two."""
    for run in runs:
        console.print(summary_table(run))
        console.print(totals_table(run))
    if len(runs) == 2:
        console.print(comparison_table(runs[0], runs[1]))


def _iteration(record: dict[str, Any], path: str | Path) -> int:
    value = record.get("iteration")
    if isinstance(value, bool) or not isinstance(value, int):
        raise DataError(f"{path}: a line has no iteration; give the file that --metrics-file wrote")
    return value


def _shown(run: Run) -> list[MetricSpec]:
    """Declared means, then scores by judge, that the run has; totals have a table of their own."""
    declared = [spec for spec in metric_specs() if spec.reduction == "mean" and spec.name in run.series]
    known = {spec.name for spec in metric_specs()}
    by_judge = sorted(name for name in run.series if name.startswith("scores/") and name not in known)
    rate = [MetricSpec("learning_rate")] if "learning_rate" in run.series else []
    return [*rate, *declared, *(MetricSpec(name) for name in by_judge)]


def _stretch_mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def _bar(point: float | None, low: float, high: float) -> str:
    if point is None:
        return ABSENT
    if not math.isfinite(point):
        return NOT_FINITE
    if high == low:
        return BARS[0]
    return BARS[min(len(BARS) - 1, int((point - low) / (high - low) * len(BARS)))]


def _text(value: float) -> str:
    if not math.isfinite(value) or value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.4f}"
    return f"{value:.3e}"
