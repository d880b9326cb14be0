"""The points of a sweep as a table and as curves. Pure functions of what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from megatron_sip.cost.sizes import ModelSizes
from megatron_sip.evaluation.line_plot import Line, Panel
from tools.bench.step_report import Result, as_json

_X_LABELS = {"k": "rollouts of a prefix (K)", "prefix": "tokens of a prefix (P)", "batch": "prefixes of a step"}
_TOP = 1.1
"""Of the highest value: where the axis ends."""


def sweep_table(name: str, model: ModelSizes, results: Sequence[Result]) -> Table:
    """A row a point: sizes, seconds of the step and its parts, the floor, and what was compared."""
    rows = [_row(as_json(model, result)) for result in results]
    table, titles = (
        Table(title=f"sweep over {name}: seconds"),
        list(dict.fromkeys(title for row in rows for title in row)),
    )
    for title in titles:
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(*(row.get(title, "") for title in titles))
    return table


def _row(point: dict[str, Any]) -> dict[str, str]:
    """The cells of a point by column; what was not measured has none."""
    row = {"P": str(point["prefix"]), "K": str(point["k"]), "batch": str(point["batch"])}
    row["TP x PP"] = f"{point['tensor_model_parallel_size']} x {point['pipeline_model_parallel_size']}"
    row["step"] = f"{point['seconds_per_step']:.3f}"
    row |= {part.replace("_", " "): f"{seconds:.3f}" for part, seconds in point["parts"].items()}
    row |= {"floor": f"{point['floor_seconds']:.3f}", "step / floor": f"{point['times_floor']:.2f}"}
    if point["hf"]:
        row["hf / step"] = f"{point['speedup_vs_hf']:.2f}"
    if point["unshared"]:
        row["shared / unshared"] = f"{point['unshared']['ratio']:.3f}"
    if point["judge_seconds"]:
        row["judge"] = f"{point['judge_seconds']:.3f}"
        row["step / longer"] = f"{point['step_over_longer_of_policy_and_judge']:.2f}"
    return row


def panel(name: str, points: Sequence[dict[str, Any]]) -> Panel:
    """Seconds over what the sweep varies, from the points of its JSON."""
    if name == "layout":
        return _layout_panel(points)
    if name == "judge":
        return _judge_panel(points)
    x = [float(point[name]) for point in points]
    curves = {
        "step": [point["seconds_per_step"] for point in points],
        "floor": [point["floor_seconds"] for point in points],
        "rollouts": [point["parts"]["rollout"] for point in points],
        "reference and train": [point["parts"]["reference"] + point["parts"]["train"] for point in points],
    }
    if all(point["hf"] for point in points):
        curves["transformers"] = [point["hf"]["seconds_per_step"] for point in points]
    lines = tuple(_line(label, x, values) for label, values in curves.items())
    return Panel(f"seconds of a step against {name}", _X_LABELS[name], "seconds", lines, _range(lines), log_x=True)


def _judge_panel(points: Sequence[dict[str, Any]]) -> Panel:
    x = [point["judge_seconds"] for point in points]
    steps = [point["seconds_per_step"] for point in points]
    longer = [
        step / (point["step_over_longer_of_policy_and_judge"] or 1.0) for step, point in zip(steps, points, strict=True)
    ]
    lines = _line("step", x, steps), _line("the longer of both", x, longer)
    return Panel("seconds of a step against the judge's", "seconds of the judge", "seconds", lines, _range(lines))


def _layout_panel(points: Sequence[dict[str, Any]]) -> Panel:
    """A dot a layout, over the number of ranks."""
    lines = tuple(
        Line(
            f"TP{point['tensor_model_parallel_size']} PP{point['pipeline_model_parallel_size']}",
            ((_ranks(point), point["seconds_per_step"]),),
        )
        for point in points
    )
    return Panel("seconds of a step against the layout", "ranks", "seconds", lines, _range(lines))


def _ranks(point: dict[str, Any]) -> float:
    return float(point["tensor_model_parallel_size"] * point["pipeline_model_parallel_size"])


def _line(label: str, x: Sequence[float], y: Sequence[float]) -> Line:
    return Line(label, tuple(sorted(zip(x, y, strict=True))))


def _range(lines: Sequence[Line]) -> tuple[float, float]:
    return 0.0, _TOP * max(y for line in lines for _, y in line.points)
