"""The tables of the bench of the LM head. Pure functions of its JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from tools.bench import turns

_MIB = 2**20


def head_tables(heads: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Milliseconds of every pass, and the most memory it took at a time; a column a size of chunk."""
    arms = _names(heads)
    times = _table("log-probabilities: ms, medians", "scored positions x vocabulary", arms)
    peaks = _table("log-probabilities: most memory of one pass, MiB", "scored positions x vocabulary", arms)
    for head in heads:
        what = f"{head['positions']} x {head['vocab_size']:,} ({head['logits_bytes'] / _MIB:.0f} MiB), {head['pass']}"
        times.add_row(what, *_cells(head, arms, _milliseconds))
        peaks.add_row(what, *_cells(head, arms, lambda arm: f"{arm['peak_bytes'] / _MIB:.0f}"))
    return [times, peaks]


def draw_table(draws: Sequence[Mapping[str, Any]]) -> Table:
    """Milliseconds of one token of every row."""
    arms = _names(draws)
    shown = _table("drawing a token of every row: ms, medians", "rows x vocabulary", arms)
    for draw in draws:
        what = f"{draw['rows']} x {draw['vocab_size']:,}"
        shown.add_row(what, *_cells(draw, arms, _milliseconds))
    return shown


def show(console: Console, around: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Print tables, machine and warnings."""
    for shown in [*head_tables(found["heads"]), draw_table(found["draws"])]:
        console.print(shown)
    console.print(f"hidden size {around['hidden_size']}, TP {around['ranks']}", highlight=False)
    measured = [arm for row in [*found["heads"], *found["draws"]] for arm in row["arms"].values()]
    turns.show_surroundings(console, around, measured)


def _milliseconds(arm: Mapping[str, Any]) -> str:
    """Three digits, and more only before the point."""
    value = 1e3 * arm["seconds"]
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """All arms, in the order of the row that has most."""
    arms = [list(row["arms"]) for row in rows]
    return max(arms, key=len)


def _table(title: str, first: str, arms: Sequence[str]) -> Table:
    shown = Table(title=title)
    shown.add_column(first)
    for arm in arms:
        shown.add_column(arm, justify="right")
    return shown


def _cells(row: Mapping[str, Any], arms: Sequence[str], cell: Callable[[Mapping[str, Any]], str]) -> list[str]:
    """A cell an arm; none where the row has not got it."""
    return [cell(row["arms"][arm]) if arm in row["arms"] else "" for arm in arms]
