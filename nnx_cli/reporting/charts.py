"""Charts as inline SVG: lines with a shaded spread over linear or logarithmic axes; no script, nothing to fetch.

The plot is an inner <svg> that stretches with the page, while text, strokes and markers keep their size: a chart reads
the same on a telephone and on a wide screen. Its colours are classes that the page's style sheet fills.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise

from nnx_cli.reporting.page import table, text

Point = tuple[float, float]
Band = tuple[float, float, float]  # x, the lowest y there, and the highest

N_COLOURS = 8  # of the style sheet; as many shapes of markers, and dashes from the ninth line on
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
MOST_TICKS = 6
WIDE_X, WIDE_Y = 40, 3  # from the lowest value to the highest: from there on an axis is better logarithmic
N_SHADES = 10  # of a heat map, besides none
CHOICE_SHADE = 4  # behind the number of a choice
CELL, LETTER, LINE = 18, 7, 12  # pixels of a heat map's cells, and of a letter and a line beside them
SMALL_CELL, MANY_COLUMNS = 7, 64  # where there are more columns than that
MOST_LETTERS, UPRIGHT_LETTERS = 28, 3  # beside cells, and as many as fit above one
NARROW_MAPS = 4  # small maps that stand in a row of half a page
MOST_CELLS = 1200  # of a heat map whose values are a table, too
NOTHING = "Nothing to draw: no such number was recorded."


def short(value: float) -> str:
    """A number as an axis has room for it: 0.25, 1,500, 12k, 2.5M, 3e15."""
    size = abs(value)
    if size and not 1e-3 <= size < 1e12:
        return scientific(value)
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if size >= max(scale, 1e4):
            return f"{value / scale:.4g}{unit}"
    return f"{value:,.5g}" if size >= 1000 else f"{value:.4g}"


def scientific(value: float) -> str:
    """A number as FLOPs are counted: 7.32e10."""
    digits, exponent = f"{value:.2e}".split("e")
    return f"{float(digits):g}e{int(exponent)}" if value else "0"


@dataclass(frozen=True)
class Axis:
    """What an axis measures, with its unit; `from_zero` makes it begin there."""

    title: str
    log: bool = False
    from_zero: bool = False
    write: Callable[[float], str] = short

    def takes(self, value: float) -> bool:
        """Whether a value has a place on it."""
        return math.isfinite(value) and (value > 0 or not self.log)

    def at(self, value: float) -> float:
        """A value as what lengths on the axis are proportional to."""
        return math.log10(value) if self.log else value


@dataclass(frozen=True)
class Line:
    """A named curve. `spread` is shaded around it, `best` a point of it that is marked."""

    name: str
    points: Sequence[Point]
    spread: Sequence[Band] = ()
    best: Point | None = None


@dataclass(frozen=True)
class Reference:
    """A horizontal line to compare with."""

    name: str
    value: float


def spans(values: Iterable[float], times: float) -> bool:
    """Whether values go over so wide a range that a logarithmic axis shows them better."""
    positive = [value for value in values if value > 0 and math.isfinite(value)]
    return bool(positive) and max(positive) > times * min(positive)


def time_unit(longest_s: float) -> tuple[str, float]:
    """The unit that suits times of up to so many seconds, and its seconds."""
    units = (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0))
    return next(((name, seconds) for name, seconds in units if longest_s >= 3 * seconds), ("seconds", 1.0))


def memory_unit(most_bytes: float) -> tuple[str, float]:
    """The unit that suits amounts of up to so many bytes, and its bytes."""
    return ("GiB", 2.0**30) if most_bytes >= 2**30 else ("MiB", 2.0**20)


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
    )


def chart(title: str, about: str, x: Axis, y: Axis, lines: Iterable[Line], references: Iterable[Reference] = ()) -> str:
    """A figure: title, what it shows (`about`), legend, plot, and its numbers as a table.

    Points that an axis cannot hold (not finite; not above 0 where it is logarithmic) are left out.
    """
    placed = [_placed(line, x, y) for line in lines]  # each keeps its colour, though another one be empty
    drawn = [line for line in placed if line.points]
    if not drawn:
        return f"<figure>\n{_caption(title, about)}\n<p class=empty>{NOTHING}</p>\n</figure>"
    marked = [reference for reference in references if y.takes(reference.value)]
    plot = _Plot(_Scale(x, _xs(drawn)), _Scale(y, _ys(drawn, marked)))
    svg = [plot.grid(), plot.curves(placed), plot.references(marked), plot.markers(placed), plot.best(placed)]
    return _figure(title, about, _legend(placed), svg, _description(drawn, marked, x, y), _numbers(title, drawn, x, y))


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
        return f"<figure>\n{_caption(title, about)}\n<p class=empty>{NOTHING}</p>\n</figure>"
    errors = [row.mean + sign * row.error for row in rows for sign in (-1, 1) if row.error]
    scale = _Scale(x, [value for row in rows for value in (row.mean, *row.values)] + errors).padded(0.05, 0.05)

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
        parts.append(_words("label", f'x="0" dx="6" y="{y}" dy="-1.1em"', f"{row.name} {x.write(row.mean)}"))
    told = [f"{row.name}: mean {x.write(row.mean)}, single {', '.join(map(x.write, row.values))}." for row in rows]
    shown = [[row.name, x.write(row.mean), row.error and x.write(row.error), *map(x.write, row.values)] for row in rows]
    most = max(len(row.values) for row in rows)
    columns = ["line", "mean", "±", *(f"value {number + 1}" for number in range(most))]
    filled = [row + [None] * (len(columns) - len(row)) for row in shown]
    return _figure(title, about, "", parts, " ".join(told), table(columns, filled, _numbers_of(title)), 56 * len(rows))


@dataclass(frozen=True)
class Matrix:
    """Values of rows and columns that have names. `signed` ones have a colour on either side of 0; of a `choice` each
    is the number of something. None: there is no value. The darkest is `full`, or else the largest value. With `root`,
    shades grow by the square root of values, so that faint ones are seen."""

    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    kind: str = "share"  # or signed, or choice
    full: float | None = None
    root: bool = False

    @property
    def most(self) -> float:
        """What the darkest shade stands for."""
        return self.full or max((abs(value) for row in self.values for value in row if value is not None), default=0.0)


def heat_map(title: str, about: str, matrix: Matrix) -> str:
    """A figure of a matrix in shades, under the names of its columns and beside those of its rows; it can be scrolled
    where the screen is narrow."""
    if not matrix.rows or not matrix.columns:
        return f"<figure>\n{_caption(title, about)}\n<p class=empty>{NOTHING}</p>\n</figure>"
    cell = CELL if len(matrix.columns) <= MANY_COLUMNS else SMALL_CELL
    longest = max(map(len, matrix.columns))
    upright = longest <= UPRIGHT_LETTERS
    left = 8 + LETTER * min(MOST_LETTERS, max(map(len, matrix.rows)))
    above = 18 if upright else 8 + LETTER * min(MOST_LETTERS, longest)
    width, height = cell * len(matrix.columns), cell * len(matrix.rows)
    parts = [_cells(matrix, f'x="{left}" y="{above}" width="{width}" height="{height}"')]
    for number, name in list(enumerate(matrix.rows))[:: -(-LINE // cell)]:
        y = above + cell * (number + 0.5)
        parts.append(_words("tick", f'x="{left - 5}" y="{y}" dy=".35em" text-anchor="end"', _cut(name)))
    for number, name in list(enumerate(matrix.columns))[:: -(-(CELL if upright else LINE) // cell)]:
        x = left + cell * (number + 0.5)
        turned = f'transform="translate({x} {above - 5}) rotate(-90)" dy=".35em"'
        straight = f'x="{x}" y="{above - 5}" text-anchor="middle"'
        parts.append(_words("tick", straight if upright else turned, _cut(name)))
    if matrix.kind == "choice":
        parts += _numbers_in_cells(matrix, left, above, cell)
    picture = _picture(title, _told(matrix), parts, left + width + 8, above + height + 4, "heat")
    scroll = f'<div class="scroll whole" tabindex="0" role="region" aria-label="{text(title)}">{picture}</div>'
    inner = [_caption(title, about), _scale_words(matrix), scroll, _values(title, matrix)]
    return "<figure class=wide>\n" + "\n".join(part for part in inner if part) + "\n</figure>"


def _numbers_in_cells(matrix: Matrix, left: int, above: int, cell: int) -> Iterable[str]:
    """The values themselves, in the middle of their cells."""
    for row, values in enumerate(matrix.values):
        for column, value in enumerate(values):
            x, y = left + cell * (column + 0.5), above + cell * (row + 0.5)
            if value is not None:
                yield _words("choice", f'x="{x}" y="{y}" dy=".35em" text-anchor="middle"', f"{value:.0f}")


def heat_maps(title: str, about: str, maps: Sequence[tuple[str, Matrix]]) -> str:
    """A figure of several matrices, each a small picture above its name."""
    shown = []
    for name, matrix in maps:
        n_rows, n_columns = len(matrix.rows), len(matrix.columns)
        cells = [_cells(matrix, f'width="{n_columns}" height="{n_rows}"')]
        picture = _picture(f"{title}, {name}", _told(matrix), cells, n_columns, n_rows, "map")
        shown.append(f"<li>{picture}<span>{text(name)}</span></li>")
    kind = " class=wide" if len(maps) > NARROW_MAPS else ""
    return f"<figure{kind}>\n{_caption(title, about)}\n<ul class=maps>{''.join(shown)}</ul>\n</figure>"


def _cells(matrix: Matrix, place: str) -> str:
    """The cells of a matrix: a path for each of a few shades, of runs of neighbours that have it."""
    paths: dict[tuple[str, int], list[str]] = {}
    most = matrix.most
    for y, values in enumerate(matrix.values):
        x = 0
        for shade, run in groupby(values, key=lambda value: _shade(value, most, matrix)):
            n = len(list(run))
            if shade[1]:
                paths.setdefault(shade, []).append(f"M{x} {y}h{n}v1h-{n}z")
            x += n
    drawn = (
        f'<path class="cell {colour}" fill-opacity="{level / N_SHADES:.2f}" d="{"".join(runs)}"/>'
        for (colour, level), runs in sorted(paths.items())
    )
    box = f'viewBox="0 0 {len(matrix.columns)} {len(matrix.rows)}" preserveAspectRatio="none"'
    return f"<svg {place} {box}>{''.join(drawn)}</svg>"


def _shade(value: float | None, most: float, matrix: Matrix) -> tuple[str, int]:
    """Colour and level of a value among values of up to `most`."""
    if value is None or not most:
        return "c0", 0
    if matrix.kind == "choice":
        return f"c{int(value) % N_COLOURS}", CHOICE_SHADE
    share = min(1.0, abs(value) / most)
    return "c0" if value >= 0 else "c1", round(N_SHADES * (share**0.5 if matrix.root else share))


def _picture(title: str, told: str, parts: Sequence[str], width: float, height: float, kind: str) -> str:
    """A picture of fixed proportions with a title and a description for those who cannot see it."""
    label = hashlib.sha256(f"{title}{told}{parts}".encode(errors="backslashreplace")).hexdigest()[:10]
    size = f'width="{width}" height="{height}" ' if kind == "heat" else ""
    return (
        f'<svg class="{kind}" role="img" aria-labelledby="t{label} d{label}" {size}viewBox="0 0 {width} {height}">'
        f'<title id="t{label}">{text(title)}</title><desc id="d{label}">{text(told)}</desc>{"".join(parts)}</svg>'
    )


def _told(matrix: Matrix) -> str:
    """A matrix in words: where the largest value of the first rows stands."""
    told = [f"{len(matrix.rows)} rows of {len(matrix.columns)} values."]
    for name, values in list(zip(matrix.rows, matrix.values, strict=True))[-DESCRIBED:]:
        there = [
            (abs(value), column) for value, column in zip(values, matrix.columns, strict=True) if value is not None
        ]
        if there:
            told.append(f"{name}: most at {max(there)[1]}, {max(there)[0]:.3g}.")
    return " ".join(told)


def _scale_words(matrix: Matrix) -> str:
    """What the shades stand for."""
    if matrix.kind == "choice":
        return ""
    most = short(matrix.most)
    half = f"; half as dark: {short(matrix.most / 4)}" if matrix.root else ""
    entries = [("c0", f"darkest: {most}{half}; blank: 0")]
    if matrix.kind == "signed":
        entries.append(("c1", f"darkest: -{most}"))
    swatch = '<svg width="36" height="14" viewBox="0 0 36 14" aria-hidden="true">' + "".join(
        f'<path class="cell" fill-opacity="{(n + 1) / 4:.2f}" d="M{9 * n} 0h9v14h-9z"/>' for n in range(4)
    )
    return (
        "<ul class=legend>"
        + "".join(f'<li class="{c}">{swatch}</svg><span>{words}</span></li>' for c, words in entries)
        + "</ul>"
    )


def _values(title: str, matrix: Matrix) -> str:
    """The values as a table behind a line that opens, where they are few."""
    if len(matrix.rows) * len(matrix.columns) > MOST_CELLS:
        return ""
    rows = [
        [name, *(None if value is None else f"{value:.3g}" for value in values)]
        for name, values in zip(matrix.rows, matrix.values, strict=True)
    ]
    return f"<details><summary>The numbers</summary>{table(['', *matrix.columns], rows, _numbers_of(title))}</details>"


def _cut(name: str) -> str:
    return name if len(name) <= MOST_LETTERS else name[: MOST_LETTERS - 1] + "…"


def _vertical_grid(x: _Scale) -> list[str]:
    """Grid, ticks and title of a horizontal axis."""
    parts = []
    for value in x.ticks():
        at = f"{x(value) / 10:.2f}%"
        parts.append(f'<line class=grid x1="{at}" x2="{at}" y1="0" y2="100%"/>')
        parts.append(_words("tick", f'x="{at}" y="100%" dy="1.6em" text-anchor="middle"', x.axis.write(value)))
    return [*parts, _words("axis", 'x="100%" y="100%" dy="3.1em" text-anchor="end"', _titled(x.axis))]


def _figure(
    title: str, about: str, legend: str, svg: Sequence[str], description: str, numbers: str, height: int = 280
) -> str:
    """A figure whose picture has a title and a description, above its numbers, which open by mouse or key."""
    label = hashlib.sha256(f"{title}{svg}".encode()).hexdigest()[:10]
    parts = [
        _caption(title, about),
        legend,
        f'<div class=plot><svg role="img" aria-labelledby="t{label} d{label}" height="{height}">',
        f'<title id="t{label}">{text(title)}</title>',
        f'<desc id="d{label}">{text(description)}</desc>',
        *svg,
        "</svg></div>",
        f"<details><summary>The numbers</summary>{numbers}</details>",
    ]
    return "<figure>\n" + "\n".join(part for part in parts if part) + "\n</figure>"


def _numbers_of(title: str) -> str:
    return f"Numbers of the chart: {title}"


class _Scale:
    """Where values of an axis lie, in thousandths of its length, and its ticks."""

    def __init__(self, axis: Axis, values: Sequence[float]) -> None:
        self.axis = axis
        low, high = min(values), max(values)
        if axis.from_zero:
            low, high = min(low, 0.0), max(high, 0.0)
        a, b = axis.at(low), axis.at(high)
        if b - a <= 1e-9 * max(abs(a), abs(b)):
            room = 0.5 if axis.log else 0.1 * abs(a) or 1.0
            a, b = a - room, b + room
        self.low, self.high = a, b

    def padded(self, below: float, above: float) -> _Scale:
        """With so much of its length more at both ends; nothing below zero where it begins there."""
        length = self.high - self.low
        if not (self.axis.from_zero and self.low == 0.0):
            self.low -= below * length
        self.high += above * length
        return self

    def __call__(self, value: float) -> float:
        return 1000 * (self.axis.at(value) - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Round numbers between the ends."""
        if not self.axis.log:
            return _round_numbers(self.low, self.high)
        low, high = 10**self.low, 10**self.high
        decades = range(math.floor(self.low), math.ceil(self.high) + 1)
        whole = [10.0**power for power in decades if low <= 10.0**power <= high]
        if len(whole) > 2:
            return whole[:: math.ceil(len(whole) / MOST_TICKS)]
        finer = [digit * 10.0**power for power in decades for digit in (1, 2, 5) if low <= digit * 10.0**power <= high]
        return finer if len(finer) > 2 else _round_numbers(low, high)


def _round_numbers(low: float, high: float) -> list[float]:
    """At most MOST_TICKS numbers from `low` to `high` that people count by."""
    rough = (high - low) / (MOST_TICKS - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(times * power for times in (1, 2, 2.5, 5, 10) if times * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


class _Plot:
    """The parts of a plot over two scales."""

    def __init__(self, x: _Scale, y: _Scale) -> None:
        self.x = x
        self.y = y.padded(0.16, 0.06)  # below the lowest point is room for what it is

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Where a point lies in the stretched inner picture, whose y points down."""
        return round(self.x(x), 1), round(1000 - self.y(y), 1)

    def grid(self) -> str:
        """Grid, ticks and titles of the axes."""
        parts = []
        for value in self.y.ticks():
            at = f"{100 - self.y(value) / 10:.2f}%"
            parts.append(f'<line class=grid x1="0" x2="100%" y1="{at}" y2="{at}"/>')
            parts.append(_words("tick", f'x="-8" y="{at}" dy=".32em" text-anchor="end"', self.y.axis.write(value)))
        parts.append(_words("axis", 'x="-52" y="-12"', _titled(self.y.axis)))
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
            if places:
                name = f"<title>{text(line.name)}</title>"
                parts.append(f'<path class="{_style(number)}" d="M{_path(places)}">{name}</path>')
        return "\n".join([*parts, "</svg>"])

    def references(self, references: Sequence[Reference]) -> str:
        """Horizontal lines with their names."""
        parts = []
        for reference in references:
            at = f"{100 - self.y(reference.value) / 10:.2f}%"
            parts.append(f'<line class=reference x1="0" x2="100%" y1="{at}" y2="{at}"/>')
            parts.append(_words("label", f'x="100%" y="{at}" dx="-4" dy="-.4em" text-anchor="end"', reference.name))
        return "\n".join(parts)

    def markers(self, lines: Sequence[Line]) -> str:
        """Shapes by which several lines are told apart without their colours."""
        if len(lines) == 1:
            return ""
        parts = []
        for number, line in enumerate(lines):
            among = min(MARKERS if len(lines) <= N_COLOURS else FEWER_MARKERS, len(line.points))
            for nth in range(among):
                point = line.points[int((nth + number % N_COLOURS / N_COLOURS) * len(line.points) / among)]
                parts.append(
                    self._mark(point, f'<path class="mark c{number % N_COLOURS}" d="{SHAPES[number % N_COLOURS]}"/>')
                )
        return "\n".join(parts)

    def best(self, lines: Sequence[Line]) -> str:
        """A ring around the best point of each line; where there is but one, its value too."""
        ringed = [(number, line.best) for number, line in enumerate(lines) if line.best]
        parts = []
        for number, best in ringed:
            x, y = self.place(*best)
            value = f"best {self.y.axis.write(best[1])}"
            told = text(f"{lines[number].name}: {value}")
            ring = f'<circle class="ring c{number % N_COLOURS}" r="7"><title>{told}</title></circle>'
            if len(ringed) == 1:
                side = 'text-anchor="end" x="8"' if x > 500 else 'x="-8"'
                ring += _words("label", f'{side} y="{-13 if y > 930 else 22}"', value)
            parts.append(self._mark(best, ring))
        return "\n".join(parts)

    def _mark(self, point: Point, inner: str) -> str:
        x, y = self.place(*point)
        return f'<svg class=at x="{x / 10:.2f}%" y="{y / 10:.2f}%">{inner}</svg>'


def _placed(line: Line, x: Axis, y: Axis) -> Line:
    """What of a line the axes can hold, from left to right."""
    points = sorted((point for point in line.points if x.takes(point[0]) and y.takes(point[1])), key=lambda p: p[0])
    spread = sorted(band for band in line.spread if x.takes(band[0]) and y.takes(band[1]) and y.takes(band[2]))
    best = line.best if line.best and x.takes(line.best[0]) and y.takes(line.best[1]) else None
    return Line(line.name, points, spread, best)


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


def _words(kind: str, where: str, words: str) -> str:
    """Words at a place of the outer picture, where they keep their size."""
    return f'<text class="{kind}" {where}>{text(words)}</text>'


def _caption(title: str, about: str) -> str:
    return f"<figcaption><h3>{text(title)}</h3><p>{text(about)}</p></figcaption>"


def _legend(lines: Sequence[Line]) -> str:
    if len(lines) == 1:
        return ""
    entries = []
    for number, line in enumerate(lines):
        if not line.points:
            continue
        mark = f'<path class="mark" transform="translate(18 7)" d="{SHAPES[number % N_COLOURS]}"/>'
        stroke = f'<path class="{_style(number)}" d="M1 7H35"/>'
        swatch = f'<svg width="36" height="14" aria-hidden="true">{stroke}{mark}</svg>'
        entries.append(f'<li class="c{number % N_COLOURS}">{swatch}<span>{text(line.name)}</span></li>')
    return f"<ul class=legend>{''.join(entries)}</ul>"


def _description(lines: Sequence[Line], references: Sequence[Reference], x: Axis, y: Axis) -> str:
    """The chart in words, for those who cannot see it."""
    told = [f"{y.title} against {x.title}; {len(lines)} line{'s' * (len(lines) > 1)}."]
    for line in lines[:DESCRIBED]:
        (first, begins), (last, ends) = line.points[0], line.points[-1]
        course = f"{line.name}: {y.write(begins)} at {x.write(first)}, {y.write(ends)} at {x.write(last)}"
        told.append(course + (f", best {y.write(line.best[1])} at {x.write(line.best[0])}." if line.best else "."))
    told += [f"Reference line {reference.name}: {y.write(reference.value)}." for reference in references]
    return " ".join(told)


def _numbers(title: str, lines: Sequence[Line], x: Axis, y: Axis) -> str:
    """The numbers of a chart, evenly picked where they are many, behind a line that opens."""
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
    return table(columns, [row[: len(columns)] for row in rows], _numbers_of(title))
