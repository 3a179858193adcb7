"""Charts as inline SVG: lines with a shaded spread over linear or logarithmic axes; no script, nothing to fetch.

The plot is an inner <svg> that stretches with the page, while text, strokes and markers keep their size: a chart reads
the same on a telephone and on a wide screen. Its colours are classes that the page's style sheet fills.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from nnx_cli.reporting.figures import N_COLOURS, empty_figure, figure, numbers, picture, words
from nnx_cli.reporting.page import text
from nnx_cli.reporting.scales import Axis, Scale, scientific, short, spans, time_unit

Point = tuple[float, float]
Band = tuple[float, float, float]  # x, the lowest y there, and the highest

SHAPES = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0",
    "M-3.5 -3.5h7v7h-7z",
    "M0 -4.5l4.5 8h-9z",
    "M0 -5l5 5l-5 5l-5 -5z",
    "M0 4.5l4.5 -8h-9z",
    "M-4 -1.3h2.7v-2.7h2.6v2.7h2.7v2.6h-2.7v2.7h-2.6v-2.7h-2.7z",
    "M-4 0l2 -4h4l2 4l-2 4h-4z",
    "M-5 -2h10v4h-10z",
)
N_DASHES = 4
MARKERS, FEWER_MARKERS = 4, 2  # of a line; of one among more than there are colours
MOST_POINTS = 120  # of a line that is drawn; what lies between them is its spread
MOST_ROWS = 24  # of the table of a line
DESCRIBED = 8  # lines that a description for those who cannot see the chart goes through
WIDE_X, WIDE_Y = 40, 3  # from the lowest value to the highest: from there on an axis is better logarithmic


@dataclass(frozen=True)
class Line:
    """A named curve. `spread` is shaded around it, `best` a point of it that is marked; unless `joined`, its points are
    marks of their own."""

    name: str
    points: Sequence[Point]
    spread: Sequence[Band] = ()
    best: Point | None = None
    joined: bool = True


@dataclass(frozen=True)
class Reference:
    """A horizontal line to compare with."""

    name: str
    value: float


def thinned(name: str, points: Sequence[Point], best: Point | None = None, most: int = MOST_POINTS) -> Line:
    """A line of at most so many points. Of a longer one, each is the mean of its neighbours, whose lowest and highest
    values are its spread; the last one stays."""
    if len(points) <= most:
        return Line(name, points, best=best)
    means: list[Point] = []
    spread: list[Band] = []
    edges = [round(number * (len(points) - 1) / (most - 1)) for number in range(most)]
    for start, stop in pairwise(edges):
        part = points[start:stop]
        ys = [y for _, y in part]
        x = sum(x for x, _ in part) / len(part)
        means.append((x, sum(ys) / len(ys)))
        spread.append((x, min(ys), max(ys)))
    return Line(name, [*means, points[-1]], spread, best)


def rescaled(line: Line, x: float = 1.0, y: float = 1.0) -> Line:
    """A line in units that are `x` and `y` of the old ones each."""
    return Line(
        line.name,
        [(a / x, b / y) for a, b in line.points],
        [(a / x, low / y, high / y) for a, low, high in line.spread],
        line.best and (line.best[0] / x, line.best[1] / y),
        line.joined,
    )


def chart(title: str, about: str, x: Axis, y: Axis, lines: Iterable[Line], references: Iterable[Reference] = ()) -> str:
    """A figure: title, what it shows (`about`), legend, plot, and its numbers as a table.

    Points that an axis cannot hold (not finite; not above 0 where it is logarithmic) are left out.
    """
    placed = [_placed(line, x, y) for line in lines]  # each keeps its colour, though another one be empty
    drawn = [line for line in placed if line.points]
    if not drawn:
        return empty_figure(title, about)
    marked = [reference for reference in references if y.takes(reference.value)]
    plot = _Plot(Scale(x, _xs(drawn)), Scale(y, _ys(drawn, marked)))
    svg = [plot.grid(), plot.curves(placed), plot.references(marked), plot.markers(placed), plot.best(placed)]
    shown = _shown(title, _description(drawn, marked, x, y), svg)
    legend = _legend(placed, marked, x, y)
    return figure(title, about, legend, shown, numbers(title, *_table(drawn, x, y)))


COURSES = {"tokens": "tokens", "flops": "training FLOPs"}


def learning_curves(
    title: str, about: str, x: str, y: Axis, lines: Sequence[Line], references: Iterable[Reference] = ()
) -> str:
    """A chart of lines against tokens, flops or time_s, in a unit that suits. What spans a wide range is drawn on
    logarithmic axes."""
    xs = [at for line in lines for at, _ in line.points]
    unit, scale = time_unit(max(xs, default=0.0)) if x == "time_s" else ("", 1.0)
    wide = spans(xs, WIDE_X) and not y.from_zero
    write = scientific if x == "flops" else short
    across = Axis(COURSES.get(x, f"training time ({unit})"), log=wide, from_zero=not wide, write=write)
    up = y if y.from_zero else replace(y, log=spans((at for line in lines for _, at in line.points), WIDE_Y))
    return chart(title, about, across, up, [rescaled(line, scale) for line in lines], references)


@dataclass(frozen=True)
class Strip:
    """Single values under one name, and what stands for them all: their mean, and how far it may be off either way."""

    name: str
    values: Sequence[float]
    mean: float
    error: float | None = None


def strips(title: str, about: str, x: Axis, rows: Sequence[Strip]) -> str:
    """A figure of one row a name: a dot for every value, a stroke for their mean, and a bar as wide as its error."""
    if not rows:
        return empty_figure(title, about)
    errors = [row.mean + sign * row.error for row in rows for sign in (-1, 1) if row.error]
    scale = Scale(x, [value for row in rows for value in (row.mean, *row.values)] + errors).padded(0.05, 0.05)

    def place(value: float) -> str:
        return f"{scale(value) / 10:.2f}%"

    parts = _vertical_grid(scale)
    for number, row in enumerate(rows):
        y, kind = f"{100 * (number + 0.5) / len(rows):.2f}%", f"c{number % N_COLOURS}"
        if row.error:
            low, high = place(row.mean - row.error), place(row.mean + row.error)
            parts.append(f'<line class="bar {kind}" x1="{low}" x2="{high}" y1="{y}" y2="{y}"/>')
        mark = f'<path class="mark {kind}" d="{SHAPES[number % N_COLOURS]}"/>'
        parts += [f'<svg class=at x="{place(value)}" y="{y}">{mark}</svg>' for value in row.values]
        parts.append(f'<svg class=at x="{place(row.mean)}" y="{y}"><path class="mean {kind}" d="M0 -11V11"/></svg>')
        parts.append(words("label", f'x="0" dx="6" y="{y}" dy="-1.1em"', f"{row.name} {x.write(row.mean)}"))
    told = [f"{row.name}: mean {x.write(row.mean)}, single {', '.join(map(x.write, row.values))}." for row in rows]
    shown = [[row.name, x.write(row.mean), row.error and x.write(row.error), *map(x.write, row.values)] for row in rows]
    most = max(len(row.values) for row in rows)
    columns = ["line", "mean", "±", *(f"value {number + 1}" for number in range(most))]
    filled = [row + [None] * (len(columns) - len(row)) for row in shown]
    return figure(title, about, _shown(title, " ".join(told), parts, 56 * len(rows)), numbers(title, columns, filled))


def _shown(title: str, told: str, parts: Sequence[str], height: int = 280) -> str:
    """A plot, which is as wide as the page has room for."""
    return f"<div class=plot>{picture(title, told, parts, f'height={height}')}</div>"


def _vertical_grid(x: Scale) -> list[str]:
    """Grid, ticks and title of a horizontal axis."""
    parts = []
    for value in x.ticks():
        at = f"{x(value) / 10:.2f}%"
        parts.append(f'<line class=grid x1="{at}" x2="{at}" y1="0" y2="100%"/>')
        parts.append(words("tick", f'x="{at}" y="100%" dy="1.6em" text-anchor="middle"', x.axis.write(value)))
    return [*parts, words("axis", 'x="100%" y="100%" dy="3.1em" text-anchor="end"', _titled(x.axis))]


class _Plot:
    """The parts of a plot over two scales."""

    def __init__(self, x: Scale, y: Scale) -> None:
        self.x = x
        self.y = y.padded(0.06, 0.06)

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Where a point lies in the stretched inner picture, whose y points down."""
        return round(self.x(x), 1), round(1000 - self.y(y), 1)

    def grid(self) -> str:
        """Grid, ticks and titles of the axes."""
        parts = []
        for value in self.y.ticks():
            at = f"{100 - self.y(value) / 10:.2f}%"
            parts.append(f'<line class=grid x1="0" x2="100%" y1="{at}" y2="{at}"/>')
            parts.append(words("tick", f'x="-8" y="{at}" dy=".32em" text-anchor="end"', self.y.axis.write(value)))
        parts.append(words("axis", 'x="-52" y="-12"', _titled(self.y.axis)))
        return "\n".join([*parts, *_vertical_grid(self.x)])

    def curves(self, lines: Sequence[Line]) -> str:
        """The lines and their shades, in a picture that stretches."""
        parts = ['<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" width="100%" height="100%">']
        for number, line in enumerate(lines):
            if line.spread:
                above = [self.place(x, high) for x, _, high in line.spread]
                below = [self.place(x, low) for x, low, _ in reversed(line.spread)]
                parts.append(f'<path class="spread c{number % N_COLOURS}" d="M{_path([*above, *below])}Z"/>')
        for number, line in enumerate(lines):
            places = [self.place(*point) for point in line.points]
            if len(places) == 1:
                places *= 2  # a dot, of what the ends of a line are
            if places and line.joined:
                name = f"<title>{text(line.name)}</title>"
                parts.append(f'<path class="{_style(number)}" d="M{_path(places)}">{name}</path>')
        return "\n".join([*parts, "</svg>"])

    def references(self, references: Sequence[Reference]) -> str:
        """Horizontal lines; the legend has their names, for words here would lie on curves."""
        parts = []
        for reference in references:
            at = f"{100 - self.y(reference.value) / 10:.2f}%"
            name = f"<title>{text(reference.name)}</title>"
            parts.append(f'<line class=reference x1="0" x2="100%" y1="{at}" y2="{at}">{name}</line>')
        return "\n".join(parts)

    def markers(self, lines: Sequence[Line]) -> str:
        """Shapes by which several lines are told apart without their colours, and points that no line joins."""
        few = 0 if len(lines) == 1 else MARKERS if len(lines) <= N_COLOURS else FEWER_MARKERS
        parts = []
        for number, line in enumerate(lines):
            n_points, kind = len(line.points), number % N_COLOURS
            among = min(few, n_points) if line.joined else n_points
            for nth in range(among):
                point = line.points[int((nth + kind / N_COLOURS) * n_points / among)]
                parts.append(self._mark(point, f'<path class="mark c{kind}" d="{SHAPES[kind]}"/>'))
        return "\n".join(parts)

    def best(self, lines: Sequence[Line]) -> str:
        """A ring around the best point of each line."""
        parts = []
        for number, line in enumerate(lines):
            if line.best:
                told = text(f"{line.name}: best {self.y.axis.write(line.best[1])}")
                ring = f'<circle class="ring c{number % N_COLOURS}" r="7"><title>{told}</title></circle>'
                parts.append(self._mark(line.best, ring))
        return "\n".join(parts)

    def _mark(self, point: Point, inner: str) -> str:
        x, y = self.place(*point)
        return f'<svg class=at x="{x / 10:.2f}%" y="{y / 10:.2f}%">{inner}</svg>'


def _placed(line: Line, x: Axis, y: Axis) -> Line:
    """What of a line the axes can hold, from left to right."""
    points = sorted((point for point in line.points if x.takes(point[0]) and y.takes(point[1])), key=lambda p: p[0])
    spread = sorted(band for band in line.spread if x.takes(band[0]) and y.takes(band[1]) and y.takes(band[2]))
    best = line.best if line.best and x.takes(line.best[0]) and y.takes(line.best[1]) else None
    return Line(line.name, points, spread, best, line.joined)


def _xs(lines: Sequence[Line]) -> list[float]:
    return [x for line in lines for x, _ in [*line.points, *([line.best] if line.best else [])]]


def _ys(lines: Sequence[Line], references: Sequence[Reference]) -> list[float]:
    points = [y for line in lines for _, y in [*line.points, *([line.best] if line.best else [])]]
    return points + [y for line in lines for _, *ys in line.spread for y in ys] + [each.value for each in references]


def _style(number: int) -> str:
    """The classes of a line: its colour, and its dashes from the ninth on."""
    return f"line c{number % N_COLOURS} d{number // N_COLOURS % N_DASHES}"


def _path(places: Iterable[tuple[float, float]]) -> str:
    return "L".join(f"{x:g} {y:g}" for x, y in places)


def _titled(axis: Axis) -> str:
    return axis.title + (", logarithmic" if axis.log else "")


def _legend(lines: Sequence[Line], references: Sequence[Reference], x: Axis, y: Axis) -> str:
    """What the lines are, where there are several, which of them is a reference, and the best point, where there is but
    one."""
    entries = []
    for number, line in enumerate(lines if len(lines) > 1 else []):
        if line.points:
            mark = f'<path class="mark" transform="translate(18 7)" d="{SHAPES[number % N_COLOURS]}"/>'
            entries.append((f"c{number % N_COLOURS}", f'<path class="{_style(number)}" d="M1 7H35"/>{mark}', line.name))
    ringed = [(number, line.best) for number, line in enumerate(lines) if line.best]
    for number, best in ringed if len(ringed) == 1 else []:
        words_of_it = f"best {y.write(best[1])} at {x.title} {x.write(best[0])}"
        entries.append((f"c{number % N_COLOURS}", '<circle class=ring cx="18" cy="7" r="5.5"/>', words_of_it))
    for reference in references:
        dots = '<line class=reference x1="1" x2="35" y1="7" y2="7"/>'
        entries.append(("", dots, f"{reference.name} {y.write(reference.value)}"))
    box = 'width="36" height="14" aria-hidden="true"'
    shown = (
        f'<li class="{kind}"><svg {box}>{swatch}</svg><span>{text(name)}</span></li>' for kind, swatch, name in entries
    )
    return f"<ul class=legend>{''.join(shown)}</ul>" if entries else ""


def _description(lines: Sequence[Line], references: Sequence[Reference], x: Axis, y: Axis) -> str:
    """The chart in words, for those who cannot see it."""
    told = [f"{y.title} against {x.title}; {len(lines)} line{'s' * (len(lines) > 1)}."]
    for line in lines[:DESCRIBED]:
        (first, begins), (last, ends) = line.points[0], line.points[-1]
        course = f"{line.name}: {y.write(begins)} at {x.write(first)}, {y.write(ends)} at {x.write(last)}"
        told.append(course + (f", best {y.write(line.best[1])} at {x.write(line.best[0])}." if line.best else "."))
    told += [f"Reference line {reference.name}: {y.write(reference.value)}." for reference in references]
    return " ".join(told)


def _table(lines: Sequence[Line], x: Axis, y: Axis) -> tuple[list[str], list[list[str | None]]]:
    """Columns and rows with the numbers of a chart, evenly picked where they are many."""
    rows = []
    for line in lines:
        bands = {at: f"{y.write(low)} to {y.write(high)}" for at, low, high in line.spread}
        step = max(1, math.ceil(len(line.points) / MOST_ROWS))
        picked = sorted({*range(0, len(line.points), step), len(line.points) - 1})
        rows += [
            [line.name, x.write(line.points[n][0]), f"{line.points[n][1]:.6g}", bands.get(line.points[n][0])]
            for n in picked
        ]
    shaded = any(line.spread for line in lines)
    columns = ["line", x.title, y.title, *(["shaded"] if shaded else [])]
    return columns, [row[: len(columns)] for row in rows]
