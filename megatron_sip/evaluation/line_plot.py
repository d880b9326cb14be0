"""Line charts as SVG text, for a page: a few panels side by side, no plotting library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#1f6f8b", "#c8553d", "#5b8c5a", "#8e6c8a", "#b8860b", "#444444")
_WIDTH, _HEIGHT = 460, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 34, 46
_TICKS = 6


@dataclass(frozen=True)
class Line:
    """Points `(x, y)` in the order of x; a single point is drawn as a dot with its label beside it."""

    label: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Panel:
    """One chart. `y_range` bounds the axis; what lies outside is drawn at its edge. `log_x`: x by powers of two."""

    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    y_range: tuple[float, float]
    log_x: bool = False


def draw(panels: Sequence[Panel]) -> str:
    """The panels from left to right as one SVG document. ValueError for a panel without a point."""
    parts = [
        f'<g transform="translate({number * _WIDTH},0)">{_panel(panel)}</g>' for number, panel in enumerate(panels)
    ]
    width = _WIDTH * len(panels)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {_HEIGHT}" width="{width}" '
    head += f'height="{_HEIGHT}" font-family="sans-serif" font-size="11">'
    return f'{head}<rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n'


class _Axes:
    """From values to places in a panel."""

    def __init__(self, panel: Panel) -> None:
        values = [x for line in panel.lines for x, _ in line.points]
        if not values:
            raise ValueError(f"the chart {panel.title!r} has no point")
        self._log = panel.log_x
        low, high = self._scaled(min(values)), self._scaled(max(values))
        self._x = (low, high if high > low else low + 1.0)
        self._y = panel.y_range

    def _scaled(self, value: float) -> float:
        return math.log2(value) if self._log else value

    def x(self, value: float) -> float:
        low, high = self._x
        return _LEFT + (self._scaled(value) - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high = self._y
        inside = min(max(value, low), high)
        return _HEIGHT - _BOTTOM - (inside - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    def x_ticks(self) -> list[float]:
        low, high = self._x
        if self._log:
            return [2.0**power for power in range(math.ceil(low), math.floor(high) + 1)]
        step = max(1, round((high - low) / _TICKS))
        return [float(value) for value in range(math.ceil(low), math.floor(high) + 1, step)]


def _panel(panel: Panel) -> str:
    axes = _Axes(panel)
    parts = [f'<text x="{_LEFT}" y="20" font-size="13" font-weight="bold">{escape(panel.title)}</text>']
    low, high = panel.y_range
    for tick in range(_TICKS):
        value = low + (high - low) * tick / (_TICKS - 1)
        place = axes.y(value)
        parts.append(f'<path d="M{_LEFT} {place:.1f}H{_WIDTH - _RIGHT}" stroke="#dddddd"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{place + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    for value in axes.x_ticks():
        place = axes.x(value)
        parts.append(f'<path d="M{place:.1f} {_HEIGHT - _BOTTOM}v4" stroke="#444444"/>')
        parts.append(f'<text x="{place:.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{value:g}</text>')
    middle = (_HEIGHT - _BOTTOM + _TOP) / 2
    parts.append(f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(panel.x_label)}</text>')
    parts.append(
        f'<text transform="translate(14,{middle}) rotate(-90)" text-anchor="middle">{escape(panel.y_label)}</text>'
    )
    parts += [_line(line, axes, COLOURS[number % len(COLOURS)], number) for number, line in enumerate(panel.lines)]
    return "".join(parts)


def _line(line: Line, axes: _Axes, colour: str, number: int) -> str:
    places = [(axes.x(x), axes.y(y)) for x, y in line.points]
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places)
    if len(places) == 1:
        x, y = places[0]
        right = x > _WIDTH * 0.7
        anchor, shift = ("end", -6) if right else ("start", 6)
        label = f'<text x="{x + shift:.1f}" y="{y - 5:.1f}" text-anchor="{anchor}" fill="{colour}">'
        return f"{dots}{label}{escape(line.label)}</text>"
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    row = _HEIGHT - _BOTTOM - 10 - 15 * number
    key = f'<path d="M{_WIDTH - 172} {row}h18" stroke="{colour}" stroke-width="2"/>'
    key += f'<text x="{_WIDTH - 148}" y="{row + 4}" fill="{colour}">{escape(line.label)}</text>'
    return f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>{dots}{key}'
