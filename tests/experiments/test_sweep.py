import contextlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SETTINGS, TINY

from nnx_cli.config import TrainConfig
from nnx_cli.errors import CheckpointError, DoesNotFit, MissingFeature, OutputError, UsageError, pip_install
from nnx_cli.experiments import samplers, sweep
from nnx_cli.experiments.folders import make_folder
from nnx_cli.experiments.one_run import Stopped
from nnx_cli.experiments.search_space import Choice, Range
from nnx_cli.experiments.sweep import Conditions, Search, Sweep
from nnx_cli.experiments.sweep_file import change_sweep, read_sweep
from nnx_cli.planning.plan import plan_run
from nnx_cli.runs.find import LOCKS, find_model, list_models
from nnx_cli.runs.run import Run, hold_lock
from nnx_cli.training.observer import Silent

SPACE = {"lr": Range(1e-3, 3e-2, log=True), "n_layers": Choice((1, 2))}
RANDOM = Search(SPACE, "random", 3, 3, seed=1)
HALVING = Search(SPACE, "halving", 4, 2, seed=1)


class Watcher(Silent):
    """Takes note of what a sweep says, and counts its steps."""

    def __init__(self):
        self.notes, self.parts, self.steps = [], [], 0

    def begins(self, what, done, share):
        assert 0 <= done <= done + share < 1.01
        self.parts.append((what, done, share))

    def moved(self, progress):
        self.steps += 1

    def note(self, text):
        self.notes.append(text)


@pytest.fixture(autouse=True)
def short_trials(monkeypatch):
    monkeypatch.setattr(sweep, "LEAST_STEPS", 2)


@pytest.fixture
def conditions(tokens):
    """What trials share; a plan takes fields of a model and settings of training. 12 steps each."""

    def plan(chosen):
        train = {name: value for name, value in chosen.items() if hasattr(TrainConfig, name)}
        fields = TINY | {name: value for name, value in chosen.items() if name not in train}
        if chosen.get("n_layers") == 77:
            raise DoesNotFit("it is too large")
        return plan_run(
            "nyx",
            "nano",
            fields,
            TrainConfig(**(SETTINGS | dict(max_steps=12, save_every=2, val_every=6) | train)),
            vocab_size=tokens.vocab_size,
            train_tokens=len(tokens.train),
            val_tokens=len(tokens.val),
            device=torch.device("cpu"),
            precision="fp32",
            sources={},
        )

    def command(chosen, plan):
        return f"nnx train {chosen}"

    return Conditions(tokens, torch.device("cpu"), plan, command, None, "best")


def begin(folder, record):
    make_folder(folder, "sweep.json", record)


def run_sweep(search, conditions, folder, should_stop=None, changed=lambda record: None):
    """What is left of a sweep in a folder: its record and its watcher."""
    if not folder.exists():
        begin(folder, sweep.new_record(search, conditions, {}, {"max_steps": 12}))
    watcher = Watcher()
    stop = (lambda: should_stop(watcher)) if should_stop else lambda: False
    return Sweep(search, conditions, folder, watcher, stop, changed).run(), watcher


def table(record):
    """What a sweep found, without times and places."""
    left_out = ("time_s", "peak_memory_bytes", "out")
    return [{name: value for name, value in trial.items() if name not in left_out} for trial in record["trials"]]


def test_a_sweep_that_is_stopped_again_and_again_finds_the_same(conditions, workspace):
    seen = []
    whole, _ = run_sweep(HALVING, conditions, Path("whole"), changed=lambda record: seen.append(len(record["trials"])))
    assert whole["state"] == "finished" and set(seen) == {4}
    assert [path.name for path in Path("whole").iterdir() if path.name in (LOCKS, "checkpoints")] == []
    stops = 0
    while True:
        with contextlib.suppress(Stopped):
            cut, _ = run_sweep(HALVING, conditions, Path("cut"), lambda watcher: watcher.steps >= 9)
            break
        stops += 1
    assert stops >= 2
    assert table(cut) == table(whole) and read_sweep(Path("cut")) == cut
    best = whole["trials"][0]
    assert best["status"] == "finished" and best["steps"] == 12 and best["bits_per_byte"] < 6
    assert find_model(best["out"]).config["training"]["lr"] == best["settings"]["lr"]
    assert [(each["status"], each["steps"]) for each in whole["trials"]] == [
        ("finished", 12),
        ("stopped", 6),
        ("stopped", 3),
        ("stopped", 3),
    ]


def test_a_finished_sweep(conditions, workspace):
    folder = Path("weights/sweep-words")
    run_sweep(RANDOM, conditions, folder)
    record, watcher = run_sweep(Search(SPACE, "random", 4, 3, seed=1), conditions, folder)  # one trial more
    assert len(record["trials"]) == 4 and watcher.steps == 12
    record, watcher = run_sweep(RANDOM, conditions, folder)
    assert len(record["trials"]) == 4 and watcher.steps == 0
    (row,) = list_models()
    best = read_sweep(folder)["trials"][0]["bits_per_byte"]
    assert (row["kind"], row["status"], row["best_val_bits_per_byte"]) == ("sweep", "finished", best)
    assert [each["name"] for each in list_models(every=True)] == [
        "sweep-words",
        *(f"sweep-words/00{n}" for n in "1234"),
    ]
    with change_sweep(folder) as record:
        record["state"] = "running"
    assert list_models()[0]["status"] == "interrupted"
    (folder / LOCKS).mkdir()
    with hold_lock(folder / LOCKS / "002"):
        assert list_models()[0]["status"] == "running"
    with pytest.raises(CheckpointError, match="is a sweep of sweep-words/001"):
        find_model("sweep-words")
    assert Run(find_model("sweep-words/001").folder).status()["status"] == "finished"


def test_trials_that_cannot_be_are_rows(conditions, workspace, monkeypatch):
    space = {"n_layers": Choice((1, 77)), "dropout": Choice((0.0, 2.0)), "lr": Choice((0.01,))}
    record, watcher = run_sweep(Search(space, "grid", 4, 3, 1), conditions, Path("s"))
    rows = {tuple(trial["settings"].values())[:2]: trial for trial in record["trials"]}
    assert rows[1, 0.0]["status"] == "finished" and record["trials"][0] is rows[1, 0.0]
    assert rows[77, 0.0]["status"] == rows[77, 2.0]["status"] == "out of memory"
    assert rows[77, 0.0]["problem"] == "it is too large" in watcher.notes[2]
    assert rows[1, 2.0]["status"] == "refused" and "dropout" in rows[1, 2.0]["problem"]
    assert not Path("s", rows[1, 2.0]["trial"]).exists()


def test_a_trial_that_diverges_is_a_row(conditions, workspace):
    space = {"lr": Choice((0.01, 900.0)), "grad_clip": Choice((0.0,))}
    record, _ = run_sweep(Search(space, "grid", 2, 3, 1), conditions, Path("s"))
    good, bad = record["trials"]
    assert good["status"] == "finished" and bad["status"] == "diverged"
    assert bad["bits_per_byte"] is None and "diverged" in bad["problem"] and bad["steps"]
    with change_sweep(Path("s")) as changed:  # a process that was killed between run.json and sweep.json
        next(each for each in changed["trials"] if each["number"] == bad["number"]).update(
            status="paused", problem=None
        )
    again, watcher = run_sweep(Search(space, "grid", 2, 3, 1), conditions, Path("s"))
    assert table(again) == table(record) and watcher.steps == 0


def test_processes_share_the_trials(conditions, workspace, monkeypatch):
    with contextlib.ExitStack() as other:
        begin(Path("s"), sweep.new_record(RANDOM, conditions, {}, {"max_steps": 12}))
        Path("s", LOCKS).mkdir()  # another process is at the first trial, and is killed while we wait for it
        other.enter_context(hold_lock(Path("s", LOCKS, "001")))
        monkeypatch.setattr(sweep.time, "sleep", lambda seconds: other.close())
        record, watcher = run_sweep(RANDOM, conditions, Path("s"))
    assert [note[:9] for note in watcher.notes] == ["trial 002", "trial 003", "trial 001"]
    assert any(what.startswith("waiting") for what, _, _ in watcher.parts)
    assert record["state"] == "finished"


def test_a_trial_that_another_process_did_meanwhile_is_not_done_again(conditions, workspace, monkeypatch):
    def hold(path):
        if path.name == "001":
            with change_sweep(Path("s")) as record:
                trial = next(each for each in record["trials"] if each["number"] == 1)
                trial.update(status="finished", bits_per_byte=1.0, rungs_reached=[1.0])
        return hold_lock(path)

    monkeypatch.setattr(sweep, "hold_lock", hold)
    record, watcher = run_sweep(RANDOM, conditions, Path("s"))
    assert watcher.steps == 24 and record["trials"][0]["bits_per_byte"] == 1.0


def test_locks_may_go_while_one_is_opened(conditions, workspace, monkeypatch):
    """Another process removes them once all trials are over, and this one has read that some are not."""
    gone = []

    def hold(path):
        if not gone:
            gone.append(shutil.rmtree(path.parent))
        return hold_lock(path)

    monkeypatch.setattr(sweep, "hold_lock", hold)
    record, watcher = run_sweep(RANDOM, conditions, Path("s"))
    assert gone and record["state"] == "finished" and watcher.steps == 36
    Path("s", LOCKS).write_text("")  # no folder: what else is wrong is told
    with pytest.raises(OSError), sweep._hold_trial(Path("s", LOCKS, "001")):
        pass


def test_a_sweep_to_which_others_add_trials_at_its_end_is_not_finished(conditions, workspace, monkeypatch):
    """More trials come in the moment between the last look and the end."""
    folder, more = workspace / "s", Search(SPACE, "random", 4, 3, seed=1)
    finish, ends = Sweep._finish, []

    def at_the_end(self):
        if not ends:
            Sweep(more, conditions, folder, Watcher(), lambda: False)._take_over()
        ends.append(finish(self))
        return ends[-1]

    monkeypatch.setattr(Sweep, "_finish", at_the_end)
    record, _ = run_sweep(RANDOM, conditions, folder)
    assert ends[0] is None and len(ends) == 2 and record["state"] == "finished"
    assert [trial["status"] for trial in record["trials"]] == ["finished"] * 4 and not (folder / LOCKS).exists()


def test_a_sweep_is_not_changed_by_two_at_once(conditions, workspace, monkeypatch):
    begin(Path("s"), sweep.new_record(RANDOM, conditions, {}, {"max_steps": 12}))
    (Path("s") / ".tmp-sweep.json-1").write_text("{")  # of one that was killed
    with contextlib.ExitStack() as other:
        assert other.enter_context(hold_lock(Path("s/lock")))
        waits = []
        monkeypatch.setattr(sweep.time, "sleep", lambda seconds: waits.append(other.close()))
        with change_sweep(Path("s")) as record:
            record["state"] = "else"
    assert waits and read_sweep(Path("s"))["state"] == "else"
    assert not [*Path("s").glob(".tmp-*")]
    with contextlib.suppress(ZeroDivisionError), change_sweep(Path("s")) as record:
        record["state"] = "half"
        raise ZeroDivisionError
    assert read_sweep(Path("s"))["state"] == "else"


@pytest.mark.parametrize(
    ("search", "error", "why"),
    [
        (Search({"lr": Choice((0.1, 0.2)), "max_steps": Choice((1,))}, "grid", 2, 3, 1), UsageError, "1 step of"),
        (Search({"lr": Range(0.1, 0.2), "max_steps": Choice((17,))}, "halving", 9, 3, 1), UsageError, "1 step of"),
        (Search({"dropout": Range(2.0, 3.0)}, "random", 3, 3, 1), UsageError, "dropout"),
        (Search({"n_layers": Choice((77,))}, "random", 1, 3, 1), DoesNotFit, "too large"),
    ],
)
def test_a_sweep_of_trials_that_cannot_be_does_not_begin(conditions, search, error, why):
    with pytest.raises(error, match=why):
        sweep.new_record(search, conditions, {}, {})


def test_whose_folder_it_is(conditions, workspace):
    settings = {"lr": [1, 2.5], "model": "nyx"}
    found = sweep.find_sweep(settings, "a", "a CPU", "words", None)
    assert found == (Path("weights/sweep-words"), False)
    begin(found[0], sweep.new_record(RANDOM, conditions, settings, {"max_time": "9s"}) | {"device": "a CPU"})
    path = Path("weights/sweep-words/sweep.json")
    text = conditions.data.fingerprint
    assert sweep.find_sweep(settings, text, "a CPU", "words", None) == (path.parent, True)
    assert sweep.find_sweep(settings, text, "a GPU", "words", None) == (Path("weights/sweep-words-2"), False)
    for changed, why in ((settings | {"model": "n4"}, "its model is nyx"), (settings | {"dim": 3}, "its dim is None")):
        with pytest.raises(OutputError, match=why):
            sweep.find_sweep(changed, text, "a CPU", "words", path.parent)
    with pytest.raises(OutputError, match="its text differs"):
        sweep.find_sweep(settings, "b", "a CPU", "words", path.parent)
    for damage, why in (
        ({"format": 2}, "sweep format 2"),
        ({"trials": [3]}, "is no object"),
        ({"trials": [{"number": "1"}]}, "its number"),
        ({"state": 3}, "its state"),
        ({"format": None}, "is no sweep"),
    ):
        path.write_text(json.dumps(json.loads(path.read_text()) | damage))
        with pytest.raises(CheckpointError, match=why):
            read_sweep(path.parent)
        with pytest.raises(OutputError, match="exists already, and is no sweep"):
            sweep.find_sweep(settings, text, "a CPU", "words", path.parent)
        path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 1, "trials": [], "state": "running"}))


def test_tpe_learns_from_its_trials_and_goes_on_alike():
    pytest.importorskip("optuna", reason="an extra: pip install 'nnx-cli[sweep]'")
    space = SPACE | {"dropout": Range(0.0, 0.3, step=0.1), "dim": Range(32, 128, log=True, whole=True)}

    def search(n):
        known = []
        for _ in range(n):
            chosen = samplers.suggest(space, known, 20, 1)
            assert chosen not in [settings for settings, _, _ in known]
            assert all(space[name].rounded(chosen[name]) == chosen[name] for name in ("lr", "dropout", "dim"))
            bits = None if chosen["lr"] > 0.02 else abs(chosen["lr"] - 0.004) * 100 + chosen["dropout"]
            known.append((chosen, bits, True))
        return known

    known = search(16)
    assert search(9) == known[:9]
    late = sum(bits if bits is not None else 3 for _, bits, _ in known[8:]) / 8
    assert late < sum(bits if bits is not None else 3 for _, bits, _ in known[:8]) / 8
    running = samplers.suggest(space, [*known, (known[0][0] | {"lr": 0.001}, None, False)], 20, 1)
    assert running.keys() == space.keys()
    small = {"dim": Choice((32, 64)), "report": Choice((True, False))}
    taken = [(settings, 1.0, True) for settings in samplers.grid(small)][:3]
    assert samplers.suggest(small, taken, 4, 1) == {"dim": 64, "report": False}


def test_tpe_without_its_library(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(MissingFeature) as refused:
        samplers.check_tpe()
    assert refused.value.exit_code == 7 and refused.value.fix == pip_install("nnx-cli[sweep]")
