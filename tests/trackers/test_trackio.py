import json
import sqlite3

import pytest


@pytest.fixture
def rows(twice):
    """What its database has of the run, by table."""
    (path,) = (twice.parents[1] / "trackio").glob("*.db")
    database = sqlite3.connect(path)
    database.row_factory = sqlite3.Row
    yield {name: [dict(row) for row in database.execute(f"SELECT * FROM {name}")] for name in ("metrics", "configs")}
    database.close()


def test_its_database_has_every_number(rows, records):
    assert len({row["run_name"] for row in rows["metrics"]}) == 1
    told = [(row["step"], json.loads(row["metrics"])) for row in rows["metrics"]]
    assert {s: values["train/loss"] for s, values in told if "train/loss" in values} == {
        record["step"]: record["train_loss"] for record in records
    }
    assert [step for step, values in told if "samples" in values] == [4, 8, 12]
    assert len([step for step, values in told if "report" in values]) == 2


def test_nothing_private_is_in_it(rows, twice, leaks):
    settings = json.loads(rows["configs"][0]["config"])
    assert settings["dim"] == 32 and "sample_prompt" not in settings
    assert not leaks(twice.parents[1] / "trackio", twice.parent, "/a/path")
