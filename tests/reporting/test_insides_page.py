"""A page of a model's insides: what it shows, how large it grows, and that a browser reads it."""

import pytest
import torch
from reporting.hostile import HOSTILE, OURS, tags

from nnx_cli.inference.insides import look_inside
from nnx_cli.layers.insides import Insides, Panel
from nnx_cli.reporting.insides_page import insides_page

MOST_BYTES = 2_000_000


def even(n_layers, n_heads, n_tokens):
    """Attention of random scores."""
    scores = torch.rand(n_layers, n_heads, n_tokens, n_tokens, generator=torch.Generator().manual_seed(1)) * 3
    later = torch.ones(n_tokens, n_tokens, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(later, -torch.inf).softmax(-1)
    return Insides(list(weights), [f"layer {n + 1}" for n in range(n_layers)])


@pytest.mark.parametrize(("n_layers", "n_heads", "n_tokens"), [(4, 4, 400), (20, 20, 200), (90, 8, 128), (1, 1, 1)])
def test_pages_stay_small_and_say_what_they_leave_out(n_layers, n_heads, n_tokens):
    tokens = [repr(f" w{n}") for n in range(n_tokens)]
    page = insides_page("big (llama)", "w " * n_tokens, tokens, even(n_layers, n_heads, n_tokens))
    assert len(page.encode()) < MOST_BYTES and tags(page) <= OURS
    assert (f"of {n_tokens:,} tokens are shown" in page) == (n_tokens > 55)
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
        (
            "tape",
            {},
            [
                "Contribution to the prediction",
                "What is, what could be, what can be",
                "Read by the last token",
                "Segments",
            ],
        ),
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


@pytest.mark.parametrize("layer", ["layer 1", "coda, level 12", "moderator, level 2"])
@pytest.mark.parametrize("n_tokens", [55, 56, 64, 300])
def test_the_newest_token_is_seen_without_scrolling(browser, tmp_path, layer, n_tokens):
    shown, ids = even(1, 12, n_tokens), [repr(chr(97 + n % 26)) for n in range(n_tokens)]
    panel = Panel("Gates", "About them.", torch.rand(2, n_tokens), [f"{layer}, key head {n}" for n in (1, 2)], "signed")
    memories = Panel("Memories", "About them.", torch.rand(4, 64), ["slot 9"] * 4, "signed", [*map(str, range(64))])
    path = tmp_path / "insides.html"
    path.write_text(insides_page("m", "a", ids, Insides(shown.attention, [layer], [panel, memories])), encoding="utf-8")
    with browser.open(path, width=1400) as page:
        wide = "[...document.querySelectorAll('.scroll.whole')].map(each => each.scrollWidth - each.clientWidth)"
        assert page(f"Math.max(...{wide})") <= 0 and page(f"{wide}.length") >= 2


def test_a_telephone_shows_the_newest_token_first_and_the_rows_names_beside_it(browser, tmp_path):
    shown, ids = even(1, 2, 60), [repr(chr(97 + n % 26)) for n in range(60)]
    panel = Panel("Gates", "About them.", torch.rand(2, 60), ["key head 1", "key head 2"])
    path = tmp_path / "insides.html"
    path.write_text(insides_page("m", "a", ids, Insides(shown.attention, ["layer 1"], [panel])), encoding="utf-8")
    with browser.open(path, width=375) as page:
        boxes = "each => [each, ...each.querySelectorAll('text')].map(e => e.getBoundingClientRect())"
        inside = f"[...document.querySelectorAll('.latest')].map({boxes}).map(([all, ...words]) => words.map("
        inside += "one => one.left >= all.left && one.right <= all.right))"
        first, last = page(inside)
        for seen in (first, last):  # the rows' names, and then the tokens
            assert all(seen[:2]) and seen[-8:] == [True] * 8 and not any(seen[2:40])
        assert page("document.documentElement.scrollWidth") <= 375


def test_a_table_stands_below_its_words(tiny, browser, tmp_path):
    path = tmp_path / "insides.html"
    insides = look_inside(tiny("ngpt"), [5, 9, 2])
    path.write_text(insides_page("tiny (ngpt)", "abc", ["'a'", "'b'", "'c'"], insides), encoding="utf-8")
    with browser.open(path, width=1400) as page:
        box = "each => each.getBoundingClientRect()"
        tables = f"[...document.querySelectorAll('.scroll.bare')].map({box})"
        captions = f"[...document.querySelectorAll('figure:has(> .bare) > figcaption')].map({box})"
        assert page(f"Math.max(...{tables}.map((each, n) => each.top - {captions}[n].bottom))") < 20
        assert page(f"{tables}.length") >= 3
