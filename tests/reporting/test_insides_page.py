"""A page of a model's insides: what it shows, how large it grows, and that a browser reads it."""

import re

import pytest
import torch
from reporting.hostile import HOSTILE, OURS, tags

from nnx_cli.inference.insides import look_inside
from nnx_cli.layers.insides import Insides, Panel
from nnx_cli.reporting.charts import Matrix, heat_map, heat_maps
from nnx_cli.reporting.insides_page import insides_page

MOST_BYTES = 2_000_000


def even(n_layers, n_heads, n_tokens):
    """Attention of random scores."""
    scores = torch.rand(n_layers, n_heads, n_tokens, n_tokens, generator=torch.Generator().manual_seed(1)) * 3
    later = torch.ones(n_tokens, n_tokens, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(later, -torch.inf).softmax(-1)
    return Insides(list(weights), [f"layer {n + 1}" for n in range(n_layers)])


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


@pytest.mark.parametrize("values", [[], [[]]])
def test_a_heat_map_of_nothing_says_so(values):
    figure = heat_map("t", "a", Matrix(["r"] * len(values), [], values))
    assert "Nothing to draw" in figure and "<svg" not in figure


def test_nothing_but_zeros_is_blank():
    assert cells(heat_maps("t", "a", [("head 1", Matrix(["r"], ["x"], [[0.0]]))])) == {}


@pytest.mark.parametrize(("n_layers", "n_heads", "n_tokens"), [(4, 4, 400), (20, 20, 200), (90, 8, 128), (1, 1, 1)])
def test_pages_stay_small_and_say_what_they_leave_out(n_layers, n_heads, n_tokens):
    tokens = [repr(f" w{n}") for n in range(n_tokens)]
    page = insides_page("big (llama)", "w " * n_tokens, tokens, even(n_layers, n_heads, n_tokens))
    assert len(page.encode()) < MOST_BYTES and tags(page) <= OURS
    assert (f"of {n_tokens:,} tokens are shown" in page) == (n_tokens > 64)
    assert ("One layer in" in page) == (n_layers * n_heads > 400)


def test_wide_panels_are_cut(tiny):
    panel = Panel("Wide", "About it.", torch.randn(300, 500), [f"slot {n}" for n in range(300)], "signed", ["f"] * 500)
    insides = even(1, 2, 5)
    page = insides_page("m", "abcde", list("abcde"), Insides(insides.attention, insides.layers, [panel]))
    assert "Shown are 128 x 128 of 300 x 500 values." in page and len(page.encode()) < MOST_BYTES


def test_no_text_breaks_a_page():
    insides = even(2, 2, len(HOSTILE))
    broken = Panel(HOSTILE[0], HOSTILE[1], torch.ones(1, len(HOSTILE)), [HOSTILE[4]])
    page = insides_page(HOSTILE[1], "".join(HOSTILE), HOSTILE, Insides(insides.attention, insides.layers, [broken]))
    assert tags(page) <= OURS and "\x1b" not in page and "\u202e" not in page
    page.encode()


@pytest.mark.parametrize(
    ("name", "fields", "titles"),
    [
        ("llama", {}, []),
        ("nyx", {}, ["xPos decay"]),
        ("ngpt", {}, ["Steps", "Norms and scales"]),
        ("n4", {}, ["Copying gate", "Average key of the last token"]),
        ("neon", {"decoder": "function"}, ["Functions chosen", "Lambda"]),
        ("neon", {"decoder": "memory"}, ["Memory read", "Slot read most", "Memories, shared", "Memories, layer 2"]),
        ("tape", {}, ["Contribution to the prediction", "Read by the last token", "Segments"]),
    ],
)
def test_a_browser_shows_every_picture(tiny, browser, tmp_path, name, fields, titles):
    ids = [5, 9, 2, 2, 60, 17, 33]
    path = tmp_path / "insides.html"
    insides = look_inside(tiny(name, **fields), ids)
    path.write_text(insides_page(f"tiny ({name})", "abc", [repr(chr(40 + n)) for n in ids], insides), encoding="utf-8")
    for width, scheme in ((375, "dark"), (1400, "light")):
        with browser.open(path, width=width, scheme=scheme) as page:
            assert page.complaints == [] and page.requests == []
            assert page("document.documentElement.scrollWidth") <= width
            shown = page("[...document.querySelectorAll('h3')].map(h => h.innerText).join('|')").split("|")
            assert set(titles) | {"Heads", insides.layers[0]} <= set(shown)
            assert page("[...document.querySelectorAll('svg.map')].every(s => s.getBoundingClientRect().width > 60)")
            assert page("document.querySelectorAll('svg.map').length") == sum(map(len, insides.attention))
            named = "svg => document.getElementById(svg.getAttribute('aria-labelledby').split(' ')[1]).textContent"
            assert page(
                f"[...document.querySelectorAll('svg[role=img]')].map({named}).every(words => words.length > 9)"
            )
            assert page("[...document.querySelectorAll('figcaption p')].every(p => p.innerText.length > 20)")
            ink = "getComputedStyle(document.querySelector('.cell')).fill"
            assert page(ink) == ("rgb(92, 179, 255)" if scheme == "dark" else "rgb(0, 104, 184)")
