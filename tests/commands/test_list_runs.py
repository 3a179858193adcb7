import json


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


def test_no_runs(nnx):
    result = nnx("list")
    assert result.exit_code == 0 and "no runs" in result.stdout
