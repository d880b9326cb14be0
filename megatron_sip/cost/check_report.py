"""A check of the cost model against measured steps, as tables and plain data."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from megatron_sip.cost.check import Checked, Constants
from megatron_sip.cost.measured import PARTS
from megatron_sip.evaluation.report import Grid

COLUMNS = ("whole", *PARTS)


def grids(found: Sequence[Checked], constants: Constants | None) -> list[Grid]:
    """Predicted and measured by part, the errors in sum, and the constants that were fitted."""
    tables = [_sizes_grid(found), _errors_grid(found)]
    return tables if constants is None else [*tables, _constants_grid(constants)]


def _sizes_grid(found: Sequence[Checked]) -> Grid:
    def cell(checked: Checked, part: str) -> str:
        measured = checked.step.total if part == "whole" else checked.step.seconds[part]
        predicted = sum(checked.predicted.values()) if part == "whole" else checked.predicted[part]
        return f"{predicted:.3f} / {measured:.3f} {100 * checked.error(part):+.0f} %"

    rows = tuple(
        (checked.step.name + (" *" if checked.fitted else ""), *(cell(checked, part) for part in COLUMNS))
        for checked in found
    )
    return Grid("Predicted / measured seconds, error (* the constants are fitted on it)", ("size", *COLUMNS), rows)


def errors(found: Sequence[Checked]) -> dict[str, dict[str, float]]:
    """Median and largest absolute error by part."""
    by_part = {part: [abs(checked.error(part)) for checked in found] for part in COLUMNS}
    return {part: {"median": statistics.median(values), "largest": max(values)} for part, values in by_part.items()}


def _errors_grid(found: Sequence[Checked]) -> Grid:
    """Sizes that the constants were fitted on, and the others, apart."""
    rows = []
    for name, chosen in (
        ("fitted on", [one for one in found if one.fitted]),
        ("not fitted on", [one for one in found if not one.fitted]),
    ):
        if chosen:
            told = errors(chosen)
            cells = (f"{100 * told[part]['median']:.0f} / {100 * told[part]['largest']:.0f}" for part in COLUMNS)
            rows.append((f"{len(chosen)} sizes {name}", *cells))
    return Grid("Error, %: median / largest", ("sizes", *COLUMNS), tuple(rows))


def _constants_grid(constants: Constants) -> Grid:
    rows = tuple(
        (f"{part}: {kind}", f"{value:.3g}") for part, kinds in constants.values.items() for kind, value in kinds.items()
    )
    heads = ("part: kind of work", "times the matmul rate's seconds, or as said")
    return Grid("Fitted constants", heads, rows)


def as_json(found: Sequence[Checked], constants: Constants | None) -> dict[str, Any]:
    """The check as plain data."""
    return {
        "sizes": [
            {
                "name": checked.step.name,
                "fitted": checked.fitted,
                "measured": dict(checked.step.seconds),
                "predicted": dict(checked.predicted),
                "errors": {part: checked.error(part) for part in COLUMNS},
            }
            for checked in found
        ],
        "errors": {
            name: errors(chosen)
            for name, chosen in (
                ("fitted", [one for one in found if one.fitted]),
                ("not_fitted", [one for one in found if not one.fitted]),
            )
            if chosen
        },
        "constants": None if constants is None else constants.values,
    }
