"""What happens inside a model as it learns: curves and films of the snapshots of its run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from nnx_cli.errors import counted
from nnx_cli.layers.insides import Panel
from nnx_cli.reporting.charts import WIDE_Y, Line, chart
from nnx_cli.reporting.film import film
from nnx_cli.reporting.heat_maps import Matrix, heat_map, shaded_text
from nnx_cli.reporting.insides_figures import bare, panel_figure, present
from nnx_cli.reporting.page import charts, paragraph, section
from nnx_cli.reporting.scales import Axis, spans
from nnx_cli.runs.snapshots import Snapshot

STEP = Axis("step", from_zero=True)
MOST_LINES = 8  # of a chart
MOST_ROWS, MOST_COLUMNS = 24, 48  # of a film
MOST_CELLS, MOST_STILL_CELLS = 50_000, 20_000  # of all films of a page, and of pictures beside them: about a megabyte
LEAST_CHANGE = 1e-3  # by which a number has to change to be worth a chart


def learning_section(snapshots: Sequence[Snapshot]) -> str:
    """What the snapshots of a run have in common, over its steps; nothing where there is none."""
    if not snapshots:
        return ""
    about = (
        f"What the model did with the first {counted(len(snapshots[-1].tokens), 'token')} of the validation text, "
        f"from step {snapshots[0].step:,} to step {snapshots[-1].step:,}."
    )
    return section("Inside the model as it learned", paragraph(about), charts(*_figures(snapshots)))


def _figures(snapshots: Sequence[Snapshot]) -> Iterator[str]:
    yield from _numbers([(each.step, each.norms) for each in snapshots], snapshots[-1])
    last, room, still_room, left_out = snapshots[-1], MOST_CELLS, MOST_STILL_CELLS, []
    for panel in last.insides.panels:
        course = _course(snapshots, panel)
        if panel.kind == "number":
            yield from _numbers(course, last)
            continue
        pictures = [(f"step {step:,}", _small(each, last.tokens)) for step, each in course]
        final = pictures[-1][1]
        cells, about = len(final.rows) * len(final.columns), panel.about + _cut_words(panel, final)
        if len(pictures) > 1 and cells * len(pictures) <= room:
            room -= cells * len(pictures)
            yield film(panel.title, about, pictures)
        elif cells <= still_room:
            still_room -= cells
            yield heat_map(panel.title, about, final)
        else:
            left_out.append(panel.title)
    if left_out:
        yield paragraph(
            f"Left out for want of room, from {left_out[0]} to {left_out[-1]}: {counted(len(left_out), 'picture')}."
        )


def surprise_figure(snapshot: Snapshot) -> str:
    """The validation text of a snapshot, coloured by how little the model expected it."""
    panel = snapshot.surprise
    (values,) = present(panel.values)
    return shaded_text(f"After step {snapshot.step:,}", panel.about, panel.columns or (), values, "nats")


def _course(snapshots: Sequence[Snapshot], last: Panel) -> list[tuple[int, Panel]]:
    """A panel of the last snapshot in each of them that has it, of the same rows and columns."""
    tokens = list(snapshots[-1].tokens)
    return [
        (snapshot.step, panel)
        for snapshot in snapshots
        for panel in snapshot.insides.panels
        if _shape(panel) == _shape(last) and (panel.columns is not None or list(snapshot.tokens) == tokens)
    ]


def _shape(panel: Panel) -> tuple[str, str, list[str], list[str] | None]:
    return panel.title, panel.kind, list(panel.rows), None if panel.columns is None else list(panel.columns)


def _numbers(course: Sequence[tuple[int, Panel]], snapshot: Snapshot) -> Iterator[str]:
    """A panel of numbers: a chart for each column whose numbers change, whose lines are the rows, and a table of the
    last ones where there are others."""
    last = course[-1][1]
    step = math.ceil(len(last.rows) / MOST_LINES)
    some = f" One row in {step} is shown." if step > 1 else ""
    figures = []
    for column, name in enumerate(last.columns or ()):
        lines = [
            Line(
                row, [(float(at), y) for at, panel in course if math.isfinite(y := float(panel.values[number, column]))]
            )
            for number, row in list(enumerate(last.rows))[::step]
        ]
        values = [y for line in lines for _, y in line.points]
        moved = max((abs(y - line.points[0][1]) for line in lines for _, y in line.points), default=0.0)
        if values and moved > LEAST_CHANGE * max(map(abs, values)):
            axis = Axis(name, log=min(values) > 0 and spans(values, WIDE_Y))
            figures.append(chart(f"{last.title}: {name}", last.about + some, STEP, axis, lines))
    if len(figures) < len(last.columns or ()):
        yield panel_figure(last, snapshot.tokens)
    yield from figures


def _small(panel: Panel, tokens: Sequence[str]) -> Matrix:
    """As many evenly picked rows and first columns of a panel as a picture of a film has."""
    rows = slice(None, None, math.ceil(len(panel.rows) / MOST_ROWS))
    columns = slice(MOST_COLUMNS)
    names = bare(tokens) if panel.columns is None else panel.columns
    return Matrix(panel.rows[rows], names[columns], present(panel.values[rows, columns]), panel.kind)


def _cut_words(panel: Panel, shown: Matrix) -> str:
    n_rows, n_columns = panel.values.shape
    if (n_rows, n_columns) == (len(shown.rows), len(shown.columns)):
        return ""
    return f" Shown are {len(shown.rows)} x {len(shown.columns)} of {n_rows} x {n_columns} values."
