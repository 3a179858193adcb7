"""What a model does inside with a text, in pictures: attention maps of every head, and panels of values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from nnx_cli.reporting.figures import figure
from nnx_cli.reporting.heat_maps import Matrix, heat_map, heat_maps
from nnx_cli.reporting.page import charts, paragraph, table

if TYPE_CHECKING:
    from torch import Tensor

    from nnx_cli.layers.insides import Insides, Panel

MOST_TOKENS = 55  # columns of a picture: beside the longest names of rows, a page of full width has room for them
LEAST_TOKENS = 12
MOST_MAPS = 400
MOST_WHOLE = 40  # rows of a table that needs no scrolling
MOST_ROWS, MOST_COLUMNS = 128, 128  # of a picture that is not over the text
MOST_NUMBERS, NARROW = 12, 4  # columns of a table, and of one that takes half a page


def cut_words(n: int, shown: int) -> str:
    """A line that says how much of the text is shown, where that is not all."""
    return paragraph(f"The last {shown} of {n:,} tokens are shown; nnx visualize --json has all.") if n > shown else ""


def attention_maps(tokens: Sequence[str], insides: Insides, most_cells: int) -> Iterator[str]:
    """Every head's map, of as many tokens as the page has room for."""
    n_heads = sum(map(len, insides.attention))
    step = -(-n_heads // MOST_MAPS)
    room = int((2 * most_cells / max(1, n_heads // step)) ** 0.5)
    most = max(LEAST_TOKENS, min(MOST_TOKENS, room))
    yield paragraph(insides.about)
    yield cut_words(len(tokens), most)
    if step > 1:
        yield paragraph(f"One layer in {step} is shown.")
    shown = slice(max(0, len(tokens) - most), None)
    names = bare(tokens[shown])
    figures = []
    for name, weights in list(zip(insides.layers, insides.attention, strict=True))[::step]:
        maps = []
        for head, values in enumerate(weights[:, shown, shown].tolist(), start=1):
            kind = "signed" if float(weights[head - 1].min()) < 0 else "share"
            maps.append((f"head {head}", Matrix(names, names, values, kind, full=1, root=True)))
        figures.append(heat_maps(name, "Rows read columns; the first token is on top and on the left.", maps))
    yield charts(*figures)


def panel_figure(panel: Panel, tokens: Sequence[str]) -> str:
    """A picture, or a table where it is of numbers that are not alike."""
    if panel.columns is not None and (panel.kind == "number" or len(panel.columns) <= MOST_NUMBERS):
        rows = [
            [name, *(_number(v) for v in values)]
            for name, values in zip(panel.rows, panel.values.tolist(), strict=True)
        ]
        numbers = table(["", *panel.columns], rows, panel.title, "bare whole" if len(rows) <= MOST_WHOLE else "bare")
        return figure(panel.title, panel.about, numbers, is_wide=len(panel.columns) > NARROW)
    if panel.tokens is not None:
        return _tokens_figure(panel, tokens)
    names, about = (bare(tokens) if panel.columns is None else panel.columns), panel.about
    columns = slice(max(0, len(names) - MOST_TOKENS), None) if panel.columns is None else slice(MOST_COLUMNS)
    rows_shown = slice(MOST_ROWS)
    values = panel.values[rows_shown, columns]
    if values.shape != panel.values.shape:
        shape, whole = (" x ".join(map(str, each.shape)) for each in (values, panel.values))
        about += f" Shown are {shape} of {whole} values."
    is_text = panel.columns is None
    shown = Matrix(panel.rows[rows_shown], names[columns], present(values), panel.kind, latest=is_text)
    return heat_map(panel.title, about, shown)


def _tokens_figure(panel: Panel, tokens: Sequence[str]) -> str:
    """A table of what the rows of a panel say of each token of the text, the last ones."""
    cells = [
        [f"{token} {share:.2f}" for token, share in zip(row, shares, strict=True)]
        for row, shares in zip(panel.tokens or (), panel.values.tolist(), strict=True)
    ]
    rows = list(zip(tokens, *cells, strict=True))[-MOST_TOKENS:]
    shown = table(["token", *panel.rows], rows, panel.title, "bare")
    return figure(
        panel.title, panel.about, cut_words(len(tokens), MOST_TOKENS), shown, is_wide=len(panel.rows) > NARROW
    )


def bare(tokens: Sequence[str]) -> list[str]:
    """Tokens without the quotes that code has around them, which columns have no room for; blanks are seen."""
    return [token[1:-1].replace(" ", "\u2423") if token[:1] in ("'", '"') else token for token in tokens]


def present(values: Tensor) -> list[list[float | None]]:
    """The values of a panel; None where there is none."""
    return [[None if value != value else value for value in row] for row in values.tolist()]


def _number(value: float) -> str | None:
    return None if value != value else f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"
