"""race.html: drawn from race.json alone, whatever state the race is in."""

import copy
import json
import re

import pytest
from reporting.hostile import HOSTILE, OURS, tags
from reporting.races import a_race, curve

from nnx_cli.reporting.page import write_page
from nnx_cli.reporting.race_page import mean_over_seeds, race_page


def figures(page):
    """Titles of the charts that have something to show, with their pictures."""
    found = re.findall(r"<figure>\n<figcaption><h3>([^<]*)</h3>.*?</figure>", page, re.DOTALL)
    empty = re.findall(r"<h3>([^<]*)</h3><p>[^<]*</p></figcaption>\n<p class=empty>", page)
    return [title for title in found if title not in empty]


LOSSES = [
    "Bits per byte by tokens read",
    "Bits per byte by training time",
    "Bits per byte by FLOPs",
    "Training loss by tokens read",
]


def test_a_race_has_its_result_its_courses_and_its_samples(tmp_path):
    write_page(tmp_path / "race.html", race_page(a_race()))
    page = (tmp_path / "race.html").read_text(encoding="utf-8")
    assert figures(page) == ["Where they ended", *LOSSES, "Bits per byte by learning rate"]
    assert "that is a tie with llama" in page and "Comparisons made: 3;" in page
    assert re.search(r"<th scope=row>ngpt</th><td>1.7040 ± 0.0040</td>", page)
    assert (
        "out of memory" in page
        and "<span>n4 (diverged)</span>" in page
        and "The ngpt said" in page
        and "n_kv_heads" in page
    )
    assert [path.name for path in tmp_path.iterdir()] == ["race.html"]


def test_a_mean_of_seeds_lies_between_them():
    line = mean_over_seeds("a", [[(0, 4.0), (10, 2.0)], [(0, 2.0), (5, 1.5), (10, 1.0)]])
    assert line.points == [(0, 3.0), (5, 2.25), (10, 1.5)] and line.spread == [(0, 2, 4), (5, 1.5, 3), (10, 1, 2)]
    assert mean_over_seeds("a", []).points == []


def test_a_seed_that_took_longer_counts_as_much():
    """On a machine with other work, the same steps take longer; no seed stands for all."""
    line = mean_over_seeds("a", [[(1, 4.0), (2, 2.0)], [(2, 3.0), (4, 1.0)]])
    assert line.points == [(1.5, 3.5), (3.0, 1.5)] and line.spread == [(1.5, 3, 4), (3, 1, 2)]


@pytest.mark.parametrize("status", ["diverged", "out of memory", "interrupted"])
def test_a_seed_that_did_not_finish_does_not_pull_the_mean(status):
    whole, lost = a_race(), a_race()
    whole["competitors"][0]["runs"].pop()
    lost["competitors"][0]["runs"][2] |= {"status": status, "bits_per_byte": None, "curve": curve(2, 9.0)[:20]}
    title = "Bits per byte by tokens read"
    drawn = [re.search(f"<h3>{title}.*?</figure>", race_page(race), re.DOTALL)[0] for race in (whole, lost)]
    assert drawn[0] == drawn[1]


def test_where_no_seed_finished_the_longest_is_drawn():
    race = a_race()
    for number, run in enumerate(race["competitors"][0]["runs"]):
        run |= {"bits_per_byte": None, "curve": curve(0, 1.6)[: 5 + number]}
    numbers = re.search("Numbers of the chart: Bits per byte by tokens read.*?</table>", race_page(race), re.DOTALL)[0]
    assert numbers.count("<th scope=row>nyx</th>") == 7


def test_seeds_of_other_lengths_meet_where_both_were():
    line = mean_over_seeds("a", [[(1, 4.0), (9.5, 2.0)], [(0.5, 4.0), (5, 3.0), (10, 2.0)]])
    assert line.points[0][0] == 1 and line.points[-1][0] == 9.5


def half_finished():
    race = a_race(state="running")
    race["competitors"] = race["competitors"][:2]
    race["competitors"][0]["runs"][2] |= {
        "status": "running",
        "bits_per_byte": None,
        "curve": curve(2, 1.6)[:4],
        "sample": None,
    }
    race["competitors"][1] |= {
        "runs": [],
        "bits_per_byte": None,
        "to_target": None,
        "status": "waiting",
        "ties_with": None,
    }
    return race


def with_nulls():
    race = a_race()
    for competitor in race["competitors"]:
        for run in competitor["runs"]:
            run["curve"] = [dict.fromkeys(point) | {"step": point["step"]} for point in run["curve"]]
            run |= dict.fromkeys(("bits_per_byte", "tokens", "time_s", "flops", "peak_memory_bytes", "sample"))
        competitor |= dict.fromkeys(("bits_per_byte", "lr", "size", "tokens_per_s", "to_target", "ties_with", "config"))
    return race | dict.fromkeys(
        ("budget", "target_bits_per_byte", "learning_rate_search", "comparisons", "tokenizer", "data")
    )


def of_other_types():
    """A file of somebody's that has the right names and nothing right in them."""
    race = a_race()
    for number, key in enumerate(race):
        race[key] = [7, "text", [1, None, "x"], {"a": {"b": [1e400]}}, True, None, -1e308][number % 7]
    strange = [
        7,
        {"model": 5, "runs": [3, {"curve": [1, {"tokens": "x"}], "sample": 5}]},
        {"model": ["x"], "runs": "x"},
    ]
    return race | {"competitors": [*strange, {"bits_per_byte": 3, "to_target": 4, "config": [], "ties_with": "x"}]}


@pytest.mark.parametrize(
    ("race", "said"),
    [
        (half_finished(), "This race is not finished"),
        (with_nulls(), "No competitor has a result yet"),
        (of_other_types(), "No competitor has a result yet"),
        (a_race(seeds=1), "with one seed each: the differences may be chance, so there is no verdict"),
        (a_race(competitors=[]), "No competitor has a result yet"),
        ({}, "No competitor has a result yet"),
    ],
    ids=["half", "nulls", "types", "one seed", "nobody", "nothing"],
)
def test_every_race_draws(race, said):
    page = race_page(race)
    assert said in page and tags(page) <= OURS and ">nan<" not in page and "Traceback" not in page


def test_a_clear_winner_is_said():
    race = a_race()
    race["competitors"][0]["ties_with"] = []
    assert "the 95 % intervals of its differences to the others do not hold 0" in race_page(race)


def test_recall_is_drawn_where_it_was_measured():
    race = a_race()
    for competitor in race["competitors"][:3]:
        for run in competitor["runs"]:
            run["recall"] = [[8, 0.99], [32, 0.8], [128, 0.4], "x", [None, 1]]
    assert "Accuracy by distance" in figures(race_page(race)) and "Accuracy by distance" not in race_page(a_race())


def test_one_architecture_in_two_sizes_has_two_names():
    race = a_race()
    race["competitors"][1] |= {"model": "nyx", "size": "small"}
    assert "<th scope=row>nyx tiny</th>" in race_page(race) and "<th scope=row>nyx small</th>" in race_page(race)


def poisoned(value, text):
    """Every text of a race, names of fields of configurations too, with `text` behind it."""
    if isinstance(value, dict):
        return {key: poisoned(inner, text) for key, inner in value.items()}
    if isinstance(value, list):
        return [poisoned(inner, text) for inner in value]
    return value + text if isinstance(value, str) else value


@pytest.mark.parametrize("hostile", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_stays_text(hostile):
    race = poisoned(a_race(), hostile)
    race["competitors"][0]["config"][hostile] = hostile
    race["settings"][hostile] = hostile
    assert tags(race_page(race)) <= OURS


def test_drawing_changes_nothing():
    race = a_race()
    before = copy.deepcopy(race)
    assert race_page(race) == race_page(json.loads(json.dumps(race))) and race == before


def test_it_opens_in_a_browser(browser, tmp_path):
    write_page(tmp_path / "race.html", race_page(a_race()))
    race = poisoned(a_race(), "".join(HOSTILE))
    write_page(tmp_path / "hostile.html", race_page(race))
    for name, n_figures in (("race", 6), ("hostile", 5)):  # its rates stand under names that are no longer
        for width, scheme in ((375, "light"), (1400, "dark")):
            with browser.open(tmp_path / f"{name}.html", width, scheme=scheme) as page:
                assert page("document.querySelectorAll('figure svg[role=img]').length") == n_figures
                assert page("document.documentElement.scrollWidth <= innerWidth"), (name, width)
                assert page("document.querySelectorAll('script, img, iframe').length") == 0
                assert page("document.title").startswith("Race: ")
                assert page.complaints == [] and page.requests == []


def test_on_a_wide_screen_its_result_needs_no_scrolling(browser, tmp_path):
    """All six, as far apart in their numbers as may be, and a target."""
    race = a_race()
    race["competitors"] = [
        each | {"model": name, "size": size, "parameters": 1.037e9, "ties_with": ["llama", "ngpt", "n4", "neon"]}
        for each, name, size in zip(
            race["competitors"] + race["competitors"][-1:],
            ("nyx", "nyx", "llama", "neon", "tape", "ngpt"),
            ("xl", "small", "base", "base", "base", "base"),
            strict=True,
        )
    ]
    for run in (run for each in race["competitors"] for run in each["runs"]):
        run |= {"time_s": 7 * 3600 + 59 * 60, "flops": 7.32e18, "tokens": 1.234e9, "peak_memory_bytes": 123.4 * 2**30}
    write_page(tmp_path / "race.html", race_page(race))
    with browser.open(tmp_path / "race.html", 1400) as page:
        wide = "[...document.querySelectorAll('.whole')].filter(e => e.scrollWidth > e.clientWidth).length"
        assert page("document.querySelectorAll('.whole').length") == 1 and page(wide) == 0
