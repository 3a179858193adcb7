"""Heat maps as inline SVG: values of rows and columns in shades, one large picture or many small ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from nnx_cli.reporting.figures import N_COLOURS, empty_figure, figure, numbers, picture, words
from nnx_cli.reporting.page import text
from nnx_cli.reporting.scales import short

DESCRIBED = 8  # rows that a description for those who cannot see the map goes through
N_SHADES = 10  # of a heat map, besides none
CHOICE_SHADE = 4  # behind the number of a choice
CELL, LETTER, LINE = 18, 7, 12  # pixels of a heat map's cells, and of a letter and a line beside them
SMALL_CELL, MANY_COLUMNS = 7, 64  # where there are more columns than that
MOST_LETTERS, UPRIGHT_LETTERS = 28, 3  # beside cells, and as many as fit above one
NARROW_MAPS = 4  # small maps that stand in a row of half a page
MOST_CELLS = 1200  # of a heat map whose values are a table, too


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
        return empty_figure(title, about)
    cell = CELL if len(matrix.columns) <= MANY_COLUMNS else SMALL_CELL
    longest = max(map(len, matrix.columns))
    upright = longest <= UPRIGHT_LETTERS
    left = 8 + LETTER * min(MOST_LETTERS, max(map(len, matrix.rows)))
    above = 18 if upright else 8 + LETTER * min(MOST_LETTERS, longest)
    width, height = cell * len(matrix.columns), cell * len(matrix.rows)
    parts = [_cells(matrix, f'x="{left}" y="{above}" width="{width}" height="{height}"')]
    for number, name in list(enumerate(matrix.rows))[:: -(-LINE // cell)]:
        y = above + cell * (number + 0.5)
        parts.append(words("tick", f'x="{left - 5}" y="{y}" dy=".35em" text-anchor="end"', _cut(name)))
    for number, name in list(enumerate(matrix.columns))[:: -(-(CELL if upright else LINE) // cell)]:
        x = left + cell * (number + 0.5)
        turned = f'transform="translate({x} {above - 5}) rotate(-90)" dy=".35em"'
        straight = f'x="{x}" y="{above - 5}" text-anchor="middle"'
        parts.append(words("tick", straight if upright else turned, _cut(name)))
    if matrix.kind == "choice":
        parts += _numbers_in_cells(matrix, left, above, cell)
    size = f'width="{left + width + 8}" height="{above + height + 4}"'
    shown = picture(title, _told(matrix), parts, f"class=heat {size} {_view_box(left + width + 8, above + height + 4)}")
    scroll = f'<div class="scroll whole" tabindex="0" role="region" aria-label="{text(title)}">{shown}</div>'
    return figure(title, about, _scale_words(matrix), scroll, _values(title, matrix), is_wide=True)


def _numbers_in_cells(matrix: Matrix, left: int, above: int, cell: int) -> Iterable[str]:
    """The values themselves, in the middle of their cells."""
    for row, values in enumerate(matrix.values):
        for column, value in enumerate(values):
            x, y = left + cell * (column + 0.5), above + cell * (row + 0.5)
            if value is not None:
                yield words("choice", f'x="{x}" y="{y}" dy=".35em" text-anchor="middle"', f"{value:.0f}")


def heat_maps(title: str, about: str, maps: Sequence[tuple[str, Matrix]]) -> str:
    """A figure of several matrices, each a small picture above its name."""
    shown = []
    for name, matrix in maps:
        n_rows, n_columns = len(matrix.rows), len(matrix.columns)
        cells = [_cells(matrix, f'width="{n_columns}" height="{n_rows}"')]
        small = picture(f"{title}, {name}", _told(matrix), cells, f"class=map {_view_box(n_columns, n_rows)}")
        shown.append(f"<li>{small}<span>{text(name)}</span></li>")
    return figure(title, about, f"<ul class=maps>{''.join(shown)}</ul>", is_wide=len(maps) > NARROW_MAPS)


def _view_box(width: float, height: float) -> str:
    return f'viewBox="0 0 {width} {height}"'


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
    return numbers(title, ["", *matrix.columns], rows)


def _cut(name: str) -> str:
    return name if len(name) <= MOST_LETTERS else name[: MOST_LETTERS - 1] + "…"
