"""Curves in braille."""

import math

import pytest

from nnx_cli.console.curves import BEST, REFERENCE, Series, draw


def text(chart):
    return ["".join(cell.char for cell in row) for row in chart.rows]


@pytest.mark.parametrize(("width", "height"), [(1, 1), (5, 3), (31, 7), (191, 18)])
def test_a_falling_line_goes_from_corner_to_corner(width, height):
    chart = draw({"train": [(10, 2.0), (20, 1.0)]}, width, height)
    rows = text(chart)
    assert len(rows) == height and {len(row) for row in rows} == {width}
    assert rows[0][0] != " " and rows[-1][-1] != " " and all(row.strip() for row in rows)
    assert all(any(row[column] != " " for row in rows) for column in range(width)), "it fills the width"


def test_dots_are_where_the_values_are():
    (row,) = text(draw({"train": [(0, 1.0), (1, 1.0)]}, 1, 1))
    assert row == "\u2824", "a level line, in the third of four rows"
    rising = text(draw({"train": [(0, 0.0), (3, 3.0)]}, 2, 1))[0]
    assert rising == "\u2860\u280a"


def test_the_fall_at_the_beginning_does_not_flatten_the_rest():
    curve = [(step, 2.0 + 10 * math.exp(-step)) for step in range(101)]
    chart = draw({"train": curve}, 40, 8)
    assert chart.top < 2.1 and chart.bottom > 1.9


@pytest.mark.parametrize("reference", [1.5, 2.4, 100.0, -50.0])
def test_a_reference_is_shown_where_it_is_near(reference):
    chart = draw({"train": [(0, 5.0), (50, 2.0), (100, 1.0)]}, 40, 8, reference=reference)
    is_shown = any(row.count(REFERENCE) > 20 for row in text(chart))
    assert is_shown == (0 < reference < 5) and (not is_shown or chart.bottom < reference < chart.top)


def test_the_best_point_is_marked_above_all_curves():
    chart = draw({"train": [(0, 3.0), (10, 1.0)], "val": [(0, 3.0), (5, 1.2), (10, 2.0)]}, 21, 5, best=(5, 1.2))
    (row,) = [row for row in text(chart) if BEST in row]
    assert row.index(BEST) in (10, 11)
    kinds = {cell.kind for row in chart.rows for cell in row}
    assert kinds == {"", "train", "val", "best"}


def test_nothing_and_one_point():
    assert draw({"train": [], "val": []}, 10, 3) is None
    assert sum(char != " " for row in text(draw({"train": [(5, 1.0)]}, 10, 3)) for char in row) == 1


def test_a_long_run_stays_small_and_keeps_its_shape():
    series = Series()
    for step in range(100_000):
        series.add(step, float(step))
    points = series.all()
    assert len(points) <= Series.MOST and points[-1][0] == 99_999
    assert all(abs(x - y) < 100 for x, y in points) and points == sorted(points)
    series.cut(50_000)
    assert series.all()[-1][0] <= 50_000


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_left_out(value):
    series = Series()
    for step, y in enumerate([1.0, value, 2.0]):
        series.add(step, y)
    assert series.all() == [(0, 1.0), (2, 2.0)]
