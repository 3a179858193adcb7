"""Heat maps as inline SVG: values of rows and columns in shades, one large picture or many small ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from nnx_cli.reporting.figures import N_COLOURS, empty_figure, figure, numbers, picture, words
from nnx_cli.reporting.page import text
from nnx_cli.reporting.scales import short

DESCRIBED = 8  # rows that a description for those who cannot see the map goes through
N_SHADES = 10  # of a heat map, besides none
CHOICE_SHADE = 4  # behind the number of a choice
CELL, LETTER, LINE = 18, 7, 12  # pixels of a heat map's cells, and of a letter and a line beside them
SMALL_CELL, ROOM = 7, 1200  # the least of a cell, and what a wide page has room for beside each other
NARROW_ROOM = 300  # pixels, which a telephone has room for
NUMBERED_CELL = 14  # the least that holds a number
MOST_LETTERS, UPRIGHT_LETTERS = 28, 3  # beside cells, and as many as fit above one
NARROW_MAPS = 4  # small maps that stand in a row of half a page
MOST_CELLS = 1200  # of a heat map whose values are a table, too


@dataclass(frozen=True)
class Matrix:
    """Values of rows and columns that have names. `signed` ones have a colour on either side of 0; of a `choice` each
    is the number of something. None: there is no value. The darkest is `full`, or else the largest value. With `root`,
    shades grow by the square root of values, so that faint ones are seen. Where columns are tokens, the `latest` are
    seen first."""

    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    kind: str = "share"  # or signed, or choice
    full: float | None = None
    root: bool = False
    latest: bool = False

    @property
    def most(self) -> float:
        """What the darkest shade stands for."""
        return self.full or max((abs(value) for row in self.values for value in row if value is not None), default=0.0)


class Layout:
    """Where the cells of a matrix lie in a picture, the names of its columns above them, and those of its rows on their
    left, or on the right where a telephone would else show names beside the oldest tokens alone."""

    def __init__(self, matrix: Matrix) -> None:
        self.matrix = matrix
        longest = max(map(len, matrix.columns))
        self.is_upright = longest <= UPRIGHT_LETTERS
        beside = 8 + LETTER * min(MOST_LETTERS, max(map(len, matrix.rows)))
        self.cell = max(SMALL_CELL, min(CELL, (ROOM - 8 - beside) // len(matrix.columns)))
        self.above = 18 if self.is_upright else 8 + LETTER * min(MOST_LETTERS, longest)
        self.width, self.height = self.cell * len(matrix.columns), self.cell * len(matrix.rows)
        self.whole = beside + self.width + 8, self.above + self.height + 4
        self.is_latest = matrix.latest and self.whole[0] > NARROW_ROOM
        self.left = 8 if self.is_latest else beside

    def names(self) -> Iterator[str]:
        """The names, as many as have room."""
        cell, above, left = self.cell, self.above, self.left
        for number, name in list(enumerate(self.matrix.rows))[:: -(-LINE // cell)]:
            y = above + cell * (number + 0.5)
            at = f'x="{left + self.width + 5}"' if self.is_latest else f'x="{left - 5}" text-anchor="end"'
            yield words("tick", f'{at} y="{y}" dy=".35em"', _cut(name))
        for number, name in list(enumerate(self.matrix.columns))[:: -(-(CELL if self.is_upright else LINE) // cell)]:
            x = left + cell * (number + 0.5)
            turned = f'transform="translate({x} {above - 5}) rotate(-90)" dy=".35em"'
            straight = f'x="{x}" y="{above - 5}" text-anchor="middle"'
            yield words("tick", straight if self.is_upright else turned, _cut(name))

    def numbers_in_cells(self) -> Iterator[str]:
        """The values themselves, in the middle of their cells."""
        for row, values in enumerate(self.matrix.values):
            for column, value in enumerate(values):
                x, y = self.left + self.cell * (column + 0.5), self.above + self.cell * (row + 0.5)
                if value is not None:
                    yield words("choice", f'x="{x}" y="{y}" dy=".35em" text-anchor="middle"', f"{value:.0f}")


def heat_map(title: str, about: str, matrix: Matrix) -> str:
    """A figure of a matrix in shades, under the names of its columns and beside those of its rows; it can be scrolled
    where the screen is narrow."""
    if not matrix.rows or not matrix.columns:
        return empty_figure(title, about)
    layout = Layout(matrix)
    place = f'x="{layout.left}" y="{layout.above}" width="{layout.width}" height="{layout.height}"'
    parts = [cells(matrix, place), *layout.names()]
    if matrix.kind == "choice" and layout.cell >= NUMBERED_CELL:
        parts += layout.numbers_in_cells()
    shown = scrolled(title, told(matrix), parts, *layout.whole, is_latest=layout.is_latest)
    return figure(title, about, scale_words(matrix), shown, _values(title, matrix), is_wide=True)


def scrolled(
    title: str, description: str, parts: Sequence[str], width: float, height: float, is_latest: bool = False
) -> str:
    """A picture of a size of its own, which can be scrolled where the screen is narrow; with `is_latest` its right side
    is seen first."""
    shown = picture(
        title, description, parts, f'class=heat width="{width}" height="{height}" {_view_box(width, height)}'
    )
    kind = "scroll whole latest" if is_latest else "scroll whole"
    return f'<div class="{kind}" tabindex="0" role="region" aria-label="{text(title)}">{shown}</div>'


def heat_maps(title: str, about: str, maps: Sequence[tuple[str, Matrix]]) -> str:
    """A figure of several matrices, each a small picture above its name."""
    shown = []
    for name, matrix in maps:
        n_rows, n_columns = len(matrix.rows), len(matrix.columns)
        drawn = [cells(matrix, f'width="{n_columns}" height="{n_rows}"')]
        small = picture(f"{title}, {name}", told(matrix), drawn, f"class=map {_view_box(n_columns, n_rows)}")
        shown.append(f"<li>{small}<span>{text(name)}</span></li>")
    return figure(title, about, f"<ul class=maps>{''.join(shown)}</ul>", is_wide=len(maps) > NARROW_MAPS)


def _view_box(width: float, height: float) -> str:
    return f'viewBox="0 0 {width} {height}"'


def cells(matrix: Matrix, place: str) -> str:
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


def told(matrix: Matrix) -> str:
    """A matrix in words: where the largest value of the first rows stands."""
    sentences = [f"{len(matrix.rows)} rows of {len(matrix.columns)} values."]
    for name, values in list(zip(matrix.rows, matrix.values, strict=True))[-DESCRIBED:]:
        there = [
            (abs(value), column) for value, column in zip(values, matrix.columns, strict=True) if value is not None
        ]
        if there:
            sentences.append(f"{name}: most at {max(there)[1]}, {max(there)[0]:.3g}.")
    return " ".join(sentences)


def scale_words(matrix: Matrix) -> str:
    """What the shades stand for."""
    if matrix.kind == "choice":
        return ""
    most = short(matrix.most)
    half = f"; half as dark: {short(matrix.most / 4)}" if matrix.root else ""
    entries = [("c0", f"darkest: {most}{half}; blank: 0")]
    if matrix.kind == "signed":
        entries.append(("c1", f"darkest: -{most}"))
    return legend((colour, [(n + 1) / 4 for n in range(4)], said) for colour, said in entries)


def legend(entries: Iterable[tuple[str, Sequence[float], str]]) -> str:
    """What colours stand for: each a class of the style sheet, some shades of it side by side, and words."""
    shown = []
    for colour, shades, said in entries:
        width = 36 / len(shades)
        swatch = "".join(
            f'<path class="cell" fill-opacity="{shade:.2f}" d="M{n * width:g} 0h{width:g}v14h-{width:g}z"/>'
            for n, shade in enumerate(shades)
        )
        box = '<svg width="36" height="14" viewBox="0 0 36 14" aria-hidden="true">'
        shown.append(f'<li class="{colour}">{box}{swatch}</svg><span>{text(said)}</span></li>')
    return f"<ul class=legend>{''.join(shown)}</ul>"


def shaded_text(title: str, about: str, pieces: Sequence[str], values: Sequence[float | None], unit: str) -> str:
    """A figure of a text whose pieces are the darker, the larger their values; None: there is no value."""
    most = max((value for value in values if value is not None), default=0.0)
    levels = [0 if value is None or not most else round(N_SHADES * max(0.0, value) / most) for value in values]
    spans = []
    for level, run in groupby(zip(levels, pieces, strict=True), key=lambda pair: pair[0]):
        written = text("".join(piece for _, piece in run))
        spans.append(f"<span class=s{level}>{written}</span>" if level else written)
    said = [("c1", [0.125, 0.25, 0.375, 0.5], f"darkest: {short(most)} {unit}; blank: 0")]
    rows = [
        [repr(piece), None if value is None else f"{value:.3g}"] for piece, value in zip(pieces, values, strict=True)
    ]
    shown = f'<pre class=shaded tabindex="0" role="region" aria-label="{text(title)}">{"".join(spans)}</pre>'
    return figure(title, about, legend(said), shown, numbers(title, ["piece", unit], rows), is_wide=True)


def _values(title: str, matrix: Matrix) -> str:
    """The values as a table behind a line that opens, where they are few."""
    if len(matrix.rows) * len(matrix.columns) > MOST_CELLS:
        return ""
    rows = [
        [name, *(None if value is None else f"{value:.3g}" for value in values)]
        for name, values in zip(matrix.rows, matrix.values, strict=True)
    ]
    return numbers(title, ["", *matrix.columns], rows)


def _cut(name: str) -> str:
    return name if len(name) <= MOST_LETTERS else name[: MOST_LETTERS - 1] + "…"
