"""What a model does inside with a text, as a page: attention maps of every head, and what its architecture adds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from nnx_cli.errors import counted
from nnx_cli.reporting.heat_maps import Matrix, heat_map, heat_maps
from nnx_cli.reporting.page import charts, page, paragraph, section, table, text

if TYPE_CHECKING:
    from torch import Tensor

    from nnx_cli.layers.insides import Insides, Panel

MOST_TOKENS = 64  # columns of a picture
MOST_CHARS = 3000  # of the prompt
LEAST_TOKENS = 12
MOST_MAP_CELLS = 100_000  # of all attention maps together: about a megabyte
MOST_MAPS = 400
MOST_WHOLE = 40  # rows of a table that needs no scrolling
MOST_ROWS, MOST_COLUMNS = 128, 128  # of a picture that is not over the text
MOST_NUMBERS, NARROW = 12, 4  # columns of a table, and of one that takes half a page
LAST = (
    "What the last token of the text reads: a row is a head, and the darker a token, the more of the head's attention "
    "it gets. Normal: heads that differ; early in training all look at everything alike, and the "
    "picture is pale; later each looks at a few tokens."
)


def insides_page(subject: str, prompt: str, tokens: Sequence[str], insides: Insides) -> str:
    """The page of a prompt, as far as the model saw it; `tokens` are its tokens as code would write them."""
    return page(
        f"Inside {subject}",
        [
            paragraph(f"What {subject} attends to, gates and selects in {counted(len(tokens), 'token')}.", "lead"),
            section("The text", f"<pre>{text(prompt[-MOST_CHARS:])}</pre>", _cut_words(len(tokens), MOST_TOKENS)),
            section("The last token", *_last(tokens, insides)),
            section("Inside the architecture", charts(*(_figure(panel, tokens) for panel in insides.panels))),
            section("Attention maps", *_maps(tokens, insides)),
        ],
    )


def _cut_words(n: int, shown: int) -> str:
    """A line that says how much of the text is shown, where that is not all."""
    return paragraph(f"The last {shown} of {n:,} tokens are shown; nnx visualize --json has all.") if n > shown else ""


def _last(tokens: Sequence[str], insides: Insides) -> Iterator[str]:
    """What each head reads for the last token."""
    shown = slice(max(0, len(tokens) - MOST_TOKENS), None)
    rows = [
        (f"{name}, head {head}", values)
        for name, weights in zip(insides.layers, insides.attention, strict=True)
        for head, values in enumerate(weights[:, -1, shown].tolist(), start=1)
    ]
    step = -(-len(rows) // MOST_ROWS)
    picked = rows[::step]
    if step > 1:
        yield paragraph(f"One head in {step} of {len(rows):,} is shown.")
    kind = "signed" if any(value < 0 for _, values in picked for value in values) else "share"
    matrix = Matrix(
        [name for name, _ in picked], _bare(tokens[shown]), [values for _, values in picked], kind, full=1, root=True
    )
    yield charts(heat_map(f"What {tokens[-1]} reads", LAST, matrix))


def _maps(tokens: Sequence[str], insides: Insides) -> Iterator[str]:
    """Every head's map, of as many tokens as the page has room for."""
    n_heads = sum(map(len, insides.attention))
    step = -(-n_heads // MOST_MAPS)
    room = int((2 * MOST_MAP_CELLS / max(1, n_heads // step)) ** 0.5)
    most = max(LEAST_TOKENS, min(MOST_TOKENS, room))
    yield paragraph(insides.about)
    yield _cut_words(len(tokens), most)
    if step > 1:
        yield paragraph(f"One layer in {step} is shown.")
    shown = slice(max(0, len(tokens) - most), None)
    names = _bare(tokens[shown])
    figures = []
    for name, weights in list(zip(insides.layers, insides.attention, strict=True))[::step]:
        maps = []
        for head, values in enumerate(weights[:, shown, shown].tolist(), start=1):
            kind = "signed" if float(weights[head - 1].min()) < 0 else "share"
            maps.append((f"head {head}", Matrix(names, names, values, kind, full=1, root=True)))
        figures.append(heat_maps(name, "Rows read columns; the first token is on top and on the left.", maps))
    yield charts(*figures)


def _figure(panel: Panel, tokens: Sequence[str]) -> str:
    """A picture, or a table where it is of numbers that are not alike."""
    if panel.columns is not None and (panel.kind == "number" or len(panel.columns) <= MOST_NUMBERS):
        rows = [
            [name, *(_number(v) for v in values)]
            for name, values in zip(panel.rows, panel.values.tolist(), strict=True)
        ]
        numbers = table(["", *panel.columns], rows, panel.title, "bare whole" if len(rows) <= MOST_WHOLE else "bare")
        caption = f"<figcaption><h3>{text(panel.title)}</h3>{paragraph(panel.about)}</figcaption>"
        kind = " class=wide" if len(panel.columns) > NARROW else ""
        return f"<figure{kind}>\n{caption}\n{numbers}\n</figure>"
    names, about = (_bare(tokens) if panel.columns is None else panel.columns), panel.about
    columns = slice(max(0, len(names) - MOST_TOKENS), None) if panel.columns is None else slice(MOST_COLUMNS)
    rows_shown = slice(MOST_ROWS)
    values = panel.values[rows_shown, columns]
    if values.shape != panel.values.shape:
        shape, whole = (" x ".join(map(str, each.shape)) for each in (values, panel.values))
        about += f" Shown are {shape} of {whole} values."
    return heat_map(panel.title, about, Matrix(panel.rows[rows_shown], names[columns], _present(values), panel.kind))


def _bare(tokens: Sequence[str]) -> list[str]:
    """Tokens without the quotes that code has around them, which columns have no room for; blanks are seen."""
    return [token[1:-1].replace(" ", "\u2423") if token[:1] in ("'", '"') else token for token in tokens]


def _present(values: Tensor) -> list[list[float | None]]:
    return [[None if value != value else value for value in row] for row in values.tolist()]


def _number(value: float) -> str | None:
    return None if value != value else f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"
