import json
import os
import subprocess
import sys

import pytest
import torch

from nnx_cli.errors import CheckpointError, OutputError
from nnx_cli.runs import checkpoint as ckpt
from nnx_cli.runs import run as run_module
from nnx_cli.runs.find import find_model
from nnx_cli.runs.load import load_model
from nnx_cli.runs.run import Run, live_status
from nnx_cli.system import files

CPU = torch.device("cpu")


class Crash(BaseException):
    """The machine loses power: no handler for ordinary errors runs."""


def crash_at(monkeypatch, number):
    """Stop at the n-th call that changes a folder; returns a list that grows with every call."""
    calls = []

    def wrap(name):
        real = getattr(os, name)

        def call(*args, **options):
            calls.append(name)
            if len(calls) == number:
                raise Crash
            return real(*args, **options)

        return call

    for name in ("replace", "fsync", "rename"):
        monkeypatch.setattr(os, name, wrap(name))
    return calls


def weights_sum(ref):
    return float(sum(tensor.double().sum() for tensor in ref.weights()[1].values()))


# creation


def test_a_new_run_can_be_resumed(start, workspace):
    run, trainer = start(workspace / "weights" / "new")
    checkpoint, notes = run.newest_checkpoint()
    assert checkpoint.step == 0 and notes == []
    assert sorted(path.name for path in run.folder.iterdir()) == [
        "checkpoints",
        "config.json",
        "manifest.json",
        "metrics.jsonl",
        "run.json",
        "samples.jsonl",
        "tokenizer.json",
    ]
    assert find_model(str(run.folder)).weights()[0].parent.name == "step-00000000"
    assert all(torch.equal(checkpoint.model[key], value) for key, value in trainer.model.state_without_ties().items())


def test_a_folder_that_exists_is_left_alone(start, workspace):
    (workspace / "mine").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        start(workspace / "mine")
    assert list((workspace / "mine").iterdir()) == []


def test_config_has_every_value_and_no_place_of_this_machine(run):
    config = run.config
    assert None not in (config["training"][key] for key in ("lr", "batch_size", "grad_accum", "max_steps"))
    assert config["training"]["optimizer"] == "muon" and config["training"]["precision"] == "fp32"
    assert config["model"]["name"] == "nyx" and config["model"]["ffn_dim"] > 0
    assert not os.path.isabs(config["data"]["folder"])
    assert (run.folder / config["data"]["folder"]).resolve() == (run.folder.parents[1] / "data" / "words").resolve()
    for name in ("config.json", "run.json", "manifest.json"):
        assert os.path.expanduser("~") not in (run.folder / name).read_text()
        assert str(run.folder.resolve()) not in (run.folder / name).read_text()


def test_manifest_lists_what_a_model_needs(run):
    manifest = files.read_json(run.folder / "manifest.json")
    assert manifest["files"].keys() == {"config.json", "model.safetensors", "tokenizer.json"}
    for name, digest in manifest["files"].items():
        assert files.sha256_file(run.folder / name) == digest
    assert "replacing" not in manifest


# replacing files


@pytest.mark.parametrize("number", range(1, 11))
def test_replacing_the_best_weights_survives_a_crash(run, monkeypatch, number):
    before = weights_sum(find_model("words"))
    state = {key: value + 1 for key, value in find_model("words").weights()[1].items()}
    with monkeypatch.context() as patch:
        calls = crash_at(patch, number)
        with pytest.raises(Crash):
            run.save_best(state)
    assert len(calls) == number
    after = float(sum(tensor.double().sum() for tensor in state.values()))
    assert weights_sum(find_model("words")) in (before, after)
    load_model(find_model("words"), CPU)
    again = Run(run.folder)
    with again.lock():
        again.set_config(again.config | {"note": 1})  # what resuming does
    assert weights_sum(find_model("words")) in (before, after), "another file was replaced since"
    with again.lock():
        again.save_best(state)
    assert weights_sum(find_model("words")) == after
    assert not list(run.folder.glob(".tmp-*"))


@pytest.mark.parametrize("number", range(1, 8))
def test_the_first_best_weights_survive_a_crash(start, workspace, monkeypatch, number):
    run, trainer = start(workspace / "weights" / "new")
    first = trainer.model.state_without_ties()
    with monkeypatch.context() as patch:
        crash_at(patch, number)
        with pytest.raises(Crash):
            run.save_best({key: value + 1 for key, value in first.items()})
    path, _ = find_model("new").weights()
    assert path.parent.name in ("new", "step-00000000")
    load_model(find_model("new"), CPU)
    run.set_config(run.config | {"note": 1})
    load_model(find_model("new"), CPU)


@pytest.mark.parametrize("number", range(1, 10))
def test_replacing_the_config_survives_a_crash(run, monkeypatch, number):
    old = run.config
    with monkeypatch.context() as patch:
        crash_at(patch, number)
        with pytest.raises(Crash):
            run.set_config(old | {"note": 1})
    assert Run(run.folder).config in (old, old | {"note": 1})
    Run(run.folder).set_config(old | {"note": 2})
    assert Run(run.folder).config == old | {"note": 2}


@pytest.mark.parametrize("second", range(1, 10))
def test_two_crashes_in_a_row_are_survived(run, monkeypatch, second):
    """The weights are replaced, their listing is not; then, resuming, replacing the config stops anywhere."""
    state = {key: value + 1 for key, value in find_model("words").weights()[1].items()}
    after = float(sum(tensor.double().sum() for tensor in state.values()))
    for number, change in ((8, lambda: run.save_best(state)), (second, lambda: run.set_config(run.config | {"x": 1}))):
        with monkeypatch.context() as patch:
            crash_at(patch, number)
            with pytest.raises(Crash):
                change()
    assert weights_sum(find_model("words")) == after
    run.save_best(state)
    Run(run.folder).set_config(run.config)
    assert "replacing" not in files.read_json(run.folder / "manifest.json")
    assert weights_sum(find_model("words")) == after


def test_a_full_disk_leaves_the_old_status(run, monkeypatch):
    before = run.status()

    def full(path, data):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_synced", full)
        with pytest.raises(OutputError, match="disk full"):
            run.set_status(step=99)
    assert run.status() == before
    run.set_status(step=99)
    assert run.status() == before | {"step": 99}


def test_run_json_keeps_the_order_of_its_keys(run):
    before = list(run.status())
    run.set_status(step=99)
    assert sorted(run.status()) == sorted(before) and list(run.status())[:3] == ["format", "status", "step"]


# damage


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_an_altered_file_is_refused(run, name):
    path = run.folder / name
    data = path.read_bytes()
    path.write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        ref = find_model("words")
        assert ref.tokenizer is not None
        load_model(ref, CPU)


def test_a_config_edited_by_hand_is_refused(run):
    path = run.folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"note": "mine"}))
    with pytest.raises(CheckpointError, match="config.json is damaged"):
        Run(run.folder)


@pytest.mark.parametrize("name", ["manifest.json", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_files_of_nonsense_are_refused(run, name, content):
    (run.folder / name).write_bytes(content)
    with pytest.raises(CheckpointError):
        ref = find_model("words")
        assert ref.tokenizer is not None
        load_model(ref, CPU)


def resign(folder, **changes):
    """Edit config.json and its checksum: what somebody who writes files on purpose would do."""
    config = files.read_json(folder / "config.json")
    for key, value in changes.items():
        config[key] = value
    (folder / "config.json").write_bytes(files.to_json(config))
    manifest = files.read_json(folder / "manifest.json")
    manifest["files"]["config.json"] = files.sha256_file(folder / "config.json")
    (folder / "manifest.json").write_bytes(files.to_json(manifest))


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 2},
        {"format": "1"},
        {"model": None},
        {"model": {"name": "os"}},
        {"model": {"name": "_base"}},
        {"model": {"name": "../nyx"}},
        {"model": {"name": ["nyx"]}},
        {"model": {"name": "nyx", "dim": -1}},
        {"model": {"name": "nyx", "wheels": 4}},
        {"model": {"name": "nyx", "dim": "32"}},
        {"model": {"name": "nyx", "dim": 64, "n_heads": 2, "n_layers": 2}},
    ],
    ids=str,
)
def test_a_config_that_describes_no_model_is_refused(run, changes):
    resign(run.folder, **changes)
    with pytest.raises(CheckpointError):
        load_model(find_model("words"), CPU)


def test_a_damaged_checkpoint_is_passed_over(run):
    steps = ckpt.steps_in(run.checkpoints)
    assert len(steps) == 2
    (run.checkpoints / f"step-{steps[-1]:08d}" / "optimizer.safetensors").write_bytes(b"no")
    checkpoint, notes = run.newest_checkpoint()
    assert checkpoint.step == steps[0]
    assert len(notes) == 1 and "damaged" in notes[0] and "going back" in notes[0]
    (run.checkpoints / f"step-{steps[0]:08d}" / "state.json").unlink()
    with pytest.raises(CheckpointError, match="no intact checkpoint") as refusal:
        run.newest_checkpoint()
    assert "going back" not in str(refusal.value)
    assert refusal.value.fix == f"start from its best weights: nnx train --init-from {run.folder}"


# the lock


HOLD = """
import sys, time
from pathlib import Path
from nnx_cli.runs.run import Run
with Run(Path(sys.argv[1])).lock():
    print("locked", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize(("written_at", "said"), [(0, "process 77"), (3, "process 77"), (None, "another process")])
def test_who_holds_a_folder_may_write_its_name_a_moment_later(tmp_path, monkeypatch, written_at, said):
    path, waits = tmp_path / "lock", []

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) == written_at:
            path.write_text("77")

    path.write_text("77" if written_at == 0 else "")
    monkeypatch.setattr(run_module.time, "sleep", sleep)
    monkeypatch.setattr(run_module, "_try_lock", lambda file: False)
    with pytest.raises(OutputError, match=f"is in use by {said}$"), run_module.hold_folder(tmp_path):
        raise AssertionError("it is held")
    assert sum(waits) < 1


def test_one_writer_at_a_time(run):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(OutputError, match=f"in use by process {holder.pid}"), run.lock():
            raise AssertionError("two processes hold the lock")
        run.set_status(status="running")
        assert live_status(run.folder, run.status()) == "running"
        holder.kill()
        holder.wait()
        assert live_status(run.folder, run.status()) == "interrupted"
        with run.lock():
            pass
    finally:
        holder.kill()
        holder.wait()
        holder.stdin.close()
        holder.stdout.close()


def test_the_lock_holder_sweeps_what_a_crash_left(run):
    (run.folder / ".tmp-best-1").write_text("x")
    for name in (".tmp-step-00000007-1", ".del-step-00000003"):
        (run.checkpoints / name).mkdir()
    with run.lock():
        assert [path.name for path in run.checkpoints.iterdir() if path.name.startswith(".")] == []
    assert not list(run.folder.glob(".tmp-*"))


def test_the_lock_is_free_after_an_error(run):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), run.lock():
            raise ZeroDivisionError
    with run.lock():
        pass
