"""The insides of a model on the screen."""

from __future__ import annotations

import math
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

from nnx_cli.console.output import Output
from nnx_cli.console.shades import MOST_LABEL, Group, fitted, lettered, ramp_for, shaded, that_fit
from nnx_cli.console.terminal import COLUMNS, columns_of
from nnx_cli.errors import counted

if TYPE_CHECKING:
    from torch import Tensor

    from nnx_cli.layers.insides import Insides, Panel
    from nnx_cli.runs.snapshots import Snapshot

MOST_TOKENS = 40  # lines of a table
MOST_ROWS = 24  # of a table of numbers; of more, the means of each layer
MOST_NUMBERS = 12  # columns of one
MOST_WIDTH = 100  # of a paragraph
LONGEST_NAME = 9  # of a group of columns
BELOW_ZERO = " Values below 0 are - and, stronger, =."
COLUMN_GAP = 3  # between the columns of a table
MOST_NAMED = 8  # columns whose strongest value is told


def rounded(values: Tensor) -> Any:
    """A tensor as lists of numbers of six digits; None where there is none."""
    if values.dim() > 1:
        return [rounded(part) for part in values]
    return [None if value != value else round(value, 6) for value in values.tolist()]


def show_insides(output: Output, subject: str, tokens: Sequence[str], insides: Insides) -> None:
    """Attention of the last token by layer and head, then what else the architecture has to show."""
    output.show(f"{subject}: {counted(len(tokens), 'token')}, {counted(len(insides.layers), 'layer')} that attend")
    shown = _shown(output, tokens)
    about = (
        f"What the last token, {tokens[-1]}, reads: a column is a head, a group a layer, and the darkest token is what "
        "the head looks at most. A column of one shade looks at all alike."
    )
    if any(float(weights.min()) < 0 for weights in insides.attention):
        about += BELOW_ZERO
    _title(output, "Attention", about)
    groups = [
        (name, _cells(weights[:, -1, shown])) for name, weights in zip(insides.layers, insides.attention, strict=True)
    ]
    if len(that_fit(_short(groups)[0], tokens[shown], _width())) < len(groups):
        _paragraph(
            output, "Too many heads for this screen: each column is the mean of a layer's. --layer N shows its heads."
        )
        groups = [(name, [[sum(row) / len(row) for row in zip(*columns, strict=True)]]) for name, columns in groups]
    _over_text(output, tokens[shown], groups)
    for panel in insides.panels:
        _show_panel(output, panel, tokens, shown)


def show_learning(output: Output, snapshots: Sequence[Snapshot]) -> None:
    """How the numbers of a model came, from the snapshots of its run: those that changed, as means over its layers."""
    if len(snapshots) < 2:
        return
    about = (
        "Snapshots of the run, each number the mean over the layers; --html draws them all. Surprise is the loss in "
    )
    _title(output, "As it learned", about + "nats of a piece of validation text.")
    last = snapshots[-1]
    courses = [("surprise", [_mean(each.surprise.values[0]) for each in snapshots])]
    for panel in (last.norms, *(panel for panel in last.insides.panels if panel.kind == "number")):
        for column, name in enumerate(panel.columns or ()):
            courses.append((name, [_mean_of(panel.title, column, each) for each in snapshots]))
    shown, room = [], _width() - COLUMN_GAP - len(f"{last.step:,}")
    for name, means in courses:
        width = COLUMN_GAP + max(len(name), *(len(_number(mean) or "") for mean in means))
        if width <= room and len({_number(mean) for mean in means}) > 1:
            shown.append((name, means))
            room -= width
    rows = [
        [f"{each.step:,}", *(_number(means[number]) for _, means in shown)] for number, each in enumerate(snapshots)
    ]
    output.table(["step", *(name for name, _ in shown)], rows)


def _mean_of(title: str, column: int, snapshot: Snapshot) -> float:
    """The mean over the layers of a column of a panel, nan where a snapshot has it not."""
    found = next((each for each in (snapshot.norms, *snapshot.insides.panels) if each.title == title), None)
    return math.nan if found is None or column >= found.values.shape[1] else _mean(found.values[:, column])


def _mean(values: Tensor) -> float:
    return float(values.nanmean())


def show_layer(output: Output, tokens: Sequence[str], insides: Insides, layer: int) -> None:
    """What each head of one layer gives to every token, in percent."""
    weights, shown = insides.attention[layer - 1], _shown(output, tokens)
    _title(
        output, f"Attention of {insides.layers[layer - 1]}", f"What the last token, {tokens[-1]}, reads, in percent."
    )
    width = 5
    percents = [[f"{round(100 * value)}".rjust(width) for value in head] for head in weights[:, -1, shown].tolist()]
    groups = [(f"head {number}".rjust(width), [cells]) for number, cells in enumerate(percents, start=1)]
    room = max(1, (_width() - 18) // 8)
    for start in range(0, len(groups), room):
        output.show(*lettered(tokens[shown], groups[start : start + room]), "")
    for panel in insides.panels:
        rows = [n for n, row in enumerate(panel.rows) if f"{row},".startswith(f"{insides.layers[layer - 1]},")]
        if rows:
            _show_panel(output, _part(panel, rows), tokens, shown)


def show_map(output: Output, tokens: Sequence[str], insides: Insides, layer: int, head: int) -> None:
    """The whole map of a head, as far as the screen has room."""
    room = max(8, min(MOST_TOKENS, _width() - 18 - 30))
    start = max(0, len(tokens) - room)
    weights = insides.attention[layer - 1][head - 1, start:]
    about = (
        "A row is a token that reads, a column one that is read, in the same order; the darkest of a row is what it "
        "reads most, and beside it stands how much of its attention that gets."
    )
    _title(output, f"Attention of {insides.layers[layer - 1]}, head {head}", about)
    rows = weights[:, start:] / weights.abs().amax(-1, keepdim=True).clamp(min=1e-9)
    lines = shaded(
        tokens[start:], [(_ruler(start + 1, len(rows)), rows.T.tolist())], ramp_for(output.out.file), together=True
    )
    width = max(map(len, lines))
    output.show(lines[0])
    for line, row in zip(lines[1:], weights, strict=True):
        most = int(row.argmax())
        output.show(f"{line.ljust(width)}  {tokens[most]} {100 * float(row[most]):.0f} %")
    if start:
        output.note(f"the last {counted(len(rows), 'token')} of {len(tokens):,}; --json has all")


def _ruler(first: int, n: int) -> str:
    """Every tenth number above its column."""
    marks = [" "] * n
    for number in range(first, first + n):
        if number % 10 == 0:
            marks[number - first : number - first + len(str(number))] = str(number)
    return "".join(marks[:n])


def _show_panel(output: Output, panel: Panel, tokens: Sequence[str], shown: slice) -> None:
    if panel.columns is not None and len(panel.columns) > MOST_NUMBERS:
        rows, columns = panel.values.shape
        output.show("", f"{panel.title}: {rows} x {columns} values, which --html draws and --json prints")
        return
    _title(output, panel.title, panel.about + BELOW_ZERO * (panel.kind == "signed"))
    if panel.columns is not None:
        _numbers(output, panel)
        return
    values = panel.values[:, shown]
    if panel.tokens is not None:
        _named_tokens(output, panel, tokens, shown)
        return
    groups = _grouped(panel.rows, _cells(values))
    if panel.kind != "choice":
        _over_text(output, tokens[shown], groups)
        if len(panel.rows) <= MOST_NAMED:
            strongest = [values[row, int(values[row].abs().argmax())] for row in range(len(values))]
            named = "; ".join(f"{row} {_number(float(v))}" for row, v in zip(panel.rows, strongest, strict=True))
            _paragraph(output, f"darkest: {named}")
        return
    width = len(str(int(panel.values.max()))) + 1
    words = [[f"{int(cell)}".rjust(width) for cell in row] for row in values.tolist()]
    lettered_groups = _grouped(panel.rows, words)
    short, legend = _short(lettered_groups)
    fitting = that_fit(short, tokens[shown], _width())
    output.show(*legend, *lettered(tokens[shown], fitting))
    _say_left_out(output, len(lettered_groups) - len(fitting))


def _named_tokens(output: Output, panel: Panel, tokens: Sequence[str], shown: slice) -> None:
    """The tokens that the values of a panel are of, with these, in a column for every row of it."""
    columns = []
    for name, named, values in zip(panel.rows, panel.tokens or (), panel.values.tolist(), strict=True):
        pairs = zip(named[shown], values[shown], strict=True)
        columns.append((name, [[f"{fitted(token, MOST_LABEL).rstrip()} {value:.2f}" for token, value in pairs]]))
    fitting = that_fit(columns, tokens[shown], _width())
    output.show(*lettered(tokens[shown], fitting))
    _say_left_out(output, len(columns) - len(fitting))


def _over_text(output: Output, tokens: Sequence[str], groups: Sequence[Group]) -> None:
    """Shades of every token in columns that stand in groups."""
    short, legend = _short(groups)
    fitting = that_fit(short, tokens, _width())
    output.show(*legend, *shaded(tokens, fitting, ramp_for(output.out.file)))
    _say_left_out(output, len(groups) - len(fitting))


def _say_left_out(output: Output, n: int) -> None:
    if n:
        output.note(
            f"{counted(n, 'group')} of columns left out for want of room; --layer N, --html and --json have all"
        )


def _numbers(output: Output, panel: Panel) -> None:
    """A table of numbers; of many rows, the mean of every layer."""
    rows = [[name, *map(_number, values)] for name, values in zip(panel.rows, panel.values.tolist(), strict=True)]
    if len(rows) > MOST_ROWS:
        _paragraph(output, "Too many rows for a screen: each is the mean of a layer.")
        groups = _grouped(panel.rows, panel.values.tolist())
        rows = [[name, *(_number(sum(v) / len(v)) for v in zip(*cells, strict=True))] for name, cells in groups]
    output.table(["", *(panel.columns or ())], rows)


def _number(value: float) -> str | None:
    if value != value:
        return None
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"


def _grouped(names: Sequence[str], cells: Sequence[Any]) -> list[tuple[str, list[Any]]]:
    """Rows of one layer together: those whose names are alike up to the last comma."""
    named = list(zip(names, cells, strict=True))
    parts = groupby(named, key=lambda each: each[0].rpartition(", ")[0] or each[0])
    return [(name, [cell for _, cell in part]) for name, part in parts]


def _short(groups: Sequence[tuple[str, Any]]) -> tuple[list[tuple[str, Any]], list[str]]:
    """Groups under names that fit above few columns, and a line that says what those stand for."""
    if all(name.startswith("layer ") for name, _ in groups):
        return [(name.removeprefix("layer "), columns) for name, columns in groups], []
    if all(len(name) <= LONGEST_NAME for name, _ in groups):
        return list(groups), []
    legend = "; ".join(f"{number} {name}" for number, (name, _) in enumerate(groups, start=1))
    return [(str(n), columns) for n, (_, columns) in enumerate(groups, start=1)], textwrap.wrap(legend, _width())


def _part(panel: Panel, rows: Sequence[int]) -> Panel:
    return replace(panel, rows=[panel.rows[n] for n in rows], values=panel.values[list(rows)])


def _shown(output: Output, tokens: Sequence[str]) -> slice:
    """The last tokens, as many as have a line each."""
    if len(tokens) > MOST_TOKENS:
        output.note(f"the last {MOST_TOKENS} of {len(tokens):,} tokens are shown; --html shows more, --json has all")
    return slice(max(0, len(tokens) - MOST_TOKENS), None)


def _cells(values: Tensor) -> list[list[float]]:
    return values.float().tolist()


def _title(output: Output, title: str, about: str) -> None:
    output.show("", title)
    _paragraph(output, about)


def _paragraph(output: Output, words: str) -> None:
    output.show(*textwrap.wrap(words, min(MOST_WIDTH, _width())))


def _width() -> int:
    return columns_of(sys.stdout) or COLUMNS
