"""Charts: what they draw, what they leave out, and that they can be read without seeing them."""

import math
import re

import pytest

from nnx_cli.reporting.charts import Line, Reference, Strip, chart, strips, thinned
from nnx_cli.reporting.scales import Axis

X, Y = Axis("tokens"), Axis("loss (nats a token)")
FALLING = [(n, 5 / n) for n in range(1, 20)]


def drawn(figure, kind="line"):
    """The places of every path of that class in the plot."""
    paths = re.findall(rf'<path class="{kind} [^"]*" d="M([^"]*)">', figure)
    return [[tuple(map(float, place.split())) for place in path.split("L")] for path in paths]


def ticks(figure):
    return re.findall(r'<text class="tick"[^>]*>([^<]*)<', figure)


def test_points_lie_where_their_numbers_are():
    (places,) = drawn(chart("t", "a", X, Y, [Line("a", [(0, 0), (5, 10), (10, 10)])]))
    assert [x for x, _ in places] == [0, 500, 1000]
    (_, low), (_, high), _ = places
    assert 800 < low < 1000 and 0 < high < 200  # y points down, with room above and below


def test_a_logarithmic_axis_gives_every_factor_the_same_length():
    points = [(x, x) for x in (1, 10, 100, 1000)]
    (places,) = drawn(chart("t", "a", Axis("x", log=True), Axis("y", log=True), [Line("a", points)]))
    steps = [round(b[0] - a[0]) for a, b in zip(places, places[1:], strict=False)]
    assert steps == [333, 333, 333] or set(steps) <= {333, 334}


@pytest.mark.parametrize("value", [0.0, -3.0, math.nan, math.inf])
def test_what_an_axis_cannot_hold_is_left_out(value):
    figure = chart(
        "t", "a", X, Axis("y", log=True), [Line("a", [(1, 2), (2, value), (3, 4)], [(2, value, 9)], (2, value))]
    )
    (places,) = drawn(figure)
    assert len(places) == 2 and "nan" not in figure and "inf" not in figure and "ring" not in figure


@pytest.mark.parametrize("lines", [[], [Line("a", [])], [Line("a", [(math.nan, 1)])]])
def test_a_chart_of_nothing_says_so(lines):
    figure = chart("The title", "About it.", X, Y, lines)
    assert "The title" in figure and "Nothing to draw" in figure and "<svg" not in figure


@pytest.mark.parametrize(
    "values", [(1, 1), (0, 0), (-2, 3), (1e-9, 2e-9), (1.1, 5.6), (3, 4e15), (0.1, 0.100001), (17, 18), (0, 1e300)]
)
@pytest.mark.parametrize("log", [False, True])
def test_ticks_are_few_and_inside(values, log):
    log = log and min(values) > 0
    figure = chart("t", "a", X, Axis("y", log=log), [Line("a", [(1, values[0]), (2, values[1])])])
    along_y = re.findall(r'<text class="tick" x="-8" y="([-\d.]+)%"[^>]*>([^<]*)<', figure)
    assert 1 <= len(along_y) <= 12 and all(0 <= float(at) <= 100 for at, _ in along_y)


def test_a_long_line_is_thinned_and_loses_no_extreme():
    points = [(n, 1000.0 if n == 777 else math.sin(n)) for n in range(10_000)]
    line = thinned("a", points, best=(5, -1.0), most=100)
    assert len(line.points) == 100 and line.points[-1] == points[-1] and line.best == (5, -1.0)
    assert max(high for _, _, high in line.spread) == 1000.0
    assert min(low for _, low, _ in line.spread) == min(y for _, y in points[:-1])
    assert thinned("a", points[:100], most=100).points == points[:100]


def test_thirty_lines_differ_by_more_than_colour():
    figure = chart("t", "a", X, Y, [Line(f"run {n}", FALLING) for n in range(30)])
    entries = re.findall(r"<li.*?</li>", figure)
    looks = {(re.search(r'd\d"', entry)[0], re.search(r'class="mark"[^>]* d="([^"]*)"', entry)[1]) for entry in entries}
    assert len(entries) == len(looks) == 30


def test_a_line_without_points_takes_nobodys_colour_or_name():
    figure = chart("t", "a", X, Y, [Line("first", []), Line("second", FALLING)])
    (entry,) = re.findall(r"<li.*?</li>", figure)
    assert "second" in entry and "c1" in entry and len(drawn(figure)) == 1 and "line c1 d0" in figure


def test_the_best_point_the_references_and_the_spread_are_drawn():
    line = Line("validation", FALLING, [(n, y - 0.1, y + 0.1) for n, y in FALLING], best=FALLING[-1])
    figure = chart("t", "a", X, Y, [line], [Reference("a 5-gram model", 2.31)])
    legend, plot = figure.split("<div class=plot>")
    assert len(re.findall("class=reference", plot)) == 1 and "<span>a 5-gram model 2.31</span>" in legend
    assert len(re.findall('class="ring', plot)) == 1 and "<span>best 0.2632 at tokens 19</span>" in legend
    assert set(re.findall(r'<text class="(\w+)"', plot)) == {"tick", "axis"}, "no words where curves may be"
    (shade,) = re.findall(r'class="spread c0" d="M([^"]*)Z"', figure)
    assert len(shade.split("L")) == 2 * len(FALLING)


def test_a_chart_can_be_read_without_seeing_it():
    figure = chart("Loss", "About.", X, Y, [Line("training", FALLING, best=FALLING[-1]), Line("validation", FALLING)])
    picture = re.search(r'<svg role="img" aria-labelledby="(\w+) (\w+)"', figure)
    assert re.search(rf'<title id="{picture[1]}">Loss</title>', figure)
    description = re.search(rf'<desc id="{picture[2]}">([^<]*)', figure)[1]
    assert "loss (nats a token) against tokens" in description and "training: 5 at 1, 0.2632 at 19" in description
    numbers = re.search(r"<details>.*?tabindex=\"0\".*?</details>", figure, re.DOTALL)[0]
    assert numbers.count("<tr>") == 1 + 2 * len(FALLING)


def test_two_charts_of_a_page_have_their_own_labels():
    figures = [
        chart("Loss", "About.", X, Y, [Line(name, points)]) for name, points in (("a", FALLING), ("a", FALLING[:5]))
    ]
    assert len({re.search('id="(t[^"]*)"', figure)[1] for figure in figures}) == 2


def test_strips_show_every_value():
    rows = [Strip("nyx", [1.62, 1.63], 1.625, 0.005), Strip("llama", [1.7], 1.7)]
    figure = strips("Ends", "About.", Axis("bits per byte"), rows)
    assert figure.count('class="mark c0"') == 2 and figure.count('class="mark c1"') == 1
    assert figure.count('class="bar') == 1 and figure.count('class="mean') == 2 and "Nothing to draw" not in figure
    assert "Nothing to draw" in strips("Ends", "About.", Axis("bits per byte"), [])
