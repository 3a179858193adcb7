"""What a page shows of a model as it learned."""

import re
from dataclasses import replace

import pytest
from reporting.hostile import HOSTILE, OURS, tags
from reporting.snapshots import course

from nnx_cli.layers.insides import Panel
from nnx_cli.reporting import learning
from nnx_cli.reporting.learning import learning_section, surprise_figure

MOST_BYTES = 2_000_000


def titles(page):
    return re.findall("<figcaption><h3>([^<]*)</h3>", page)


def test_numbers_are_curves_and_matrices_films():
    page = learning_section(course())
    assert titles(page) == [
        "Norms by layer: weights",
        "Norms by layer: activations",
        "Read",
        "Chosen",
        "Memories, shared",
        "Steps: up",
        "Steps: down",
        "Fixed",  # whose numbers do not change: a table
    ]
    assert page.count("class=strip") == 3 and "from step 100 to step 500" in page and tags(page) <= OURS
    assert re.search(r"Memories, shared.*?5 pictures, from step 100 to step 500", page, re.DOTALL)


def test_one_snapshot_stands_still():
    page = learning_section(course(1))
    assert "class=strip" not in page and "Memories, shared" in titles(page) and "Steps" in titles(page)


def test_nothing_is_shown_of_nothing():
    assert learning_section([]) == ""


def test_a_panel_that_changed_its_shape_is_drawn_from_there_on():
    snapshots = course(4)
    narrow = [Panel(p.title, p.about, p.values[:1], p.rows[:1], p.kind, p.columns) for p in snapshots[0].insides.panels]
    object.__setattr__(snapshots[0].insides, "panels", narrow)
    object.__setattr__(snapshots[1], "tokens", ["'other'"] * 4)
    page = learning_section(snapshots)
    films = dict(re.findall(r"<h3>(Read|Chosen|Memories, shared)</h3>.*?(\d) pictures", page, re.DOTALL))
    assert films == {"Read": "2", "Chosen": "2", "Memories, shared": "3"}


@pytest.mark.parametrize(
    "size",
    [
        {"n": 20, "n_layers": 64, "slots": (128, 128), "tokens": ["'a'"] * 32},
        {"n": 20, "n_layers": 1, "n_heads": 1, "slots": (1, 1), "tokens": ["'a'"]},
    ],
)
def test_pages_stay_small(size, monkeypatch):
    page = learning_section(course(**size))
    assert len(page.encode()) < MOST_BYTES / 2 and tags(page) <= OURS
    if size["n_layers"] > 8:
        assert "One row in 8 is shown." in page and "of 128 x 128 values." in page
    monkeypatch.setattr(learning, "MOST_CELLS", 10)
    still = learning_section(course())  # no room for films: the last pictures
    assert "class=strip" not in still and "Memories, shared" in titles(still)


def test_of_very_many_matrices_some_are_left_out():
    snapshots = course(12, slots=(64, 768))
    for snapshot in snapshots:
        *others, memories, steps, fixed = snapshot.insides.panels
        layers = [replace(memories, title=f"Memories, layer {n}") for n in range(1, 61)]
        object.__setattr__(snapshot.insides, "panels", [*others, memories, *layers, steps, fixed])
    page = learning_section(snapshots)
    shown, films = titles(page), page.count("class=strip")
    assert len(page.encode()) < MOST_BYTES / 2 and 2 < films < 10 and "Memories, layer 9" in shown
    assert "Left out for want of room, from Memories, layer " in page and "Memories, layer 60" not in shown
    assert re.search(r"to Memories, layer 60: \d+ pictures", page) and "Steps: up" in shown


def test_what_surprises_is_dark():
    (snapshot,) = course(1, text=["a", "b ", "<c>", "d"])
    snapshot.surprise.values[0, 1:] = snapshot.surprise.values.new_tensor([0.01, 4.0, 2.0])
    figure = surprise_figure(snapshot)
    assert ">ab <span class=s10>&lt;c&gt;</span><span class=s5>d</span></pre>" in figure
    assert "darkest: 4 nats" in figure and "<td>–</td>" in figure  # nothing comes before the first


def test_hostile_text_stays_text():
    for snapshot in course(2, tokens=HOSTILE, text=HOSTILE):
        assert tags(surprise_figure(snapshot)) <= OURS
    page = learning_section(course(2, tokens=HOSTILE, text=HOSTILE))
    assert tags(page) <= OURS and "\x1b" not in page and "\u202e" not in page
    page.encode()


def test_a_model_that_is_all_nan_draws():
    snapshots = course(3)
    for snapshot in snapshots:
        for panel in (snapshot.norms, snapshot.surprise, *snapshot.insides.panels):
            if panel.kind != "choice":
                panel.values.fill_(float("nan"))
    page = learning_section(snapshots) + surprise_figure(snapshots[-1])
    assert not re.search(r"\b(nan|inf)\b", page) and "Norms by layer" in titles(page)
