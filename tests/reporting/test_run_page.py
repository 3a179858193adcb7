"""report.html of a run, in whatever state its folder is."""

import json
import math
import os
import re
from dataclasses import replace

import pytest
from reporting.hostile import HOSTILE, OURS, tags
from reporting.snapshots import course as snapshots

from nnx_cli.errors import CheckpointError
from nnx_cli.reporting.run_page import FIGURES, run_page, write_run_page
from nnx_cli.reporting.run_record import read_run
from nnx_cli.runs.manifest import replace_listed
from nnx_cli.runs.snapshots import save_snapshot
from nnx_cli.system.files import sha256_file, to_json, write_synced

TITLES = ["Loss", "Bits per byte", "Learning rate", "Gradient norm", "Speed", "Peak memory"]


def log(run, name, records):
    (run.folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))


def course(steps=200, every=10, **more):
    """Lines of a healthy run."""
    return [
        {
            "step": step,
            "tokens": step * 256,
            "time_s": step * 0.1,
            "train_loss": 1 + 4 * math.exp(-step / 50),
            "val_loss": 1.1 + 4 * math.exp(-step / 50) if step % 50 == 0 else None,
            "val_bits_per_byte": 1.6 + 5 * math.exp(-step / 50) if step % 50 == 0 else None,
            "lr": 1e-3,
            "grad_norm": 0.8,
            "tokens_per_s": 2560.0,
            "peak_memory_bytes": 3 * 2**30,
            "skipped_steps": 0,
        }
        | more
        for step in range(every, steps + 1, every)
    ]


def titles(page):
    return re.findall("<figcaption><h3>([^<]*)</h3>", page)


def test_a_run_has_its_curves_plan_samples_and_environment(run):
    log(run, "metrics.jsonl", course())
    run.append("samples.jsonl", {"step": 200, "prompt": "The ", "text": "old cat sees a tree"})
    run.set_status(events=["gradients of step 7 were not finite"], ended="length", command="nnx train --seed 7")
    path = write_run_page(run.folder)
    page = path.read_text(encoding="utf-8")
    assert path == run.folder / "report.html" and titles(page) == TITLES and "Nothing to draw" not in page
    assert (
        page.count("class=reference") == 6
    )  # in plot and legend: a guess, a byte 5-gram, and where gradients are clipped
    assert page.count('class="ring') == 2 and "peak memory (GiB)" in page
    for words in (
        "<mark>The </mark>old cat sees",
        "gradients of step 7",
        "its length was reached",
        "nnx train --seed 7",
    ):
        assert words in page
    assert re.search("<th scope=row>steps</th><td>40</td><td>200</td>", page)  # planned, and how it turned out
    assert "batch_size" in page and len(page) < 200_000 and tags(page) <= OURS


@pytest.mark.parametrize(
    ("lr", "warmup_steps", "shown"),
    [(0.002, 30, "0.002 at most, and 0.001 was the highest"), (0.002, 300, ""), (0.00102, 30, ""), (5e-4, 0, "")],
    ids=["late", "still in it", "nearly reached", "lower after going back"],
)
def test_a_rate_that_stays_below_the_plan_is_explained(run, lr, warmup_steps, shown):
    log(run, "metrics.jsonl", course())
    record = read_run(run.folder)
    training = record.config["training"] | {"lr": lr, "warmup_steps": warmup_steps}
    page = run_page(replace(record, config=record.config | {"training": training}))
    assert (shown in page) if shown else "at most, and" not in page


@pytest.mark.parametrize(
    ("lengths", "heading"),
    [
        ({"max_steps": 9000, "max_time_s": 45.0}, "at most"),
        ({"max_steps": 200, "max_time_s": None}, "planned"),
        ({"max_steps": None, "max_time_s": 60.0}, "planned"),
    ],
    ids=str,
)
def test_of_two_lengths_the_first_ends_a_run(run, lengths, heading):
    log(run, "metrics.jsonl", course())
    run.set_status(**lengths)
    page = run_page(read_run(run.folder))
    assert f">{heading}</th>" in page and page.count(">turned out</th>") == 1
    assert ("The first length that is reached ends the run" in page) == (heading == "at most")


def test_the_speed_is_that_of_the_whole_run(run):
    log(run, "metrics.jsonl", course(tokens_per_s=9.0))
    assert "2,560" in run_page(read_run(run.folder)).partition("How it learned")[0]


def test_every_chart_says_what_is_normal(run):
    log(run, "metrics.jsonl", course())
    record = read_run(run.folder)
    for figure in FIGURES:
        assert "Normal: " in figure(record)


@pytest.mark.parametrize("lines", [0, 1, 2])
def test_a_short_run_is_drawn(run, lines):
    log(run, "metrics.jsonl", course()[:lines])
    page = run_page(read_run(run.folder))
    assert ("there are no curves" in page) == (lines == 0)
    assert ("has not been validated" in page) == (lines > 0)
    assert "Loss" in titles(page) if lines else titles(page) == []


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("running", "No step has been logged yet"),
        ("finished", "metrics.jsonl has no step"),
        ("interrupted", "metrics.jsonl has no step"),
        ("diverged", "metrics.jsonl has no step"),
    ],
)
def test_curves_are_to_come_while_a_run_goes_on_only(run, state, words):
    assert f"{words}: there are no curves." in run_page(replace(read_run(run.folder), state=state, metrics=[]))


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_a_log_that_is_missing_is_as_good_as_empty(run, name):
    (run.folder / name).unlink()
    page = run_page(read_run(run.folder))
    assert ("there are no curves" in page) == (name == "metrics.jsonl") and "The plan" in page


def test_a_run_without_validation_or_tokenizer(run):
    log(run, "metrics.jsonl", course(val_loss=None, val_bits_per_byte=None))
    assert "Bits per byte" not in titles(run_page(read_run(run.folder)))
    log(run, "metrics.jsonl", course(val_bits_per_byte=None))
    assert titles(run_page(read_run(run.folder))) == [title for title in TITLES if title != "Bits per byte"]


@pytest.mark.parametrize(
    "damage",
    [b'{"step": 210, "train_lo', b"\x00\xff\n", b"[]\n", b'{"step": -4}\n', b"not json\n" * 3, b'{"step": 1e9}\n'],
)
def test_a_cut_log_is_read_as_far_as_it_is_whole(run, damage):
    log(run, "metrics.jsonl", course())
    with open(run.folder / "metrics.jsonl", "ab") as file:
        file.write(damage)
    record = read_run(run.folder)
    assert len(record.metrics) == 20 and record.damaged["metrics.jsonl"] == max(1, damage.count(b"\n"))
    assert "metrics.jsonl has " in run_page(record) and titles(run_page(record)) == TITLES


@pytest.mark.parametrize("value", ["text", [1], {"a": 1}, True, None, -1.0, 0, 1e308, 10**400], ids=str)
def test_values_of_no_sense_draw(run, value):
    lines = course()
    for line in lines[3:]:
        line |= {key: value for key in line if key != "step"}
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = run_page(read_run(run.folder))
    assert "Loss" in titles(page) and not re.search(r"\b(nan|inf)\b", page)


def test_a_long_run_stays_small(run):
    log(run, "metrics.jsonl", course(200_000, 10))
    log(run, "samples.jsonl", [{"step": step, "prompt": "", "text": "word " * 2000} for step in range(100)])
    page = run_page(read_run(run.folder))
    assert len(page.encode()) < 500_000 and page.count("<details class=sample") == 12
    assert "step 0<" in page and "step 99<" in page and "12 of 100 are shown" in page


@pytest.mark.parametrize("state", ["running", "interrupted", "diverged", "finished"])
def test_every_state_is_said(run, state):
    run.set_status(status=state)
    page = run_page(read_run(run.folder))
    shown = "interrupted" if state == "running" else state  # nobody holds its lock
    assert f": {shown} after " in page and ("lower learning rate" in page) == (state == "diverged")


@pytest.mark.parametrize("hostile", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_stays_text(run, hostile):
    run.append("samples.jsonl", {"step": 40, "prompt": hostile, "text": hostile})
    run.set_status(command=hostile, events=[hostile], ended=hostile)
    config = run.config | {
        "machine": hostile,
        "versions": {"torch": hostile},
        "init_from": hostile,
        "automatic": {"dim": hostile},
    }
    config["model"] = config["model"] | {hostile: hostile, "size": hostile}
    data = to_json(config)
    write_synced(run.folder / "new", data)
    replace_listed(run.folder, "config.json", sha256_file(run.folder / "new"), lambda path: write_synced(path, data))
    assert tags(run_page(read_run(run.folder))) <= OURS


def test_what_is_no_run_is_refused(run, tmp_path):
    with pytest.raises(CheckpointError, match="is no run of nnx"):
        read_run(tmp_path)
    (run.folder / "run.json").unlink()
    with pytest.raises(CheckpointError, match="is a model, but no run"):
        read_run(run.folder)


def test_it_opens_in_a_browser(browser, run):
    log(run, "metrics.jsonl", course())
    run.append("samples.jsonl", {"step": 200, "prompt": "".join(HOSTILE), "text": "".join(HOSTILE)})
    path = write_run_page(run.folder)
    papers = set()
    for width, scheme in ((375, "light"), (375, "dark"), (1400, "light"), (1400, "dark")):
        with browser.open(path, width, scheme=scheme) as page:
            assert page("document.querySelectorAll('figure svg[role=img]').length") == len(TITLES)
            assert page("document.documentElement.scrollWidth <= innerWidth"), width
            assert page("[...document.querySelectorAll('.tick')].every(t => t.getBoundingClientRect().height > 10)")
            assert page.complaints == [] and page.requests == []
            papers.add(page("getComputedStyle(document.body).backgroundColor"))
    assert len(papers) == 2
    with browser.open(path, scheme="dark", media="print") as page:
        assert page("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert page("getComputedStyle(document.querySelector('figure > details')).display") == "none"
    with browser.open(path) as page:  # the numbers of a chart, by keyboard alone
        page.key("Tab")
        assert page("document.activeElement.textContent") == "The numbers"
        page.key("Enter")
        page.key("Tab")
        assert page("document.activeElement.getAttribute('aria-label')") == "Numbers of the chart: Loss"


def test_what_the_run_kept_of_its_insides_is_drawn(browser, run):
    log(run, "metrics.jsonl", course())
    for snapshot in snapshots(4, tokens=HOSTILE, text=HOSTILE):
        save_snapshot(run.folder, snapshot)
    path = write_run_page(run.folder)
    whole = path.read_text(encoding="utf-8")
    assert tags(whole) <= OURS and len(whole) < 2_000_000
    shown = {"What surprises it", "Inside the model as it learned", "Where it looks"}
    for width, scheme in ((375, "light"), (375, "dark"), (1400, "light"), (1400, "dark")):
        with browser.open(path, width, scheme=scheme) as page:
            assert page.complaints == [] and page.requests == []
            assert page("document.documentElement.scrollWidth <= innerWidth"), width
            assert shown <= set(page("[...document.querySelectorAll('h2')].map(h => h.innerText).join('|')").split("|"))
            assert page("document.querySelectorAll('svg.map').length") == 6  # of 3 layers with 2 heads
            darkest = "getComputedStyle(document.querySelector('.shaded .s10')).backgroundColor"
            assert page(darkest) not in ("", "rgba(0, 0, 0, 0)")
            assert page("document.querySelectorAll('.strip').length") == 3


def test_damaged_insides_are_left_out_and_said(run):
    for snapshot in snapshots(3):
        save_snapshot(run.folder, snapshot)
    (run.folder / "insides" / "step-00000300.safetensors").write_bytes(b"half")
    page = run_page(read_run(run.folder))
    assert "insides/ has 1 damaged file, left out." in page and "from step 100 to step 200" in page


def test_a_run_that_kept_nothing_says_nothing_of_it(run):
    page = run_page(read_run(run.folder))
    assert "What surprises it" not in page and "Where it looks" not in page
    assert "nnx visualize weights/words --prompt &quot;Some text&quot; --html inside.html" in page


def test_a_page_replaces_the_one_before_in_one_step(run):
    os.link(write_run_page(run.folder), run.folder / "before")
    run.set_status(command="another command")
    write_run_page(run.folder)
    assert "another command" in (run.folder / "report.html").read_text(encoding="utf-8")
    assert "another command" not in (run.folder / "before").read_text(encoding="utf-8")
    assert not list(run.folder.glob(".tmp-*"))
