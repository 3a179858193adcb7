"""Curves in braille: four rows and two columns of dots in a character."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

EMPTY = 0x2800
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of row, column in a character
BEST, REFERENCE = "●", "┄"
SETTLED_POINTS = 20  # from so many on, a part is left out where the top is chosen:
SKIPPED_SHARE = 0.1  # of the width, for the fall from where a guess begins would flatten all that follows


@dataclass
class Series:
    """A curve as it comes: its points by step, at most `MOST` of them, neighbours merged into their means."""

    MOST = 2048

    points: list[tuple[float, float]] = field(default_factory=list)
    merged: int = 1  # points in each of them
    pending: list[tuple[float, float]] = field(default_factory=list)

    def add(self, x: float, y: float) -> None:
        """Add a point to the right of the others; what is not finite is left out."""
        if not math.isfinite(y):
            return
        self.pending.append((x, y))
        if len(self.pending) == self.merged:
            self.points.append(_mean(self.pending))
            self.pending.clear()
        if len(self.points) == self.MOST:
            pairs = zip(self.points[::2], self.points[1::2], strict=True)
            self.points, self.merged = [_mean(pair) for pair in pairs], 2 * self.merged

    def cut(self, x: float) -> None:
        """Forget the points to the right of `x`."""
        self.points = [point for point in self.points if point[0] <= x]
        self.pending = [point for point in self.pending if point[0] <= x]

    def all(self) -> list[tuple[float, float]]:
        """The points, left to right."""
        return [*self.points, *([_mean(self.pending)] if self.pending else [])]


@dataclass(frozen=True)
class Cell:
    """A character of the chart, and the curve that it belongs to ("" where it is empty)."""

    char: str
    kind: str


@dataclass(frozen=True)
class Chart:
    """Curves drawn: rows of cells, top to bottom, and the values at the top and at the bottom."""

    rows: list[list[Cell]]
    top: float
    bottom: float


def draw(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    width: int,
    height: int,
    best: tuple[float, float] | None = None,
    reference: float | None = None,
) -> Chart | None:
    """Curves by kind in so many characters, from the first to the last step: later ones cover earlier ones. The point
    `best` is marked, `reference` is a line across where it is near enough. None where there is nothing to draw."""
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return None
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    bottom, top = _limits(points, first, last, reference)
    canvas = _Canvas(width, height, (first, last), (bottom, top))
    if reference is not None and bottom <= reference <= top:
        canvas.rule(reference)
    for kind, curve in curves.items():
        canvas.line(kind, curve)
    if best is not None and first <= best[0] <= last:
        canvas.mark(*best)
    return Chart(canvas.rows, top, bottom)


def _mean(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return points[-1][0], sum(y for _, y in points) / len(points)


def _limits(
    points: Sequence[tuple[float, float]], first: float, last: float, reference: float | None
) -> tuple[float, float]:
    """The values at the bottom and at the top: those of all but the beginning, and the reference where it is no
    further from them than they are high."""
    skipped = SKIPPED_SHARE if len(points) >= SETTLED_POINTS else 0.0
    settled = [y for x, y in points if x >= first + skipped * (last - first)]
    bottom, top = min(y for _, y in points), max(settled)
    if reference is not None and bottom - 2 * (top - bottom) <= reference <= max(y for _, y in points):
        bottom, top = min(bottom, reference), max(top, reference)
    room = 0.04 * (top - bottom) or 0.5
    return bottom - room, top + room


class _Canvas:
    """Dots in cells; `rows` are what they have become."""

    def __init__(self, width: int, height: int, x: tuple[float, float], y: tuple[float, float]) -> None:
        self.width = width
        self.height = height
        self.x = x
        self.y = y
        self.rows = [[Cell(" ", "")] * width for _ in range(height)]

    def _column(self, x: float) -> float:
        """The column of dots of a step, from 0."""
        first, last = self.x
        return (x - first) / (last - first or 1.0) * (2 * self.width - 1)

    def _row(self, y: float) -> int:
        """The row of dots of a value; what is above the top or below the bottom stands there."""
        bottom, top = self.y
        share = (top - y) / (top - bottom)
        return round(min(1.0, max(0.0, share)) * (4 * self.height - 1))

    def line(self, kind: str, points: Sequence[tuple[float, float]]) -> None:
        """Join points; where several share a column of dots, their mean counts."""
        columns: dict[int, list[float]] = {}
        for x, y in points:
            columns.setdefault(round(self._column(x)), []).append(y)
        before: tuple[int, int] | None = None
        for column, values in columns.items():
            row = self._row(sum(values) / len(values))
            self._join(kind, before or (column, row), (column, row))
            before = column, row

    def _join(self, kind: str, start: tuple[int, int], end: tuple[int, int]) -> None:
        """A straight line of dots."""
        (x0, y0), (x1, y1) = start, end
        n = max(abs(x1 - x0), abs(y1 - y0), 1)
        for k in range(n + 1):
            self._dot(kind, round(x0 + (x1 - x0) * k / n), round(y0 + (y1 - y0) * k / n))

    def _dot(self, kind: str, x: int, y: int) -> None:
        cells, column = self.rows[y // 4], x // 2
        cell = cells[column]
        code = ord(cell.char) if ord(cell.char) >= EMPTY and cell.char not in (BEST, REFERENCE) else EMPTY
        cells[column] = Cell(chr(code | DOTS[y % 4][x % 2]), kind)

    def rule(self, y: float) -> None:
        """A line across."""
        self.rows[self._row(y) // 4] = [Cell(REFERENCE, "reference")] * self.width

    def mark(self, x: float, y: float) -> None:
        """The best point."""
        self.rows[self._row(y) // 4][round(self._column(x)) // 2] = Cell(BEST, "best")
