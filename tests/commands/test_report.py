"""`nnx report`, and the page that `nnx train` leaves."""

import csv
import json
import re
import shutil

import pytest

from nnx_cli.errors import OutputError


def test_a_run_is_drawn(run, nnx):
    result = nnx("report", "words")
    page = run.folder / "report.html"
    assert result.exit_code == 0 and f"{page}: run words, finished" in result.stdout and page.is_file()
    assert json.loads(nnx("report", "words", "--json").stdout) == {
        "out": str(page),
        "runs": [str(run.folder)],
        "csv": None,
    }
    assert nnx("report", "--quiet").exit_code == 0  # the newest run, and once more over its own page


def test_several_runs_are_compared(run, nnx, workspace):
    shutil.copytree(run.folder, workspace / "weights" / "second")
    result = nnx("report", "words", "second", "--csv", "numbers.csv")
    page = workspace / "weights" / "report.html"
    assert result.exit_code == 0 and "2 runs compared" in result.stdout
    assert "2 runs compared" in page.read_text(encoding="utf-8")
    rows = list(csv.reader(open("numbers.csv", encoding="utf-8", newline="")))
    logged = (run.folder / "metrics.jsonl").read_text().splitlines()
    assert rows[0][:3] == ["run", "step", "tokens"] and len(rows) == 1 + 2 * len(logged)
    assert [row[0] for row in rows[1:]] == ["words"] * len(logged) + ["second"] * len(logged)
    assert "second" not in nnx("list").stderr and "report.html" not in nnx("list").stdout


def test_the_numbers_are_those_of_the_log(run, nnx):
    run.append("metrics.jsonl", {"step": 41, "=cmd()": "=1+1", "note": ["a", 1], "lr": -0.5, "mfu": 0.25})
    assert nnx("report", "words", "--csv", "numbers.csv").exit_code == 0
    rows = list(csv.DictReader(open("numbers.csv", encoding="utf-8", newline="")))
    logged = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == len(logged) and rows[0]["step"] == str(logged[0]["step"])
    for row, line in zip(rows[:-1], logged[:-1], strict=True):
        assert {name: None if text == "" else float(text) for name, text in row.items() if name in line} == line
    assert rows[-1]["'=cmd()"] == "'=1+1" and rows[-1]["note"] == '["a", 1]' and rows[-1]["lr"] == "-0.5"
    assert nnx("report", "words", "--csv", "numbers.csv").exit_code == 0  # its own file again


def test_numbers_can_be_printed(run, nnx, workspace):
    result = nnx("report", "words", "--csv", "-")
    rows = list(csv.DictReader(result.stdout.splitlines()))
    logged = (run.folder / "metrics.jsonl").read_text().splitlines()
    assert [int(row["step"]) for row in rows] == [json.loads(line)["step"] for line in logged]
    assert "open it in a browser" in result.stderr and not (workspace / "-").exists()


def test_a_damaged_log_is_drawn_and_told(run, nnx):
    with open(run.folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 41, "train')
    result = nnx("report", "words")
    assert result.exit_code == 0
    assert result.stderr == f"warning: {run.folder / 'metrics.jsonl'}: 1 damaged line left out\n"


def test_a_run_without_metrics_is_drawn(run, nnx):
    (run.folder / "metrics.jsonl").unlink()
    result = nnx("report", "words")
    assert result.exit_code == 0 and "has no step to draw" in result.stderr
    assert "metrics.jsonl has no step" in (run.folder / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["nobody", "nobody@best", "data/words", "weights"])
def test_what_is_no_run_is_refused(run, refused, name):
    refused(5, "is a token folder" if "/" in name else "no run", "report", name)


def test_a_model_without_a_log_is_refused(run, refused):
    (run.folder / "run.json").unlink()
    refused(5, "is a model, but no run", "report", "words")


@pytest.mark.parametrize("damage", ["config.json", "run.json"])
def test_a_damaged_folder_is_refused(run, refused, damage):
    (run.folder / damage).write_text("{")
    refused(5, "is damaged", "report", "words")


def test_a_log_that_is_a_link_is_refused(run, refused, workspace):
    (workspace / "secret").write_text('{"step": 1}\n')
    (run.folder / "metrics.jsonl").unlink()
    (run.folder / "metrics.jsonl").symlink_to(workspace / "secret")
    refused(5, "it is a link", "report", "words")


def test_no_run_at_all(refused):
    refused(5, "there is no run in weights/ yet", "report")


@pytest.mark.parametrize("content", ["my notes\n", "", "a,step\n"])
def test_files_of_others_stay(run, refused, workspace, content):
    (workspace / "notes.txt").write_text(content)
    refused(8, "notes.txt exists already, and was not written by this command", "report", "words", "--csv", "notes.txt")
    (run.folder / "report.html").write_text(content)
    refused(8, "report.html exists already, and was not written by this command", "report", "words")


def test_a_csv_that_cannot_be_written(run, refused, workspace):
    refused(8, "cannot write", "report", "words", "--csv", "no/folder/numbers.csv")
    refused(2, "is where the page goes", "report", "words", "--csv", "weights/words/report.html")
    refused(8, "data is a folder", "report", "words", "--csv", "data")


def test_a_page_that_cannot_be_written_leaves_no_numbers(run, refused, monkeypatch):
    def refuse(path, whole):
        raise OutputError(f"disk full while writing {path}")

    monkeypatch.setattr("nnx_cli.reporting.page.write_page", refuse)
    refused(8, "disk full while writing", "report", "words", "--csv", "numbers.csv")


SHAPE = ["--dim", 32, "--n-layers", 1, "--n-heads", 2, "--seq-len", 32, "--batch-size", 2, "--grad-accum", 1]
TRAIN = ["train", "--data", "data/words", *SHAPE, "--device", "cpu", "--threads", 1]


def test_training_leaves_a_page(run, nnx):
    assert nnx(*TRAIN, "--max-steps", 4, "--out", "weights/new").exit_code == 0
    page = run.folder.parent / "new" / "report.html"
    assert "finished after 4 steps" in page.read_text(encoding="utf-8")
    assert nnx("train", "--resume", "new", "--max-steps", 6).exit_code == 0
    assert "finished after 6 steps" in page.read_text(encoding="utf-8")
    assert "<td>1</td>" in page.read_text(encoding="utf-8")  # the first step is still there
    assert nnx(*TRAIN, "--max-steps", 4, "--out", "weights/plain", "--no-report").exit_code == 0
    assert not (run.folder.parent / "plain" / "report.html").exists()
    assert (run.folder.parent / "plain" / "insides" / "step-00000004.safetensors").is_file()


def test_training_keeps_what_happens_inside(run, nnx):
    result = nnx(*TRAIN, "--max-steps", 4, "--out", "weights/new")
    page, insides = (run.folder.parent / "new" / name for name in ("report.html", "insides"))
    assert result.exit_code == 0 and "Inside the model as it learned" in page.read_text(encoding="utf-8")
    assert {path.name for path in insides.iterdir()} >= {"step-00000001.safetensors", "step-00000004.safetensors"}
    (insides / "step-00000001.safetensors").write_bytes(b"half")
    result = nnx("report", "new")
    assert result.exit_code == 0 and "step-00000001.safetensors is damaged" in result.stderr
    assert nnx(*TRAIN, "--max-steps", 4, "--out", "weights/plain", "--no-watch").exit_code == 0
    assert not (run.folder.parent / "plain" / "insides").exists()
    assert "Where it looks" not in (run.folder.parent / "plain" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "films", "charts"),
    [
        (
            ["neon", "--decoder", "memory"],
            ["Memory read", "Memories, shared", "Memories, layer 1"],
            ["Lambda: learned"],
        ),
        (["neon", "--decoder", "function"], ["Functions chosen"], ["Norms by layer: weights"]),
        (["ngpt"], [], ["Steps: to attention", "Norms and scales: s_qk"]),
        (["n4"], ["Copying gate"], ["Norms by layer: activations"]),
        (["tape"], ["Contribution to the prediction"], ["Segments: state"]),
        (["nyx"], ["xPos decay"], []),
    ],
)
def test_the_page_shows_what_an_architecture_has_inside(run, nnx, words, films, charts):
    command = [*TRAIN, "--max-steps", 6, "--lr", 0.05, "--out", "weights/new", "--model", *words]
    assert nnx(*command).exit_code == 0
    page = (run.folder.parent / "new" / "report.html").read_text(encoding="utf-8")
    figures = dict(re.findall(r"<h3>([^<]*)</h3>(.*?)</figure>", page, re.DOTALL))
    assert set(films) | set(charts) <= figures.keys()
    assert all("class=strip" in figures[title] for title in films)
    assert all("class=plot" in figures[title] for title in charts)


def test_a_run_that_diverges_leaves_a_page(run, nnx):
    diverging = ["--lr", 500, "--optimizer", "adamw", "--grad-clip", 0, "--warmup-steps", 0]
    result = nnx(*TRAIN, *diverging, "--max-steps", 40, "--out", "weights/new")
    assert result.exit_code == 6
    assert "lower learning rate" in (run.folder.parent / "new" / "report.html").read_text(encoding="utf-8")
