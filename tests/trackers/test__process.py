"""Trackers that fail, hang and die: each is dropped with one warning, and the run is what it would be without."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from trackers.fake import CALLS

from nnx_cli.errors import Interrupted
from nnx_cli.trackers import _process
from nnx_cli.trackers._process import Tracking

HERE = Path(__file__).parent


@pytest.fixture
def fakes(workspace, monkeypatch):
    """Makes modules of fake trackers, which fail at a place in some way; has what they were told."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(workspace), str(HERE)]))
    monkeypatch.setenv("CALLS", str(workspace))

    def make(*places):
        for where, how in places:
            Path(f"{how}_{where}.py").write_text(f"import fake\nstart = fake.at({where!r}, {how!r})\n")
        return [f"{how}_{where}" for where, how in places]

    def told(where, how):
        path = Path(f"{where}-{how}.jsonl")
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    make.told = told
    return make


@pytest.fixture
def said():
    return {"notes": [], "warnings": []}


def track(folder, modules, said, begin=0):
    return Tracking(folder, modules, begin, said["notes"].append, said["warnings"].append)


@pytest.fixture
def tracked(run):
    """A finished run with a sample and a page."""
    (run.folder / "samples.jsonl").write_text('{"step": 20, "prompt": "a", "text": "b\\u0007"}\n')
    (run.folder / "report.html").write_text("<html><figure><h3>Loss</h3>\n</figure> no <figure class=wide>2</figure>")
    return run


def test_a_tracker_is_told_everything_once(tracked, fakes, said):
    with track(tracked.folder, fakes(("nowhere", "never")), said):
        pass
    calls = fakes.told("nowhere", "never")
    records = [json.loads(line) for line in (tracked.folder / "metrics.jsonl").read_text().splitlines()]
    assert [call[0] for call in calls] == [
        "start",
        "rewind",
        *["scalars"] * len(records),
        "sample",
        "figures",
        "finish",
    ]
    assert calls[1] == ["rewind", 0]
    assert [call[1] for call in calls if call[0] == "scalars"] == [record["step"] for record in records]
    assert calls[-3:] == [
        ["sample", 20, "a", "b\x07"],
        ["figures", 40, ["<figure><h3>Loss</h3>\n</figure>", "<figure class=wide>2</figure>"]],
        ["finish", 0],
    ]
    assert said == {"notes": ["never_nowhere: http://nowhere"], "warnings": []}


def test_a_run_that_goes_on_is_the_same_run(tracked, fakes, said):
    modules, log = fakes(("nowhere", "never")), tracked.folder / "metrics.jsonl"
    with track(tracked.folder, modules, said):
        pass
    first = fakes.told("nowhere", "never")
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(line for line in lines if json.loads(line)["step"] <= 20))
    with track(tracked.folder, modules, said, begin=20), open(log, "a") as file:
        file.write('{"step": 25, "train_loss": 1.5}\n')
    calls = fakes.told("nowhere", "never")[len(first) :]
    assert calls[0][:2] == first[0][:2], "another id"
    assert calls[1:3] == [["rewind", 20], ["scalars", 25, {"train/loss": 1.5, "train/global_step": 25.0}]]
    assert [call[0] for call in calls[3:]] == ["figures", "finish"]


def test_what_raises_or_dies_is_dropped_with_one_warning(tracked, fakes, said):
    places = [*((where, "raise") for where in CALLS), ("scalars", "exit"), ("finish", "exit")]
    modules = fakes(*places)
    with track(tracked.folder, [*modules, "no_such_module"], said):
        pass
    assert len(said["warnings"]) == len(places) + 1
    for module in [*modules, "no_such_module"]:
        (warning,) = [line for line in said["warnings"] if line.startswith(f"{module} is dropped: ")]
        assert warning.endswith("; metrics.jsonl has all of its numbers") and "\n" not in warning
        why = {"exit": "its process ended with code 3", "raise": "RuntimeError: no such server"}
        assert why.get(module.partition("_")[0], "ModuleNotFoundError") in warning


def test_what_hangs_is_dropped_and_nothing_of_it_stays(tracked, fakes, said, monkeypatch):
    monkeypatch.setattr(_process, "END_SECONDS", 1.5)
    modules = fakes(*((where, "sleep") for where in CALLS), ("finish", "spin"))
    tracking = track(tracked.folder, modules, said)
    with tracking:
        processes = [each.process for each in tracking.processes]
        began = time.monotonic()
    assert time.monotonic() - began < 10 and all(process.returncode is not None for process in processes)
    assert sorted(line.partition(" ")[0] for line in said["warnings"]) == sorted(modules)
    assert all("is dropped: not done" in line for line in said["warnings"])


def test_what_hung_before_the_end_is_not_waited_for(tracked, fakes, said, monkeypatch):
    monkeypatch.setattr(_process, "SILENT_SECONDS", 0.5)
    with track(tracked.folder, fakes(("scalars", "sleep")), said) as tracking:
        (process,) = tracking.processes
        until = time.monotonic() + 20
        while "place" not in process.heard and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(0.6)
    assert len(said["warnings"]) == 1 and "no answer for" in said["warnings"][0]


def test_a_run_that_was_stopped_waits_less(tracked, fakes, said, monkeypatch):
    monkeypatch.setattr(_process, "STOP_SECONDS", 0.1)
    with pytest.raises(Interrupted), track(tracked.folder, fakes(("finish", "sleep")), said):
        raise Interrupted("stopped")
    assert len(said["warnings"]) == 1 and "not done 0 s after the run" in said["warnings"][0]


def test_a_second_ctrl_c_is_not_kept_waiting(tracked, fakes, said):
    with pytest.raises(KeyboardInterrupt), track(tracked.folder, fakes(("nowhere", "never")), said) as tracking:
        (process,) = tracking.processes
        raise KeyboardInterrupt
    assert not said["warnings"] and process.process.wait(20) == 0 and fakes.told("nowhere", "never")[-1][0] == "finish"


def test_what_does_not_answer_for_long_is_dropped_on_the_way(tracked, fakes, said, monkeypatch):
    with track(tracked.folder, fakes(("scalars", "sleep")), said) as tracking:
        monkeypatch.setattr(_process, "PATIENCE_SECONDS", 0.2)
        until = time.monotonic() + 20
        while tracking.processes and time.monotonic() < until:
            time.sleep(0.05)
            tracking.step({}, 0.5)
        assert len(said["warnings"]) == 1 and "no answer for" in said["warnings"][0] and not tracking.processes


def test_a_step_costs_a_look_and_no_call(tracked, fakes, said, monkeypatch):
    """Nothing is sent on the way: the log is what trackers read."""
    with track(tracked.folder, fakes(("nowhere", "never")), said) as tracking:
        (process,) = tracking.processes
        looked = []
        monkeypatch.setattr(process, "trouble", lambda: looked.append(1))
        monkeypatch.setattr(process.process, "poll", lambda: looked.append(2))
        for step in range(100):
            tracking.moved(step / 100)
        assert not looked
        tracking.step({"step": 1}, 0.1)
        assert looked == [1, 2]
        monkeypatch.undo()


def test_a_run_with_a_tracker_that_fails_is_the_run_without(start, fakes, said, workspace):
    modules = fakes(("scalars", "raise"), ("start", "raise"))
    numbers = {}
    for name, taken in (("without", []), ("with", modules)):
        run, trainer = start(Path(name))
        with track(run.folder, taken, said) as tracking:
            trainer.observer = trainer.journal.observer = tracking
            with run.lock():
                assert trainer.train(run, lambda: False) == "finished"
        lines = [json.loads(line) for line in Path(name, "metrics.jsonl").read_text().splitlines()]
        numbers[name] = [(line["step"], line["train_loss"], line["val_loss"]) for line in lines]
    assert numbers["with"] == numbers["without"] and len(said["warnings"]) == 2


WATCHED = """
import sys, time
from pathlib import Path
from nnx_cli.trackers._process import Tracking
with Tracking(Path(sys.argv[1]), sys.argv[2:], 0, print, print) as tracking:
    while not all("place" in each.heard for each in tracking.processes):
        time.sleep(0.02)
    print(*(each.process.pid for each in tracking.processes), flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_what_follows_a_run_that_was_killed_ends_too(tracked, fakes):
    tracked.set_status(status="running")
    words = [sys.executable, "-c", WATCHED, tracked.folder, *fakes(("nowhere", "never"))]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    pid = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.wait()
    ended = time.monotonic() + 10
    while (calls := fakes.told("nowhere", "never"))[-1][0] != "finish":
        assert time.monotonic() < ended
        time.sleep(0.05)
    assert calls[-1] == ["finish", 1]
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]:
        assert time.monotonic() < ended
        time.sleep(0.05)
