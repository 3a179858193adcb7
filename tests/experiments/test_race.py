import copy
import hashlib
import json
import os
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nnx_cli import models
from nnx_cli.config import RaceConfig, TrainConfig
from nnx_cli.data.loader import Loader
from nnx_cli.errors import CheckpointError, DataError, DoesNotFit, OutputError, QualityError, UsageError
from nnx_cli.experiments import entrants, race_run, rate_search
from nnx_cli.experiments import race as races
from nnx_cli.experiments.one_run import Stopped
from nnx_cli.experiments.race import Race
from nnx_cli.experiments.race_file import read_race, write_race
from nnx_cli.experiments.race_gpus import gather, run_on_gpus
from nnx_cli.runs.load import ModelRef, load_model
from nnx_cli.training.observer import Silent
from nnx_cli.training.trainer import Trainer

CPU = torch.device("cpu")
SIZE = 24_000
TRAIN = TrainConfig(device="cpu", compile="off", threads=1, tokens_per_step=256)
RACE = dict(models="llama,nyx", parameters="24K", budget="2600", seeds=2)


class Watcher(Silent):
    """Takes note of what a race says, and may do something at its n-th logged step."""

    def __init__(self, at=None, do=None):
        self.told, self.notes, self.steps, self.at, self.do = [], [], 0, at, do

    def begins(self, what, done, share):
        assert 0 <= done <= done + share < 1.01
        self.told.append(what)

    def step(self, record, progress):
        self.steps += 1
        if self.steps == self.at:
            self.do()

    def note(self, text):
        self.notes.append(text)


def enter(tokens, **changes):
    """The field of a small race."""
    config = RaceConfig(**(RACE | changes))
    return entrants.enter(config, TRAIN, entrants.target_of(config, CPU), 32, tokens, CPU, "fp32")


def run_race(tokens, folder, watcher=None, should_stop=lambda: False, begun=None, **changes):
    """Run what is left of a race in a folder, or after what `begun` says; returns what its file says."""
    field = enter(tokens, **changes)
    if not folder.exists():
        races.begin(folder, begun or races.new_record(field, races.identity(field, {})))
    record = read_race(folder / "race.json")
    Race(field, folder, record, watcher or Watcher(), "nnx compare", should_stop).run()
    return read_race(folder / "race.json")


def table(record):
    """What a race found, without times."""
    record = copy.deepcopy(record)
    search = record["learning_rate_search"]
    for each in [search, *(rate for tried in search["rates"].values() for rate in tried)]:
        each.pop("time_s")
    for competitor in record["competitors"]:
        competitor.pop("tokens_per_s")
        for run in competitor["runs"]:
            for name in ("time_s", "peak_memory_bytes", "out"):
                run.pop(name)
            for point in run["curve"]:
                point.pop("time_s")
    return record


@pytest.fixture(scope="module", autouse=True)
def short_search():
    """One rate a model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rate_search, "FACTORS", (1.0,))
        yield


@pytest.fixture(scope="module")
def seen():
    """What the loaders of the undisturbed race handed out: checksums of batches by run."""
    return {}


@pytest.fixture
def searched(undisturbed):
    """A race whose rates are known and that has not run."""
    record = copy.deepcopy(undisturbed[1])
    for competitor in record["competitors"]:
        competitor.update(status="waiting", runs=[])
    return record


@pytest.fixture(scope="module")
def undisturbed(tokens, tmp_path_factory, seen):
    """A whole race: its folder, its record, its watcher."""
    folder, watcher, batch = tmp_path_factory.mktemp("race") / "race-words", Watcher(), Loader.batch

    def noted(self, first, count):
        found = batch(self, first, count)
        sums = [hashlib.sha256(x.numpy().tobytes()).hexdigest() for x in found]
        seen.setdefault(watcher.told[-1], []).append((first, count, *sums))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loader, "batch", noted)
        record = run_race(tokens, folder, watcher)
    return folder, record, watcher


def test_every_competitor_sees_the_same_batches(undisturbed, seen):
    for seed in (1, 2):
        first, second = seen[f"llama, seed {seed}"], seen[f"nyx, seed {seed}"]
        assert len(first) == 10 and first == second
    assert seen["llama, seed 1"] != seen["llama, seed 2"]
    trials = {what.partition(" lr ")[0]: batches for what, batches in seen.items() if "trying" in what}
    assert trials["llama, trying"] == trials["nyx, trying"]


def test_what_is_equal_is_equal(undisturbed):
    _, record, _ = undisturbed
    assert record["state"] == "finished" and record["comparisons"] == 1 and record["budget"] == 2600
    for competitor in record["competitors"]:
        assert abs(competitor["parameters_without_tables"] / SIZE - 1) <= 0.02
        assert competitor["parameters"] - competitor["parameters_without_tables"] == 256 * competitor["config"]["dim"]
        assert [run["seed"] for run in competitor["runs"]] == [1, 2]
        for run in competitor["runs"]:
            assert run["tokens"] == 2560  # the whole steps of the budget
            assert run["flops"] == 2560 * competitor["flops_per_token"]
            assert run["curve"][-1]["tokens"] == 2560 and run["curve"][-1]["val_bits_per_byte"] > 0
            assert isinstance(run["sample"], str) and run["sample"] and run["status"] == "finished"
    first, second = record["competitors"]
    assert first["bits_per_byte"]["mean"] <= second["bits_per_byte"]["mean"]
    assert first["config"]["seq_len"] == second["config"]["seq_len"] == 32


def test_a_run_is_a_model_like_any_other(undisturbed):
    folder, record, _ = undisturbed
    for competitor in record["competitors"]:
        run = folder / f"{competitor['model']}-1"
        assert load_model(ModelRef(run), CPU).config.dim == competitor["config"]["dim"]
        config = json.loads((run / "config.json").read_text())
        assert config["training"]["lr"] == competitor["lr"] and config["training"]["seed"] == 1
        assert config["training"]["optimizer"] == competitor["optimizer"]
        assert config["training"]["stop_early"] == "off"
    assert not (folder / "search").exists()


def test_a_finished_race_does_nothing_again(undisturbed, tokens):
    folder, record, _ = undisturbed
    watcher = Watcher()
    assert table(run_race(tokens, folder, watcher)) == table(record)
    assert watcher.told == [] and watcher.steps == 0


def test_what_is_recorded_is_over_and_short_runs_tell_how_long_the_rest_takes(undisturbed, tokens, tmp_path):
    field = enter(tokens)
    blank = races.new_record(field, races.identity(field, {}))

    def seconds(record, field=field):
        return Race(field, tmp_path, copy.deepcopy(record), Watcher(), "nnx compare", lambda: False).seconds()

    nothing, planned = seconds(blank)
    assert nothing == 0 < planned
    whole = sum(seconds(undisturbed[1]))
    assert seconds(undisturbed[1]) == (pytest.approx(whole), pytest.approx(0, abs=1e-9))
    tried = {"factor": 1.0, "lr": 0.01, "bits_per_byte": 2.0, "time_s": 50.0}
    search = blank["learning_rate_search"] | {"rates": {"llama": [tried]}}
    done, left = seconds(blank | {"learning_rate_search": search})
    assert done == pytest.approx(50.0) and left > 3 * planned, "it is slow here"
    search["rates"]["llama"] = [tried | {"bits_per_byte": None}]
    assert sum(seconds(blank | {"learning_rate_search": search})) == pytest.approx(planned), (
        "one that diverged ended soon"
    )
    timed = enter(tokens, equal="time", budget="30s")
    record = races.new_record(timed, races.identity(timed, {}))
    for competitor in record["competitors"]:
        competitor["lr"] = 0.01
    assert seconds(record, timed) == (0, pytest.approx(2 * 2 * 30))


class Killed(BaseException):
    """Nothing is saved after it, as with SIGKILL."""


def kill():
    raise Killed


def test_killed_while_it_searches_a_race_ends_like_an_undisturbed_one(undisturbed, tokens, tmp_path):
    folder = tmp_path / "race-words"
    for nth in (2, 3, 1):
        with pytest.raises(Killed):
            run_race(tokens, folder, Watcher(nth, kill))
    assert table(run_race(tokens, folder)) == table(undisturbed[1])


@pytest.mark.parametrize("at", [12, 38])
def test_killed_while_it_runs_a_race_ends_like_an_undisturbed_one(undisturbed, searched, tokens, tmp_path, at):
    folder = tmp_path / "race-words"
    for nth in (at, 1):
        with pytest.raises(Killed):
            run_race(tokens, folder, Watcher(nth, kill), begun=searched)
    assert table(run_race(tokens, folder)) == table(undisturbed[1])


@pytest.mark.parametrize(("number", "written"), [(2, False), (5, True)])
def test_killed_while_it_writes_what_it_found(undisturbed, searched, tokens, tmp_path, monkeypatch, number, written):
    folder, write, calls = tmp_path / "race-words", races.race_file.write_race, []

    def dies(*arguments):
        calls.append(arguments)
        if len(calls) == number and not written:
            raise Killed
        write(*arguments)
        if len(calls) == number:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(races.race_file, "write_race", dies)
        with pytest.raises(Killed):
            run_race(tokens, folder, begun=searched)
    assert table(run_race(tokens, folder)) == table(undisturbed[1])


@pytest.mark.parametrize(("calls", "known"), [(5, False), (15, True)])
def test_a_race_that_is_asked_to_stop_saves_and_goes_on(undisturbed, searched, tokens, tmp_path, calls, known):
    folder, asked = tmp_path / "race-words", []

    def should_stop():
        asked.append(None)
        return len(asked) >= calls

    with pytest.raises(Stopped, match="interrupted at step"):
        run_race(tokens, folder, should_stop=should_stop, begun=searched if known else None)
    assert len(asked) == calls and read_race(folder / "race.json")["state"] == "interrupted"
    found = run_race(tokens, folder, should_stop=lambda: asked.append(None))
    assert table(found) == table(undisturbed[1])
    assert len(asked) == (40 if known else 80)  # as many steps as undisturbed: a short run goes on, too


def failing(error, name="nyx"):
    """A trainer's train() that fails for one architecture, but for its short runs."""
    train = Trainer.train

    def fails(self, run, should_stop):
        if self.model.architecture == name and run.folder.parent.name != "search":
            raise error
        return train(self, run, should_stop)

    return fails


ENDS = {
    "diverged": QualityError("the run diverged: its loss"),
    "out of memory": DoesNotFit("out of memory at step 3"),
    "refused": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    "no memory": MemoryError(),
}


@pytest.mark.parametrize("how", ENDS)
def test_a_competitor_that_fails_is_a_row(searched, tokens, tmp_path, monkeypatch, how):
    monkeypatch.setattr(Trainer, "train", failing(ENDS[how]))
    record = run_race(tokens, tmp_path / "race-words", begun=searched, seeds=1)
    good, bad = record["competitors"]
    assert record["state"] == "finished" and good["model"] == "llama" and good["status"] == "finished"
    assert bad["status"] == ("diverged" if how == "diverged" else "out of memory")
    assert bad["bits_per_byte"] is None and bad["ties_with"] is None and good["ties_with"] is None
    assert [run["status"] for run in bad["runs"]] == [bad["status"]] and bad["problem"] is not None
    assert record["comparisons"] == 0


@pytest.mark.parametrize("where", ["search", "race"])
def test_memory_that_ends_while_a_model_is_judged_is_a_row(searched, tokens, tmp_path, monkeypatch, where):
    module = {"search": rate_search, "race": race_run}[where]
    judge = module.bits_per_byte

    def fails(model, *arguments):
        if model.architecture == "nyx":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 52.00 MiB.\nMore.")
        return judge(model, *arguments)

    monkeypatch.setattr(module, "bits_per_byte", fails)
    begun = None if where == "search" else searched
    record = run_race(tokens, tmp_path / "race-words", begun=begun, seeds=1)
    good, other = record["competitors"]
    assert record["state"] == "finished" and good["model"] == "llama" and good["status"] == "finished"
    if where == "search":  # the lowest rate, as where all diverged
        rates = record["learning_rate_search"]["rates"]["nyx"]
        assert [each["bits_per_byte"] for each in rates] == [None] * len(rates) and other["status"] == "finished"
    else:
        assert other["status"] == other["runs"][0]["status"] == "out of memory"
        assert other["problem"] == "CUDA out of memory. Tried to allocate 52.00 MiB." and other["ties_with"] is None


def test_a_run_leaves_no_trainer_behind(searched, tokens, tmp_path, monkeypatch):
    train, judge, trainers, alive = Trainer.train, race_run.bits_per_byte, [], []

    def noted(self, run, should_stop):
        self.itself = self  # as a recorded step may
        trainers.append(weakref.ref(self))
        return train(self, run, should_stop)

    def judged(*arguments):
        alive.append(sum(trainer() is not None for trainer in trainers))
        return judge(*arguments)

    monkeypatch.setattr(Trainer, "train", noted)
    monkeypatch.setattr(race_run, "bits_per_byte", judged)
    run_race(tokens, tmp_path / "race-words", begun=searched, seeds=1)
    assert len(trainers) == 2 and alive == [0, 0]


def test_any_other_error_ends_the_race(searched, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "train", failing(RuntimeError("shapes differ"), "llama"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        run_race(tokens, tmp_path / "race-words", begun=searched, seeds=1)


def test_a_competitor_that_cannot_fit_is_a_row_from_the_start(tokens, tmp_path, monkeypatch):
    plan_run = entrants.plan_run

    def refuses(name, *arguments, **how):
        if name == "nyx":
            raise DoesNotFit("needs 9 GiB of 8 GiB")
        return plan_run(name, *arguments, **how)

    monkeypatch.setattr(entrants, "plan_run", refuses)
    good, bad = run_race(tokens, tmp_path / "race-words", seeds=1)["competitors"]
    assert good["status"] == "finished" and bad["status"] == "out of memory" and bad["runs"] == []
    assert bad["problem"] == "needs 9 GiB of 8 GiB" and bad["parameters_without_tables"]


def test_flops_are_kept_within_a_percent(tokens):
    field = enter(tokens, models="all", parameters="800K", equal="flops", budget="1e11")
    for entrant in field.entrants:
        used = entrant.asked.max_steps * field.tokens_per_step * entrant.flops
        assert abs(used / 1e11 - 1) <= 0.01, entrant.name


@pytest.mark.parametrize(
    ("changes", "batches"),
    [
        (dict(equal="flops", budget="1e13"), {"llama": 8, "nyx": 4}),
        (dict(budget="1M"), {"llama": 1, "nyx": 8}),
        (dict(equal="time", budget="20s"), {"llama": 2, "nyx": 8}),
    ],
)
def test_all_validate_on_the_same_text(tokens, monkeypatch, changes, batches):
    plan_run = entrants.plan_run

    def planned(name, *arguments, **how):
        plan = plan_run(name, *arguments, **how | {"val_tokens": 10**9})
        size = batches[name]
        return replace(plan, train=replace(plan.train, batch_size=size, grad_accum=8 // size))

    monkeypatch.setattr(entrants, "plan_run", planned)
    field = enter(tokens, **changes)
    read = {entrant.name: entrant.plan.train.val_batches * batches[entrant.name] for entrant in field.entrants}
    assert set(read.values()) == {field.val_windows} and field.val_windows * 32 >= entrants.VALIDATION_TOKENS
    for entrant in field.entrants:
        assert (
            field.plan(entrant.model, entrant.match, entrant.asked).train.val_batches == entrant.plan.train.val_batches
        )


def test_sequences_are_halved_where_nothing_needs_them_whole(tokens):
    def parts(of=tokens, **changes):
        return {entrant.plan.train.short_sequences for entrant in enter(of, budget="110000", **changes).entrants}

    assert parts() == {1 / 3}
    masked = replace(tokens, mask=np.full(-(-len(tokens.train) // 8), 255, np.uint8))
    assert parts(task="recall") == parts(task="plasticity") == parts(masked) == {0.0}


def test_time_is_kept(searched, tokens, tmp_path):
    record = run_race(tokens, tmp_path / "race-words", begun=searched, equal="time", budget="0.5s", seeds=1)
    for competitor in record["competitors"]:
        (run,) = competitor["runs"]
        steps = run["tokens"] // 256
        assert 0.5 <= run["time_s"] < 0.5 + 10 * run["time_s"] / steps  # the last step may go over
        assert competitor["bits_per_byte"]["stderr"] is None and competitor["ties_with"] is None
    assert record["comparisons"] == 0


def test_weights_that_are_kept(undisturbed, searched, tokens, tmp_path):
    run_race(tokens, tmp_path / "race-words", begun=searched, keep="none", seeds=1)
    for folder, kept in ((undisturbed[0], True), (tmp_path / "race-words", False)):
        for name in ("llama-1", "nyx-1"):
            assert (folder / name / "model.safetensors").exists() == kept
            assert not (folder / name / "checkpoints").exists() and (folder / name / "metrics.jsonl").exists()


def test_the_smallest_budgets(tokens):
    for wrong in (
        dict(budget="2559"),
        dict(equal="flops", budget="1e8"),
        dict(equal="time", budget="0.00001s"),
    ):
        with pytest.raises(UsageError, match="too small for an evaluation"):
            enter(tokens, **wrong)
    assert enter(tokens, budget="2560").entrants[0].asked.max_steps == 10


def test_a_text_that_is_too_short(tokens):
    short = replace(tokens, train=tokens.train[:50])
    with pytest.raises(DataError, match="one sequence needs"):
        rate_search.training_text(enter(short).data, 32)
    with pytest.raises(DataError, match="one sequence needs"):
        enter(replace(tokens, train=tokens.train[:20]))
    with pytest.raises(DataError, match="fewer than two tokens"):
        enter(replace(tokens, val=tokens.val[:1]))
    with pytest.raises(DataError, match="tokenizer"):
        enter(replace(tokens, tokenizer=None))


def test_the_folder_of_a_race(tokens, workspace):
    settings = {"seeds": 2, "equal": "tokens"}
    assert races.find_race(settings, "a", "a CPU", "words", None) == (Path("weights/race-words"), False)
    for name, fingerprint, seeds in (("race-words", "b", 2), ("race-words-2", "a", 3), ("race-words-3", "a", 2)):
        record = races.new_record(enter(tokens), settings | {"seeds": seeds}) | {"fingerprint": fingerprint}
        races.begin(Path("weights") / name, record)
    assert races.find_race(settings, "a", "a CPU", "words", None) == (Path("weights/race-words-3"), True)
    assert races.find_race(settings, "c", "a CPU", "words", None) == (Path("weights/race-words-4"), False)
    with pytest.raises(OutputError, match="another race: its seeds is 3, not 2"):
        races.find_race(settings, "a", "a CPU", "words", Path("weights/race-words-2"))
    with pytest.raises(OutputError, match="another race: its text differs"):
        races.find_race(settings, "c", "a CPU", "words", Path("weights/race-words-2"))
    timed = settings | {"equal": "time"}
    races.begin(Path("timed"), races.new_record(enter(tokens), timed) | {"fingerprint": "a", "device": "a CPU"})
    assert races.find_race(timed, "a", "a CPU", "words", Path("timed")) == (Path("timed"), True)
    with pytest.raises(OutputError, match="its time is that of a CPU, and this is a GPU"):
        races.find_race(timed, "a", "a GPU", "words", Path("timed"))
    Path("weights/plain").mkdir()
    with pytest.raises(OutputError, match="is no race"):
        races.find_race(settings, "a", "a CPU", "words", Path("weights/plain"))


def test_a_file_that_is_changed_makes_another_race(tokens, tmp_path):
    file = Path(shutil.copy(models.__path__[0] + "/llama.py", tmp_path / "mine.py"))
    field = enter(tokens, models=f"nyx,{file}")
    before = races.identity(field, {})
    assert before == races.identity(enter(tokens, models=f"nyx,{file}"), {}) and before["sha256"].keys() == {"mine"}
    file.write_text(file.read_text(encoding="utf-8") + "# changed\n", encoding="utf-8")
    assert before != races.identity(field, {}) and "sha256" not in races.identity(enter(tokens), {})


def test_a_race_of_other_shapes_is_not_gone_on_with(undisturbed, tokens):
    folder, record, _ = undisturbed
    changed = copy.deepcopy(record)
    changed["competitors"][0]["parameters"] += 16
    with pytest.raises(CheckpointError, match="another version of nnx"):
        Race(enter(tokens), folder, changed, Watcher(), "", lambda: False)


def test_a_race_that_is_moved_says_where_it_is(undisturbed, tokens, tmp_path):
    folder = tmp_path / "elsewhere" / "race"
    shutil.copytree(undisturbed[0], folder)
    moved = replace(tokens, path=shutil.copytree(tokens.path, tmp_path / "text"))
    record = run_race(moved, folder, target=99.0)
    assert record["data"] == str(tmp_path / "text") and record["target_bits_per_byte"] == 99.0
    for competitor in record["competitors"]:
        assert [run["out"] for run in competitor["runs"]] == [
            str(folder / f"{competitor['model']}-{n}") for n in (1, 2)
        ]
        assert competitor["to_target"]["tokens"] > 0
    assert run_race(moved, folder)["target_bits_per_byte"] == 99.0  # it is not asked for again


def test_what_processes_wrote_before_all_were_killed_is_not_done_again(undisturbed, searched, tokens, tmp_path):
    folder, watcher, field = tmp_path / "race-words", Watcher(), enter(tokens, keep="none")
    llama = next(each for each in undisturbed[1]["competitors"] if each["model"] == "llama")
    races.begin(folder, searched)
    (folder / "llama.part.json").write_text(json.dumps({"entry": llama, "rates": []}))
    race = Race(field, folder, read_race(folder / "race.json"), watcher, "nnx compare", lambda: False)
    gather(race)
    assert not list(folder.glob("*.part.json"))
    race.run()
    assert watcher.told[1:] == ["nyx, seed 1", "nyx, seed 2"]
    found, expected = table(read_race(folder / "race.json")), table(undisturbed[1])
    assert [each["runs"] for each in found["competitors"]] == [each["runs"] for each in expected["competitors"]]


def test_curves_stay_short():
    records = [
        {"step": n, "tokens": n, "time_s": n, "train_loss": 1.0, "val_bits_per_byte": 2.0 if n % 500 == 0 else None}
        for n in range(1, 5001)
    ]
    curve = race_run.curve_of(records, 3)
    assert 200 <= len(curve) <= 210 and sum(point["val_bits_per_byte"] is not None for point in curve) == 10
    assert curve[-1] == dict(step=5000, tokens=5000, time_s=5000, flops=15000, train_loss=1.0, val_bits_per_byte=2.0)


def test_competitors_in_processes_of_their_own(undisturbed, searched, tokens, tmp_path):
    """As on two GPUs: the same race, in two processes at a time; and one that is stopped with it."""
    folder, environment = tmp_path / "race-words", dict(os.environ, OMP_NUM_THREADS="1")
    field, watcher = enter(tokens), Watcher()
    searched["settings"] |= dict(device="cpu", compile="off", threads=1)
    llama = next(each for each in searched["competitors"] if each["model"] == "llama")
    llama["runs"] = [run for each in undisturbed[1]["competitors"] if each["model"] == "llama" for run in each["runs"]]
    races.begin(folder, searched)

    def run(should_stop):
        race = Race(field, folder, read_race(folder / "race.json"), watcher, "nnx compare", should_stop)
        gather(race)
        run_on_gpus(race, [environment, environment], should_stop)
        return table(read_race(folder / "race.json"))

    with pytest.raises(Stopped):
        run(lambda: (folder / "nyx-1" / "run.json").exists())
    record = read_race(folder / "race.json")
    assert record["state"] == "interrupted" and {each["status"] for each in record["competitors"]} >= {"finished"}
    next(each for each in record["competitors"] if each["model"] == "llama")["runs"].clear()
    write_race(folder, record)
    found, expected = run(lambda: False), table(undisturbed[1])
    for each in (found, expected):
        each["competitors"] = [
            (
                each["model"],
                each["status"],
                each["ties_with"],
                [(run["tokens"], run["bits_per_byte"]) for run in each["runs"]],
            )
            for each in each["competitors"]
        ]
    assert found["competitors"] == expected["competitors"] and found["state"] == "finished"
    assert len([note for note in watcher.notes if "finished at" in note]) == 4
    assert not list(folder.glob("*.part.json"))
