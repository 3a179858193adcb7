"""Several runs on a page."""

import re
import shutil

import pytest
from reporting.hostile import OURS, tags
from reporting.test_run_page import course, log, titles

from nnx_cli.reporting.comparison_page import comparison_page
from nnx_cli.reporting.page import write_page
from nnx_cli.reporting.run_record import read_runs
from nnx_cli.runs.run import Run


@pytest.fixture
def school(run, tmp_path):
    """Copies of a run that went differently well: the later, the better."""

    def make(n):
        folders = []
        for number in range(n):
            folder = tmp_path / "weights" / f"pupil-{number:02d}"
            shutil.copytree(run.folder, folder, ignore=shutil.ignore_patterns("checkpoints", "model.safetensors"))
            log(Run(folder), "metrics.jsonl", course(val_bits_per_byte=3 - number / 100))
            Run(folder).set_status(best_val_bits_per_byte=3 - number / 100)
            Run(folder).append("samples.jsonl", {"step": 200, "prompt": "", "text": f"pupil {number} writes"})
            folders.append(folder)
        return folders

    return make


def test_runs_are_ranked_drawn_and_told_apart(school):
    folders = school(3)
    config = Run(folders[0]).config
    Run(folders[0]).set_config(config | {"training": config["training"] | {"lr": 0.123}})
    log(Run(folders[2]), "metrics.jsonl", [])
    page = comparison_page(read_runs(folders))
    assert titles(page) == [
        "Validation by tokens read",
        "Validation by training time",
        "Training loss by tokens read",
        "Learning rate",
    ]
    result = page[page.index("<h2>Result") : page.index("<h2>How they learned")]
    assert re.findall("<th scope=row>([^<]*)</th><td>([^<]*)</td>", result) == [
        ("pupil-02", "2.9800"),
        ("pupil-01", "2.9900"),
        ("pupil-00", "3.0000"),
    ]
    assert {len(re.findall("<t[hd][ >]", row)) for row in re.findall("<tr>.*?</tr>", result)} == {11}
    assert "<th scope=col>lr</th>" in page[page.index("<h2>What differs") :] and "0.123" in page
    assert "without a line below: pupil-02" in page and "pupil 1 writes" in page and tags(page) <= OURS


def test_runs_that_cannot_be_compared_are_named(school):
    folders = school(2)
    config = Run(folders[0]).config
    Run(folders[0]).set_config(config | {"data": config["data"] | {"fingerprint": "another"}})
    with open(folders[1] / "metrics.jsonl", "a") as file:
        file.write('{"step": 1')
    page = comparison_page(read_runs(folders))
    assert "learned from different texts" in page and "left out of the logs of pupil-01" in page


@pytest.mark.parametrize(
    ("bits", "lines"),
    [
        ([1.9, 1.9, None], ["a byte 5-gram 1.9"]),
        ([None, None, None], []),
        ([1.9, 2.0, 1.9], ["a byte 5-gram on the text of pupil-02 1.9", "a byte 5-gram on the text of pupil-01 2"]),
    ],
)
def test_a_5_gram_is_a_reference_where_it_was_measured(school, bits, lines):
    folders = school(3)
    for folder, measured in zip(folders, bits, strict=True):
        config = Run(folder).config
        Run(folder).set_config(config | {"data": config["data"] | {"ngram_bits_per_byte": measured}})
    first, second, training, rate = comparison_page(read_runs(folders)).split("<figure>")[1:5]
    for figure in (first, second):
        assert re.findall("<span>(a byte 5-gram[^<]*)", figure) == lines
        assert ("only counts which bytes follow" in figure) == bool(lines)
    assert "5-gram" not in training + rate


def test_runs_without_bits_per_byte_are_compared_by_their_loss(school):
    folders = school(2)
    for folder in folders:
        log(Run(folder), "metrics.jsonl", course(val_bits_per_byte=None))
    assert "validation loss (nats a token)" in comparison_page(read_runs(folders))


def test_one_run_named_twice_is_one_and_equal_names_are_told_apart(school, tmp_path):
    first, second = school(2)
    twin = tmp_path / "elsewhere" / first.name
    shutil.copytree(first, twin)
    names = [record.name for record in read_runs([first, second, twin, first])]
    assert names == [str(first), "pupil-01", str(twin)]


def test_a_class_of_thirty_opens_in_a_browser(browser, school, tmp_path):
    path = tmp_path / "report.html"
    write_page(path, comparison_page(read_runs(school(30))))
    assert path.stat().st_size < 2_000_000
    for width, scheme in ((375, "dark"), (1400, "light")):
        with browser.open(path, width, scheme=scheme) as page:
            assert page("document.querySelectorAll('figure svg[role=img]').length") == 4
            legend = "document.querySelectorAll('figure')[0].querySelectorAll('.legend li')"
            assert page(f"{legend}.length") == 30 + 1, "the runs, and a 5-gram"
            assert page("document.documentElement.scrollWidth <= innerWidth"), width
            assert page.complaints == [] and page.requests == []
