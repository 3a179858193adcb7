"""Heat maps: what their cells, colours and words say."""

import re

import pytest

from nnx_cli.reporting.heat_maps import ROOM, SMALL_CELL, Layout, Matrix, heat_map, heat_maps


def cells(figure):
    """Runs of cells by colour and opacity."""
    paths = re.findall(r'<path class="cell (c\d)" fill-opacity="([\d.]+)" d="([^"]*)"', figure)
    return {(colour, float(opacity)): runs for colour, opacity, runs in paths}


def test_cells_are_as_dark_as_their_values():
    figure = heat_map("t", "a", Matrix(["r", "s"], ["x", "y", "z"], [[0.0, 1.0, 1.0], [0.5, 0.0, None]]))
    assert cells(figure) == {("c0", 1.0): "M1 0h2v1h-2z", ("c0", 0.5): "M0 1h1v1h-1z"}
    assert "s: most at x, 0.5." in figure and "<td>–</td>" in figure and ">x</text>" in figure


def test_signs_have_colours_and_roots_lift_what_is_faint():
    figure = heat_map("t", "a", Matrix(["r"], ["x", "y"], [[-1.0, 0.25]], "signed", root=True))
    assert cells(figure) == {("c1", 1.0): "M0 0h1v1h-1z", ("c0", 0.5): "M1 0h1v1h-1z"}
    assert "darkest: -1" in figure and "half as dark: 0.25" in figure


def test_the_darkest_shade_may_be_set():
    figure = heat_maps("t", "a", [("head 1", Matrix(["r"], ["x", "y"], [[0.5, 3.0]], full=1))])
    assert cells(figure) == {("c0", 0.5): "M0 0h1v1h-1z", ("c0", 1.0): "M1 0h1v1h-1z"}


def test_choices_are_numbers():
    figure = heat_map("t", "a", Matrix(["r"], ["x", "y", "z"], [[1, 12, 1]], "choice"))
    assert re.findall(r'<text class="choice"[^>]*>(\d+)<', figure) == ["1", "12", "1"] and "darkest" not in figure


@pytest.mark.parametrize(
    ("n_columns", "row", "cell"),
    [
        (40, "slot 1", 18),
        (64, "slot 1", 17),
        (64, "a name of more than 28 letters", 15),
        (100, "slot 1", 11),
        (500, "", 7),
    ],
)
def test_cells_are_as_large_as_a_page_has_room_for(n_columns, row, cell):
    layout = Layout(Matrix([row], [str(n) for n in range(n_columns)], [[1.0] * n_columns]))
    assert layout.cell == cell and (layout.left + layout.width + 8 <= ROOM or cell == SMALL_CELL)


def test_choices_in_small_cells_are_colours_alone():
    columns = [str(n) for n in range(100)]
    assert "choice" not in heat_map("t", "a", Matrix(["r"], columns, [range(100)], "choice"))


@pytest.mark.parametrize("values", [[], [[]]])
def test_a_heat_map_of_nothing_says_so(values):
    figure = heat_map("t", "a", Matrix(["r"] * len(values), [], values))
    assert "Nothing to draw" in figure and "<svg" not in figure


def test_nothing_but_zeros_is_blank():
    assert cells(heat_maps("t", "a", [("head 1", Matrix(["r"], ["x"], [[0.0]]))])) == {}
