import json
import shutil

import pytest


def test_runs_newest_first_and_what_became_of_them(nnx, run, workspace):
    (row,) = json.loads(nnx("list", "--json").stdout)
    assert row["name"] == "words" and row["status"] == "finished" and row["steps"] == 40
    assert row["model"] == "nyx" and row["best_val_bits_per_byte"] > 0 and row["age_s"] >= 0
    assert "words" in nnx("list").stdout


def test_a_killed_run_is_not_running(nnx, run):
    run.set_status(status="running")
    with run.lock():
        assert json.loads(nnx("list", "--json").stdout)[0]["status"] == "running"
    assert json.loads(nnx("list", "--json").stdout)[0]["status"] == "interrupted"


def test_a_damaged_run_does_not_hide_the_others(nnx, run, workspace):
    broken = workspace / "weights" / "broken"
    broken.mkdir()
    (broken / "run.json").write_text("{")
    rows = {row["name"]: row["status"] for row in json.loads(nnx("list", "--json").stdout)}
    assert rows == {"words": "finished", "broken": "damaged"}


LONG = ["nyx-the-collected-works-of-somebody-who-wrote-a-lot", "nyx-the-collected-works-of-somebody-who-wrote-a-lot-2"]


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_name_stays_whole(nnx, run, workspace, monkeypatch, width):
    for name in LONG:
        shutil.copytree(run.folder, workspace / "weights" / name)
    monkeypatch.setenv("COLUMNS", str(width))
    lines = nnx("list").stdout.splitlines()
    for name in ("words", *LONG):
        (line,) = [line for line in lines if line.split()[:1] == [name]]
        assert len(line.rstrip()) <= max(width, len(name) + 2)
    heads = next(line for line in lines if "name" in line).split()
    assert ("age" in heads) == ("size" in heads) == (width == 200) and ("status" in heads) == (width >= 80)


def test_everything_in_weights_is_shown_with_its_kind(nnx, run):
    assert nnx("quantize", "words", "--max-drop", 9).exit_code == 0
    rows = {row["name"]: row for row in json.loads(nnx("list", "--json").stdout)}
    assert {name: row["kind"] for name, row in rows.items()} == {"words": "run", "words-int8": "quantized"}
    keys = {
        "name",
        "out",
        "kind",
        "model",
        "size",
        "status",
        "steps",
        "best_val_bits_per_byte",
        "best_val_loss",
        "age_s",
    }
    assert rows["words"].keys() == rows["words-int8"].keys() == keys
    (line,) = [line for line in nnx("list").stdout.splitlines() if "words-int8" in line]
    assert line.split()[:3] == ["words-int8", "quantized", "nyx"]


def test_no_runs(nnx):
    result = nnx("list")
    assert result.exit_code == 0 and "no models" in result.stdout
