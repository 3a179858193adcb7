import json
import shutil
from pathlib import Path

import pytest

from nnx_cli.experiments import rate_search
from nnx_cli.experiments.one_run import Stopped
from nnx_cli.experiments.race_file import read_race
from nnx_cli.experiments.race_run import Runner
from nnx_cli.runs.find import find_model
from nnx_cli.runs.run import Run

SHAPE = ["--parameters", "24K", "--seq-len", 32, "--tokens-per-step", 256, "--threads", 1, "--compile", "off"]
SMALL = ["--models", "llama,nyx", *SHAPE, "--budget", "2600"]


@pytest.fixture(autouse=True)
def short_search(monkeypatch):
    """One rate a model."""
    monkeypatch.setattr(rate_search, "FACTORS", (1.0,))


@pytest.fixture(scope="module")
def raced(token_path, tmp_path_factory):
    """A workspace with a race, and what the command said."""
    from typer.testing import CliRunner

    from nnx_cli.cli import app

    folder = tmp_path_factory.mktemp("raced")
    shutil.copytree(token_path, folder / "data" / "words")
    words = ["compare", *map(str, SMALL), "--seeds", "2", "--data", "data/words"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(rate_search, "FACTORS", (1.0,))
        return folder, CliRunner().invoke(app, words)


@pytest.fixture
def race(raced, workspace):
    """A copy of the race in the current folder."""
    shutil.copytree(raced[0] / "data", workspace / "data")
    shutil.copytree(raced[0] / "weights", workspace / "weights")
    return Path("weights/race-words")


def test_what_a_race_shows(raced):
    folder, result = raced
    assert result.exit_code == 0
    for words in (
        "to do: 1 or 2 short runs of 2,560 tokens each to find the learning rate of",
        "; then 4 runs: about ",
    ):
        assert words in " ".join(result.stderr.split()), words
    for words in ("llama, seed 2: finished at", " layers, ", " outside ", "2,560 tokens a run", "muon"):
        assert words in " ".join(result.stderr.split()), words
    for words in ("1 comparison, paired by seed", "within 2 %", "beside the budget", "race.json", "race.html", "±"):
        assert words in result.stdout, words
    lines = [line.split() for line in result.stdout.splitlines()]
    found = [line[0] for line in lines if line and line[0] in ("llama", "nyx") and "±" in line]
    record = read_race(folder / "weights" / "race-words" / "race.json")
    assert found == [each["model"] for each in record["competitors"]]
    assert (folder / "weights" / "race-words" / "race.html").read_text().startswith("<!doctype html>")


def test_the_same_command_shows_a_finished_race(nnx, race, monkeypatch):
    monkeypatch.setattr(Runner, "train", None)  # nothing is run
    words = ["compare", *SMALL, "--seeds", 2, "--data", "data/words"]
    result = nnx(*words, "--json")
    assert result.exit_code == 0 and json.loads(result.stdout) == read_race(race / "race.json")
    assert "is finished" in nnx(*words).stderr
    assert sorted(path.name for path in Path("weights").iterdir()) == ["race-words"]
    (race / ".tmp-race.json-1").write_text("{")  # of one that was killed
    result = nnx(*words, "--target", 99, "--keep", "none")
    assert result.exit_code == 0 and "tokens to target" in result.stdout
    assert not [*race.glob("*/model.safetensors"), *race.glob(".tmp-*")]
    result = nnx("sample", "race-words/llama-1")
    assert result.exit_code == 5 and "model.safetensors" in result.stderr


def test_going_on_tells_what_is_over_and_what_is_left(nnx, race, monkeypatch):
    def stops(*_, **__):
        raise Stopped("interrupted at step 1")

    record = json.loads((race / "race.json").read_text())
    for competitor in record["competitors"]:
        competitor["runs"] = competitor["runs"][: competitor["model"] == "llama"]
        competitor["lr"] = competitor["lr"] if competitor["model"] == "llama" else None
    record["learning_rate_search"]["rates"]["nyx"] = []
    (race / "race.json").write_text(json.dumps(record | {"state": "interrupted"}))
    monkeypatch.setattr(Runner, "train", stops)
    result = nnx("compare", *SMALL, "--seeds", 2, "--data", "data/words")
    said = " ".join(result.stderr.split())
    assert result.exit_code == 130 and "race-words: 2 short runs of the search and 1 of 4 runs done" in said
    assert "tokens each to find the learning rate of nyx; then 3 runs: about" in said
    begun = next(line for line in result.stderr.splitlines() if "nyx, trying lr" in line)
    assert 20 < float(begun.split()[0]) < 60, "the bar begins with what is over"


def test_help_tells_of_the_search_and_how_to_do_without(nnx):
    said = " ".join(nnx("compare", "--help").stdout.split())
    assert (
        "A search of each one's learning rate comes first" in said and "nnx train --lr" in said and "--runs A B" in said
    )


def test_other_settings_are_another_race(nnx, race):
    words = ["compare", *SMALL, "--seeds", 1, "--data", "data/words"]
    result = nnx(*words, "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["comparisons"] == 0
    assert sorted(path.name for path in Path("weights").iterdir()) == ["race-words", "race-words-2"]
    assert "one seed, so no verdict" in nnx(*words).stdout
    result = nnx("compare", *SMALL, "--seeds", 2, "--data", "data/words", "--out", "weights/race-words-2")
    assert result.exit_code == 8 and "its seeds is 1, not 2" in result.stderr


def test_runs_of_a_race_are_models_but_never_the_newest_run(nnx, race):
    result = nnx("sample", "race-words/llama-1", "--max-new-tokens", 2, "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["model"] == "weights/race-words/llama-1"
    assert find_model("race-words/nyx-2").folder == race / "nyx-2"
    assert nnx("sample").exit_code == 5 and "no run in weights/ yet" in nnx("sample").stderr
    assert nnx("train", "--resume", "last").exit_code == 5
    result = nnx("sample", "race-words")
    assert result.exit_code == 5 and "is a race of race-words/llama-1" in result.stderr


def test_list_shows_a_race_in_a_line(nnx, race):
    (row,) = json.loads(nnx("list", "--json").stdout)
    assert (row["name"], row["kind"], row["status"], row["steps"]) == ("race-words", "race", "finished", None)
    assert sorted(row["model"].split(", ")) == ["llama", "nyx"] and row["best_val_bits_per_byte"] > 0
    rows = json.loads(nnx("list", "--all", "--json").stdout)
    runs = [f"race-words/{name}-{seed}" for name in ("llama", "nyx") for seed in (1, 2)]
    assert [each["name"] for each in rows] == ["race-words", *runs]
    assert {each["kind"] for each in rows[1:]} == {"run"} and rows[1].keys() == row.keys()
    record = json.loads((race / "race.json").read_text())
    (race / "race.json").write_text(json.dumps(record | {"state": "running"}))
    assert json.loads(nnx("list", "--json").stdout)[0]["status"] == "interrupted"  # nobody holds it
    (race / "race.json").write_text("{")
    assert json.loads(nnx("list", "--json").stdout)[0]["status"] == "damaged" and nnx("list").exit_code == 0


def test_a_race_is_shown_anywhere(nnx, race, workspace):
    shutil.move(race / "race.json", "elsewhere.json")
    shutil.rmtree("weights")
    shutil.rmtree("data")
    result = nnx("compare", "--show", "elsewhere.json", "--target", 99)
    assert result.exit_code == 0 and "tokens to target" in result.stdout and "1 comparison" in result.stdout
    assert json.loads(nnx("compare", "--show", "elsewhere.json", "--json").stdout)["state"] == "finished"
    assert Path("race.html").is_file()
    record = json.loads(Path("elsewhere.json").read_text())
    for competitor in record["competitors"]:
        competitor["runs"][0]["sample"] = "\n".join(f"\n{n}\x0b" for n in range(100, 200))
    Path("long.json").write_text(json.dumps(record))
    shown = nnx("compare", "--show", "long.json").stdout
    assert "107\\x0b" in shown and "108" not in shown.partition("what they write")[2].partition("comparison")[0]
    Path("race.html").write_text("mine")
    shown = nnx("compare", "--show", "elsewhere.json")
    assert shown.exit_code == 0 and "was not written by this command" in shown.stderr
    assert Path("race.html").read_text() == "mine"


def test_runs_that_are_trained_already(nnx, race):
    names = [f"race-words/{name}-{seed}" for name in ("llama", "nyx") for seed in (1, 2)]
    result = nnx("compare", "--runs", *names, "--device", "cpu", "--json")
    assert result.exit_code == 0
    found, raced = json.loads(result.stdout), read_race(race / "race.json")
    bits = [{each["model"]: each["bits_per_byte"] for each in race["competitors"]} for race in (found, raced)]
    assert bits[0] == bits[1] and found["equal"] is None and found["comparisons"] == 1
    run = Run(race / "llama-2")
    run.set_config(run.config | {"training": run.config["training"] | {"weight_decay": 0.5}})  # no seed of llama-1 then
    found = json.loads(nnx("compare", "--runs", *names, "--device", "cpu", "--json").stdout)
    assert sorted(each["model"] for each in found["competitors"]) == ["llama-1", "llama-2", "nyx"]
    shown = nnx("compare", "--runs", names[0], names[2], "--device", "cpu").stdout
    assert "no verdict" in shown and "beside the budget" not in shown


def test_runs_that_cannot_be_compared(nnx, refused, race, text_file):
    name = "race-words/llama-1"
    other = Path("weights/other")
    shutil.copytree(race / "llama-1", other)
    words = text_file.read_text(encoding="utf-8")
    for file, text in (("a.txt", words), ("b.txt", words[::-1])):
        Path(file).write_text(text, encoding="utf-8")
    small = ["--dim", 32, "--n-layers", 1, "--n-heads", 2, "--seq-len", 32, "--max-steps", 1, "--threads", 1]
    for out, file, kind in (("text", "b.txt", "byte"), ("ids", "a.txt", "char")):
        made = nnx(
            "train", *small, "--filepath", file, "--tokenizer", kind, "--out", f"weights/{out}", "--sample-every", 0
        )
        assert made.exit_code == 0, made.stderr
    refused(3, "another text", "compare", "--runs", name, "text")
    refused(2, "another tokenizer", "compare", "--runs", name, "ids")
    refused(2, "twice", "compare", "--runs", name, "weights/race-words/llama-1")
    refused(2, "alone", "compare", "--runs", name)
    refused(5, "no run or model 'gone'", "compare", "--runs", name, "gone")
    refused(5, "is a race", "compare", "--runs", "race-words", name)
    status = json.loads((other / "run.json").read_text())
    (other / "run.json").write_text(json.dumps(status | {"status": "interrupted"}))
    refused(5, "has not finished", "compare", "--runs", name, "other")
    shutil.rmtree("data")
    refused(3, "", "compare", "--runs", name, "race-words/nyx-1")


BAD = {
    "an unknown model": (2, "did you mean nyx?", ["--models", "llama,nxy"]),
    "a model twice": (2, "names nyx twice", ["--models", "nyx,llama,nyx"]),
    "one model": (2, "fewer than two", ["--models", "nyx"]),
    "no model": (2, "fewer than two", ["--models", ","]),
    "no such file": (2, "my.py", ["--models", "llama,my.py"]),
    "an unknown size": (2, "no size 'huge'", ["--size", "huge"]),
    "two sizes": (2, "--size and --parameters", ["--size", "nano", "--parameters", "1M"]),
    "parameters in words": (2, "must be a number", ["--parameters", "many"]),
    "too few parameters": (2, "no shape of", ["--models", "llama,nyx", "--parameters", "90"]),
    "too many parameters": (2, "--parameters is", ["--parameters", "9000B"]),
    "another equal": (2, "no choice 'steps'", ["--equal", "steps"]),
    "minutes of tokens": (2, "not a number of tokens", ["--budget", "10m"]),
    "tokens of time": (2, "not a length of time", ["--equal", "time", "--budget", "20M"]),
    "seconds without a unit": (2, "not a length of time", ["--equal", "time", "--budget", "20"]),
    "tokens of flops": (2, "not a number of FLOPs", ["--equal", "flops", "--budget", "20M"]),
    "flops of tokens": (2, "not a number of tokens", ["--equal", "tokens", "--budget", "1e15"]),
    "nothing": (2, "not a number of tokens", ["--budget", "0"]),
    "less than nothing": (2, "not a number of tokens", ["--budget=-5"]),
    "too small a budget": (2, "too small for an evaluation", [*SMALL[:-1], "2000"]),
    "no seed": (2, "--seeds is 0", ["--seeds", 0]),
    "no target": (2, "--target is 0", ["--target", 0]),
    "an unknown task": (2, "no choice 'copy'", ["--task", "copy"]),
    "recall of a text": (2, "its text is generated", ["--task", "recall", "--filepath", "words.txt"]),
    "recall in a glance": (2, "at least 32", [*SMALL, "--task", "recall", "--seq-len", 16]),
    "keep": (2, "no choice 'all'", ["--keep", "all"]),
    "tokens a step": (2, "no multiple", [*SMALL, "--tokens-per-step", 250]),
    "positions": (2, "--seq-len is 0", ["--seq-len", 0]),
    "text and tokens": (2, "give one", ["--filepath", "a.txt", "--data", "data"]),
    "a text as a word": (2, "without --runs", ["a.txt"]),
    "models of runs": (2, "beside --runs", ["--runs", "a", "b", "--models", "llama"]),
    "a budget to show": (2, "beside --show", ["--show", "race.json", "--budget", "1M"]),
    "no text": (3, "gone.txt", ["--filepath", "gone.txt"]),
    "no tokens": (3, "no token folder", [*SMALL, "--data", "gone"]),
    "a short text": (3, "one sequence needs", [*SMALL, "--filepath", "short.txt"]),
    "no race": (5, "race.json", ["--show", "race.json"]),
    "another format": (5, "race format 2; this version of nnx reads 1", ["--show", "later.json"]),
    "a folder that is taken": (8, "is no race", [*SMALL, "--filepath", "words.txt", "--out", "taken"]),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(refused, workspace, text_file, what):
    (workspace / "short.txt").write_text("A short text.\n" * 3)
    (workspace / "later.json").write_text('{"format": 2, "competitors": []}')
    shutil.copy(text_file, workspace / "words.txt")
    (workspace / "taken").mkdir()
    code, message, words = BAD[what]
    refused(code, message, "compare", *words, *(["--device", "cpu"] if "--show" not in words else []))


def test_settings_from_a_file(nnx, refused, workspace, token_path):
    (workspace / "race.toml").write_text(
        'models = "nyx,llama"\nparameters = "24K"\nseq-len = 32\ntokens-per-step = 256\nseeds = 1\nbudget = "9M"\n'
        'threads = 1\ncompile = "off"\nkeep = "none"\n'
    )
    result = nnx("compare", "--config", "race.toml", "--data", token_path, "--budget", 2560, "--json")
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    assert record["settings"]["models"] == ["nyx", "llama"] and record["budget"] == 2560
    assert not list(workspace.glob("weights/*/*/model.safetensors"))
    (workspace / "race.toml").write_text("dim = 3\n")
    refused(2, "there is no setting 'dim'", "compare", "--config", "race.toml")


def test_recall_by_distance(nnx, workspace):
    words = ["compare", *SMALL, "--task", "recall", "--seeds", 1]
    result = nnx(*words)
    assert result.exit_code == 0 and "answers recalled" in result.stdout and "8 back" in result.stdout
    record = read_race(workspace / "weights" / "race-recall" / "race.json")
    for competitor in record["competitors"]:
        ((first, accuracy), *more) = competitor["runs"][0]["recall"]
        assert first == 8 and 0 <= accuracy <= 1 and [distance for distance, _ in more] == [16]
    assert (workspace / "data" / "recall-2600-32" / "meta.json").is_file()
    assert "Accuracy by distance" in (workspace / "weights" / "race-recall" / "race.html").read_text()
    assert json.loads(nnx(*words, "--json").stdout) == record  # the same race


def test_text_is_prepared_and_taken_back_where_there_is_no_race(nnx, refused, workspace, text_file):
    refused(2, "too small", "compare", *SMALL[:-1], "100", "--filepath", text_file)
    assert not (workspace / "data").exists()
    result = nnx("compare", *SMALL, "--filepath", text_file, "--seeds", 1)
    assert result.exit_code == 0 and (workspace / "weights" / "race-words" / "race.json").is_file()
