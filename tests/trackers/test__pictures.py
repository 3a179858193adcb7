"""Figures as pictures: what a page shows is there, in its colours, at its place."""

import io

import pytest

from nnx_cli.reporting.charts import Line, Reference, chart
from nnx_cli.reporting.film import film
from nnx_cli.reporting.heat_maps import CELL, Matrix, heat_map, heat_maps, shaded_text
from nnx_cli.reporting.scales import Axis
from nnx_cli.trackers._pictures import MAP_GAP, MAP_WIDTH, PLOT_HEIGHT, PLOT_MARGIN, PLOT_WIDTH, SCALE, picture_of

Image = pytest.importorskip("PIL.Image", reason="needs Pillow: pip install 'nnx-cli[tensorboard]'")

BLUE, ORANGE, INK, WHITE = (0, 104, 184), (200, 80, 10), (26, 29, 33), (255, 255, 255)


def drawn(figure):
    """A figure's picture, and how many pixels of it have each colour."""
    picture = picture_of(figure)
    image = Image.open(io.BytesIO(picture.png))
    assert image.size == (picture.width, picture.height)
    return image, {colour: n for n, colour in image.getcolors(2**20)}


def at(image, x, y):
    return image.getpixel((round(x * SCALE), round(y * SCALE)))


def test_a_chart_has_its_lines_where_they_are():
    lines = [Line("up", [(0, 0.0), (10, 1.0)], best=(10, 1.0)), Line("level <&>", [(0, 0.5), (10, 0.5)])]
    figure = chart("Chart", "about", Axis("step"), Axis("loss"), lines, [Reference("least", 0.2)])
    image, colours = drawn(figure)
    left, above, right, _ = PLOT_MARGIN
    assert picture_of(figure).title == "Chart" and image.width == SCALE * (left + PLOT_WIDTH + right)
    assert colours[BLUE] > 1000 and colours[ORANGE] > 1000 and colours[INK] > 500 and colours[WHITE] > 1e5
    orange = [y for y in range(round(above), image.height // SCALE) if at(image, left + 25, y) == ORANGE]
    assert len(orange) in (2, 3) and abs(sum(orange) / len(orange) - above - PLOT_HEIGHT / 2) < 2, "in the middle"


def test_cells_have_their_shades():
    matrix = Matrix(["a", "b"], ["x", "y", "z"], [[1.0, 0.5, None], [0.0, -1.0, 1.0]], "signed")
    image, _ = drawn(heat_map("Map", "about", matrix))
    left, above = image.width / SCALE - 8 - 3 * CELL, image.height / SCALE - 4 - 2 * CELL
    found = [[at(image, left + CELL * (x + 0.5), above + CELL * (y + 0.5)) for x in range(3)] for y in range(2)]
    assert found[0][0] == BLUE and found[1][1] == ORANGE and found[1][2] == BLUE
    assert found[0][2] == found[1][0] == WHITE and found[0][1] == (128, 180, 220)


def test_many_maps_stand_side_by_side():
    one, other = Matrix(["a"], ["a"], [[1.0]]), Matrix(["a"], ["a"], [[-1.0]], "signed")
    image, colours = drawn(heat_maps("Maps", "about", [("head 1", one), ("head 2", other)]))
    assert image.width == SCALE * 2 * (MAP_WIDTH + MAP_GAP)
    assert at(image, 40, 40) == BLUE and at(image, MAP_WIDTH + MAP_GAP + 40, 40) == ORANGE


def test_of_a_film_the_last_picture_is_shown():
    pictures = [(f"step {n}", Matrix(["a"], ["x"], [[value]], "signed")) for n, value in enumerate([1.0, 1.0, -1.0])]
    _, colours = drawn(film("Film", "about", pictures))
    assert colours[ORANGE] >= (CELL * SCALE - 2) ** 2 and BLUE not in colours


def test_names_of_long_columns_stand_upright_beside_them():
    names = ["a long name", "another long name <b>&amp;</b>\x1b[2J"]
    image, _ = drawn(heat_map("Map", "about", Matrix(["row"], names, [[1.0, 1.0]])))
    top = image.crop((0, 0, image.width, image.height // 2))
    assert len(top.getcolors(2**16)) > 10, "letters"


def test_a_blank_is_a_sign_that_the_font_has():
    blank, other = (heat_map("Map", "about", Matrix(["row"], [name], [[1.0]])) for name in ("\u2423", "_"))
    assert picture_of(blank).png == picture_of(other).png


def test_what_is_no_picture_is_left_out():
    assert picture_of(shaded_text("Text", "about", ["a", "b"], [1.0, 2.0], "nats")) is None
    assert picture_of(chart("Nothing", "about", Axis("x"), Axis("y"), [])) is None
