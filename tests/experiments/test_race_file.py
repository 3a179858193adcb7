import copy
import json

import pytest

from nnx_cli.errors import CheckpointError
from nnx_cli.experiments.race_file import judge, read_race, write_race


def a_run(seed, bits, curve=((100, 4.0), (200, 3.0), (300, 2.0))):
    points = [
        {
            "step": t // 100,
            "tokens": t,
            "time_s": t / 50,
            "flops": 6 * t,
            "train_loss": 1.0,
            "val_bits_per_byte": each,
        }
        for t, each in curve
    ]
    entry = {"seed": seed, "out": f"weights/race-x/a-{seed}", "status": "finished", "bits_per_byte": bits}
    return entry | {
        "tokens": 300,
        "time_s": 6.0,
        "flops": 1800,
        "peak_memory_bytes": 9,
        "curve": points,
        "sample": "a",
        "recall": None,
        "plasticity": None,
    }


def a_race(target=None, **results):
    competitors = [
        {
            "model": name,
            "size": "nano",
            "config": {"dim": 32},
            "parameters": 10,
            "parameters_without_tables": 8,
            "lr": 0.1,
            "status": "finished",
            "runs": [a_run(seed, each) for seed, each in enumerate(bits, 1)],
        }
        for name, bits in results.items()
    ]
    return {"format": 1, "state": "finished", "target_bits_per_byte": target, "competitors": competitors}


def test_means_order_and_ties():
    race = a_race(b=(2.5, 2.51, 2.52), a=(2.0, 2.01, 2.02), c=(2.0, 2.02, 2.01), d=(None, None))
    judge(race)
    assert [each["model"] for each in race["competitors"]] == ["a", "c", "b", "d"]
    assert race["comparisons"] == 3
    a, c, b, d = race["competitors"]
    assert a["bits_per_byte"]["mean"] == pytest.approx(2.01) and a["bits_per_byte"]["stderr"] == pytest.approx(
        0.0057735, abs=1e-6
    )
    assert (a["ties_with"], c["ties_with"], b["ties_with"], d["ties_with"]) == (["c"], ["a"], [], None)
    assert a["tokens_per_s"] == 50.0 and d["bits_per_byte"] is None and d["tokens_per_s"] is None


def test_whoever_lost_a_run_stands_behind_those_who_lost_none_and_has_no_verdict():
    race = a_race(lucky=(1.0, None, 1.1), a=(2.0, 2.01, 2.02), b=(2.5, 2.51, 2.52), none=(None,))
    judge(race)
    assert [each["model"] for each in race["competitors"]] == ["a", "b", "lucky", "none"]
    assert [each["ties_with"] for each in race["competitors"]] == [[], [], None, None] and race["comparisons"] == 1
    assert race["competitors"][2]["bits_per_byte"]["mean"] == pytest.approx(1.05)


def test_a_seed_that_ended_before_the_target_missed_it():
    race = a_race(target=2.25, a=(2.0, None), b=(2.0, None))
    cut = race["competitors"][1]["runs"][1]
    cut["curve"] = cut["curve"][:1]
    judge(race)
    reached = {each["model"]: each["to_target"] for each in race["competitors"]}
    assert reached["a"]["tokens"] == 275.0 and reached["b"] is None


@pytest.mark.parametrize("axis", ["tokens", "time_s", "flops", "val_bits_per_byte"])
def test_points_with_something_missing_are_passed_over(axis):
    race = a_race(target=2.5, a=(2.0, 2.0))
    for run in race["competitors"][0]["runs"]:
        run["curve"][1][axis] = None
    judge(race)
    assert race["competitors"][0]["to_target"]["tokens"] == 250.0


def test_the_way_to_the_target_lies_between_validations():
    race = a_race(2.5, a=(2.0, 2.0), b=(2.0,))
    race["competitors"][0]["runs"][1]["curve"][2]["val_bits_per_byte"] = 2.5  # reached at 300, the other one at 250
    race["competitors"][1]["runs"][0]["curve"][2]["val_bits_per_byte"] = 2.6
    judge(race)
    a, b = race["competitors"]
    assert a["to_target"] == {"tokens": 275.0, "time_s": 5.5, "flops": 1650.0} and b["to_target"] is None
    race["target_bits_per_byte"] = 9.0  # below it from the first validation on
    judge(race)
    assert race["competitors"][0]["to_target"]["tokens"] == 100.0


def test_what_is_written_is_read(tmp_path):
    race = a_race(a=(2.0, 2.1), b=(2.2, 2.3))
    judge(race)
    write_race(tmp_path, race | {"of_a_later_version": [1]})
    found = read_race(tmp_path / "race.json")
    assert found["of_a_later_version"] == [1] and found["budget"] is None  # what is not there is null
    assert found["competitors"][0]["runs"] == race["competitors"][0]["runs"]
    write_race(tmp_path, found)
    assert read_race(tmp_path / "race.json") == found


def test_another_format_is_refused_naming_both(tmp_path):
    write_race(tmp_path, a_race(a=(2.0,)) | {"format": 7})
    with pytest.raises(CheckpointError, match="race format 7; this version of nnx reads 1"):
        read_race(tmp_path / "race.json")


DAMAGE = {
    "no format": lambda race: race.pop("format"),
    "format of another kind": lambda race: race.update(format="1"),
    "no competitors": lambda race: race.pop("competitors"),
    "competitors": lambda race: race.update(competitors={}),
    "a competitor": lambda race: race["competitors"].append("llama"),
    "no name": lambda race: race["competitors"][0].pop("model"),
    "its runs": lambda race: race["competitors"][0].update(runs=3),
    "bits": lambda race: race["competitors"][0].update(bits_per_byte={"mean": "low"}),
    "a run": lambda race: race["competitors"][0]["runs"].append(None),
    "a seed": lambda race: race["competitors"][0]["runs"][0].update(seed="one"),
    "a curve": lambda race: race["competitors"][0]["runs"][0].update(curve=[3]),
    "a sample": lambda race: race["competitors"][0]["runs"][0].update(sample=9),
    "recall": lambda race: race["competitors"][0]["runs"][0].update(recall=[[8]]),
    "means of texts": lambda race: race["competitors"][0].update(plasticity={"new": 1.0}),
    "a text": lambda race: race["competitors"][0]["runs"][0].update(plasticity=[{"text": "a"}]),
    "ties": lambda race: race["competitors"][0].update(ties_with="b"),
    "rates": lambda race: race.update(learning_rate_search={"rates": 3}),
    "rates of a model": lambda race: race.update(learning_rate_search={"rates": {"a": 3}}),
    "a rate": lambda race: race.update(learning_rate_search={"rates": {"a": [{"lr": "high"}]}}),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_said(tmp_path, what):
    race = copy.deepcopy(a_race(a=(2.0, 2.1)))
    DAMAGE[what](race)
    (tmp_path / "race.json").write_text(json.dumps(race))
    with pytest.raises(CheckpointError, match=r"race\.json (is|has)"):
        read_race(tmp_path / "race.json")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1, "competitors": [NaN]}'])
def test_no_race_at_all(tmp_path, text):
    (tmp_path / "race.json").write_text(text)
    with pytest.raises(CheckpointError):
        read_race(tmp_path / "race.json")
    with pytest.raises(CheckpointError):
        read_race(tmp_path / "missing.json")
