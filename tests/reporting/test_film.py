"""Films: every picture in its turn, without a script, still where that is wanted."""

import re

import pytest

from nnx_cli.reporting.film import PLACES, film
from nnx_cli.reporting.heat_maps import Matrix
from nnx_cli.reporting.page import charts, page

MOVING = "document.querySelector('.strip').getAnimations().map(a => a.playState).join()"


def pictures(n):
    return [
        (f"step {k}", Matrix(["r", "s"], ["x", "y", "z"], [[k, 0.0, -k], [0.5, None, k / 2]], "signed"))
        for k in range(1, n + 1)
    ]


def strip(figure):
    """Which picture stands at each place."""
    width = int(re.search(r'<rect class=ground width="(\d+)"', figure)[1])
    first = {n: int(at) // width for n, at in re.findall(r'<g id="f\w+-(\d+)" transform="translate\((\d+)\)"', figure)}
    again = [(first[n] + int(by) // width, n) for n, by in re.findall(r'<use href="#f\w+-(\d+)" x="(\d+)"', figure)]
    places = dict([*((at, n) for n, at in first.items()), *again])
    return [int(places[at]) for at in range(PLACES)]


@pytest.mark.parametrize("n", [1, 2, 3, 7, 13, 20])
def test_every_picture_has_its_turn_and_the_last_stays_longest(n):
    order = strip(film("Memories", "About it.", pictures(n)))
    assert order == sorted(order) and set(order) == set(range(n))
    counts = [order.count(number) for number in range(n)]
    assert max(counts[:-1], default=0) - min(counts[:-1], default=0) <= 1 and counts[-1] > 4 * (n > 1)


def test_shades_are_of_one_scale():
    figure = film("Memories", "About it.", pictures(4))
    assert "darkest: 4;" in figure and "darkest: -4" in figure
    opacities = re.findall(r'fill-opacity="([\d.]+)" d="M0 0h1v1h-1z"', figure)
    assert opacities == ["0.20", "0.50", "0.80", "1.00"]  # of 1, 2, 3, 4: to even tenths


def test_choices_have_colours_that_are_told():
    few = [("a", Matrix(["r"], ["x", "y"], [[1, 3]], "choice")), ("b", Matrix(["r"], ["x", "y"], [[3, 3]], "choice"))]
    assert re.findall(r"<li class=\"(c\d)\">.*?<span>(\d)</span>", film("t", "a", few)) == [("c1", "1"), ("c3", "3")]
    many = [("a", Matrix(["r"], list("abcdefghij"), [range(10)], "choice"))]
    assert "every 8th has the same" in film("t", "a", many)


def test_two_films_of_a_page_do_not_meet():
    ids = re.findall(r'id="(f\w+?)[-"]', film("one", "a", pictures(3)) + film("two", "a", pictures(3)))
    assert len(set(ids)) == 2


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "film.html"
    path.write_text(page("A film", [charts(film("Memories", "About it.", pictures(5)))]), encoding="utf-8")
    return path


SEEN = """(() => {
  const window = document.querySelector('.strip').parentNode;
  const box = document.querySelector('svg.heat').getBoundingClientRect();
  const [x, y] = ['x', 'y'].map(name => Number(window.getAttribute(name)));
  const hit = document.elementFromPoint(box.left + x + 30, box.top + y + 8);
  const picture = hit.closest('use') ? document.querySelector(hit.getAttribute('href')) : hit.closest('.strip > g');
  return picture.querySelector('.label').textContent;
})()"""


def test_it_moves_without_a_script_and_can_be_held(browser, path):
    with browser.open(path) as page:
        assert page.complaints == [] and page.requests == [] and page(MOVING) == "running"
        page("document.querySelector('.hold').focus()")
        page.key("Space")
        assert page(MOVING) == "paused"
        for place in range(PLACES):
            page(f"document.getAnimations()[0].currentTime = 14000 * ({place} + 0.5) / {PLACES}")
            assert page(SEEN) == f"step {1 + min(4, place * 5 // 20)}"


@pytest.mark.parametrize("wish", [{"motion": "reduce"}, {"media": "print"}])
def test_it_stands_still_at_its_end_where_that_is_wanted(browser, path, wish):
    with browser.open(path, **wish) as page:
        assert page(MOVING) == ""
        assert page(SEEN) == "step 5"
        assert page("getComputedStyle(document.querySelector('.hold')).display") == "none"


@pytest.mark.parametrize(("width", "scheme"), [(375, "light"), (375, "dark"), (1400, "light"), (1400, "dark")])
def test_it_fits_every_screen(browser, path, width, scheme):
    with browser.open(path, width, scheme=scheme) as page:
        assert page("document.documentElement.scrollWidth <= innerWidth") and page.complaints == []
        assert page("document.querySelector('svg.heat desc').textContent").startswith("5 pictures, from step 1 to")
