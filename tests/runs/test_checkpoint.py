import errno
import itertools
import json
import os
from dataclasses import replace

import pytest
import torch

from nnx_cli.errors import CheckpointError, OutputError
from nnx_cli.runs import checkpoint as ckpt
from nnx_cli.runs.checkpoint import Checkpoint
from nnx_cli.system import files


def make(step=5, **tensors):
    model = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4)} | tensors
    optimizer = {"a.exp_avg": torch.full((2, 3), 0.5), "a.step": torch.tensor(3.0)}
    counters = {"step": step, "tokens": 64, "time_s": 1.5, "scaler": {}, "best_val_loss": None}
    return Checkpoint(step, model, optimizer, {"format": 1} | counters)


@pytest.fixture
def folder(tmp_path):
    ckpt.save_checkpoint(tmp_path, make())
    return tmp_path


ALL = [*ckpt.FILES, "manifest.json"]


def test_round_trip(folder):
    loaded = ckpt.load_checkpoint(folder, 5)
    wanted = make()
    assert loaded.step == 5 and loaded.state == wanted.state
    for ours, theirs in ((loaded.model, wanted.model), (loaded.optimizer, wanted.optimizer)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)


def test_layout_is_public(folder):
    assert [path.name for path in folder.iterdir()] == ["step-00000005"]
    assert sorted(path.name for path in (folder / "step-00000005").iterdir()) == sorted(ALL)
    manifest = json.loads((folder / "step-00000005" / "manifest.json").read_text())
    assert manifest["format"] == 1 and manifest["files"].keys() == set(ckpt.FILES)
    for name, digest in manifest["files"].items():
        assert files.sha256_file(folder / "step-00000005" / name) == digest


@pytest.mark.skipif(os.name != "posix", reason="permissions are those of POSIX")
def test_files_have_the_usual_permissions(folder):
    umask = os.umask(0)
    os.umask(umask)
    for name in ALL:
        assert (folder / "step-00000005" / name).stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("name", ckpt.FILES)
def test_any_flipped_bit_is_refused(folder, name):
    path = folder / "step-00000005" / name
    data = bytearray(path.read_bytes())
    for place in {0, 7, len(data) // 2, len(data) - 1}:
        for bit in (0, 6):
            damaged = bytearray(data)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            with pytest.raises(CheckpointError, match=f"{name} is damaged"):
                ckpt.load_checkpoint(folder, 5)


def test_any_flipped_bit_of_the_manifest_is_refused_or_harmless(folder):
    path = folder / "step-00000005" / "manifest.json"
    data = path.read_bytes()
    refused = 0
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        try:
            assert torch.equal(ckpt.load_checkpoint(folder, 5).model["a"], make().model["a"])
        except CheckpointError:
            refused += 1
    assert refused > 150, "all but white space"


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("keep", [0, 1, 40, -1])
def test_a_truncated_file_is_refused(folder, name, keep):
    path = folder / "step-00000005" / name
    path.write_bytes(path.read_bytes()[:keep] if keep >= 0 else path.read_bytes().rstrip()[:-1])
    with pytest.raises(CheckpointError):
        ckpt.load_checkpoint(folder, 5)


@pytest.mark.parametrize("name", ALL)
def test_an_extended_file_is_refused(folder, name):
    path = folder / "step-00000005" / name
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(CheckpointError):
        ckpt.load_checkpoint(folder, 5)


@pytest.mark.parametrize("name", ALL)
def test_a_missing_file_is_refused(folder, name):
    (folder / "step-00000005" / name).unlink()
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        ckpt.load_checkpoint(folder, 5)


@pytest.mark.parametrize("name", ALL)
def test_a_folder_in_place_of_a_file_is_refused(folder, name):
    path = folder / "step-00000005" / name
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError):
        ckpt.load_checkpoint(folder, 5)


@pytest.mark.parametrize("name", ["tokens", "time_s", "scaler"])
def test_counters_that_lack_one_are_refused(tmp_path, name):
    whole = make()
    ckpt.save_checkpoint(tmp_path, replace(whole, state={k: v for k, v in whole.state.items() if k != name}))
    with pytest.raises(CheckpointError, match=f"state.json is damaged: it lacks '{name}'"):
        ckpt.load_checkpoint(tmp_path, 5)


def test_swapped_files_are_refused(folder):
    ckpt.save_checkpoint(folder, make(7, a=torch.zeros(2, 3)))
    os.replace(folder / "step-00000007" / "model.safetensors", folder / "step-00000005" / "model.safetensors")
    with pytest.raises(CheckpointError, match="model.safetensors is damaged"):
        ckpt.load_checkpoint(folder, 5)


@pytest.mark.skipif(os.name != "posix", reason="making symbolic links needs a privilege elsewhere")
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_a_symbolic_link_is_refused(folder, name):
    path = folder / "step-00000005" / name
    path.rename(folder / name)
    path.symlink_to(folder / name)
    with pytest.raises(CheckpointError, match="link"):
        ckpt.load_checkpoint(folder, 5)


@pytest.mark.parametrize(
    "content",
    [
        {"format": 2, "files": {}},
        {"files": {}},
        {"format": 1},
        {"format": 1, "files": []},
        {"format": 1, "files": {"model.safetensors": 5}},
        [],
        3,
        None,
    ],
    ids=str,
)
def test_a_manifest_of_another_kind_is_refused(folder, content):
    (folder / "step-00000005" / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError):
        ckpt.load_checkpoint(folder, 5)


def test_a_newer_format_names_both_versions(folder):
    path = folder / "step-00000005" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    with pytest.raises(CheckpointError, match="has format 2; this version of nnx reads format 1"):
        ckpt.load_checkpoint(folder, 5)


def test_saving_again_replaces_a_checkpoint(folder):
    ckpt.save_checkpoint(folder, make(a=torch.zeros(2, 3)))
    assert ckpt.load_checkpoint(folder, 5).model["a"].sum() == 0


def test_steps_are_found_by_their_folders(folder):
    for name in ("step-00000012", "step-000000123", "step-7", "step-x", ".tmp-step-00000003-9", "step-00000013.bak"):
        (folder / name).mkdir()
    assert ckpt.steps_in(folder) == [5, 12, 123]
    assert ckpt.steps_in(folder / "nowhere") == []


def test_pruning_keeps_the_newest(tmp_path):
    for step in (0, 3, 11, 200):
        ckpt.save_checkpoint(tmp_path, make(step))
    (tmp_path / "notes.txt").write_text("mine")
    ckpt.prune_checkpoints(tmp_path, 2, 200)
    assert ckpt.steps_in(tmp_path) == [11, 200]
    ckpt.prune_checkpoints(tmp_path, 2, 200)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "step-00000011", "step-00000200"]


def test_pruning_never_prefers_a_damaged_future(tmp_path):
    """After going back from a damaged checkpoint, the intact one just written stays, even where one is kept."""
    for step in (10, 20, 40):
        ckpt.save_checkpoint(tmp_path, make(step))
    ckpt.prune_checkpoints(tmp_path, 1, 20)
    assert ckpt.steps_in(tmp_path) == [20]


CALLS = ["mkdir", "fsync", "rename"]


def test_a_refused_call_leaves_no_trace(tmp_path, monkeypatch):
    """The disk is full at the n-th call that touches it, for every n: nothing is half there, and what was is intact."""
    ckpt.save_checkpoint(tmp_path, make(3))
    for number in itertools.count(1):
        calls = 0

        def failing(real, number=number):
            def call(*args, **options):
                nonlocal calls
                calls += 1
                if calls == number:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return real(*args, **options)

            return call

        with monkeypatch.context() as patch:
            for name in CALLS:
                patch.setattr(os, name, failing(getattr(os, name)))
            try:
                ckpt.save_checkpoint(tmp_path, make(9))
            except OutputError as error:
                assert "disk full" in str(error)
        assert ckpt.load_checkpoint(tmp_path, 3).state["step"] == 3
        assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")], number
        for step in ckpt.steps_in(tmp_path):
            assert ckpt.load_checkpoint(tmp_path, step).state["step"] == step, "what is there is whole"
        if calls < number:
            break
    assert number > 8
    assert ckpt.steps_in(tmp_path) == [3, 9]


@pytest.mark.skipif(os.name != "posix", reason="limits of file sizes are those of POSIX")
def test_a_full_disk_is_named(tmp_path):
    """A real refusal by the system, inside the library that writes tensors."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(OutputError, match="disk full while writing"):
            ckpt.save_checkpoint(tmp_path, make(9, big=torch.zeros(100_000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
