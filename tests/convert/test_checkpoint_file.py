import argparse
import builtins
import collections
import dataclasses
import datetime
import enum
import os
import pathlib
import re
import subprocess
import types

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from nnx_cli.convert.checkpoint_file import read_checkpoint
from nnx_cli.errors import CheckpointError

WEIGHT = torch.arange(6.0).view(2, 3)


class AttributeDict(dict):
    """What Lightning and others keep hyperparameters in."""


class History(list):
    pass


class Mode(enum.Enum):
    FAST = "fast"


@dataclasses.dataclass
class Settings:
    lr: float = 1e-3


Step = collections.namedtuple("Step", "number weights")


def optimizer():
    """One that has taken a step, and a schedule that holds it."""
    layer = torch.nn.Linear(2, 2)
    made = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(2)).sum().backward()
    made.step()
    return torch.optim.lr_scheduler.CosineAnnealingLR(made, 3)


def averages():
    found = collections.defaultdict(list)
    found["loss"].append(2.5)
    return found


BESIDE = {
    "numpy scalar": np.float64(2.5),
    "numpy array": np.ones(3),
    "numpy generator": np.random.default_rng(0),
    "random state": np.random.get_state(),
    "namespace": argparse.Namespace(lr=1e-3, sizes=[np.int64(2)]),
    "simple namespace": types.SimpleNamespace(a=1),
    "dataclass": Settings(),
    "enum": Mode.FAST,
    "path": pathlib.PurePosixPath("runs/1"),
    "date": datetime.datetime(2024, 1, 2),
    "optimizer and schedule": optimizer(),
    "state of both": [optimizer().state_dict(), optimizer().optimizer.state_dict()],
    "default dict": averages(),
    "own dict": AttributeDict(a=AttributeDict(b=1)),
    "deque": collections.deque([1, 2], maxlen=3),
    "own list": History([1, 2]),
    "class": Settings,
    "function": print,
}


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize("what", BESIDE)
def test_what_stands_beside_the_weights_is_passed_over(tmp_path, what, archive):
    content = {"first": BESIDE[what], "model": {"w": WEIGHT}, "last": [BESIDE[what]]}
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=archive)
    assert read_checkpoint(tmp_path / "x.pth").tensors["model.w"].equal(WEIGHT)


def test_objects_that_are_passed_over_are_named(tmp_path):
    torch.save({"w": WEIGHT, "a": argparse.Namespace(x=1), "b": [Settings(), Settings()]}, tmp_path / "x.pth")
    assert read_checkpoint(tmp_path / "x.pth").objects == ["argparse.Namespace", f"{__name__}.Settings"]


class Bomb:
    def __init__(self, function, *arguments):
        self.made = function, arguments

    def __reduce__(self):
        return self.made


class Setter:
    """Its state would be written to a file."""

    def __init__(self, path):
        self.path = path

    def __setstate__(self, state):
        pathlib.Path(state["path"]).write_text("went off")


def bombs(canary):
    code = f"open({str(canary)!r}, 'w')"
    return {
        "eval": Bomb(eval, code),
        "exec": Bomb(builtins.exec, code),
        "open": Bomb(open, str(canary), "w"),
        "process": Bomb(subprocess.Popen, ["touch", str(canary)]),
        "method": Bomb(pathlib.Path.write_text, canary, "x"),
        "state": Setter(str(canary)),
        "chain": Bomb(getattr, Bomb(__import__, "os"), "system"),
        "load": Bomb(torch.load, str(canary)),
        "apply": Bomb(map, eval, [code]),
        "nested": {"config": [Bomb(eval, code), {"deep": Setter(str(canary))}]},
    }


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize("what", bombs(pathlib.Path("x")))
def test_nothing_beside_the_weights_is_run(tmp_path, what, archive):
    canary = tmp_path / "canary"
    torch.save(
        {"model": {"w": WEIGHT}, "x": bombs(canary)[what]}, tmp_path / "x.pth", _use_new_zipfile_serialization=archive
    )
    if what == "method" or (what == "apply" and not archive):  # no class stands in for a call of what a call gave
        with pytest.raises(CheckpointError, match=r"holds (builtins.getattr|map), which the safe loader refuses"):
            read_checkpoint(tmp_path / "x.pth")
    else:
        assert read_checkpoint(tmp_path / "x.pth").tensors["model.w"].equal(WEIGHT)
    assert not canary.exists()


def test_what_the_safe_loader_will_not_stand_in_for_is_named(tmp_path):
    canary = tmp_path / "canary"
    torch.save({"w": WEIGHT, "x": Bomb(os.system, f"touch {canary}")}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=rf"x.pth holds {os.name}\.system, .* nothing in it was run"):
        read_checkpoint(tmp_path / "x.pth")
    assert not canary.exists()


def test_the_loader_is_as_strict_as_before_afterwards(tmp_path):
    before = set(torch.serialization.get_safe_globals())
    torch.save({"w": WEIGHT, "x": argparse.Namespace()}, tmp_path / "x.pth")
    read_checkpoint(tmp_path / "x.pth")
    assert set(torch.serialization.get_safe_globals()) == before


def test_tensors_have_the_names_of_their_place(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.BatchNorm1d(2)))
    torch.save({"net": module, "steps": [Step(3, {"w": WEIGHT})]}, tmp_path / "x.pth")
    names = set(read_checkpoint(tmp_path / "x.pth").tensors)
    assert names == {f"net.{name}" for name in module.state_dict()} | {"steps.0.1.w"}


@pytest.mark.filterwarnings("ignore")
def test_tensors_of_other_kinds_are_told_apart(tmp_path):
    odd = {
        "sparse": torch.eye(3).to_sparse(),
        "rows": torch.eye(3).to_sparse_csr(),
        "small": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        "blank": torch.empty(3, device="meta"),
    }
    torch.save(odd | {"w": WEIGHT, "half": WEIGHT.bfloat16(), "view": WEIGHT.T}, tmp_path / "x.pth")
    found = read_checkpoint(tmp_path / "x.pth")
    assert found.tensors.keys() == {"w", "half", "view"} and found.tensors["view"].equal(WEIGHT.T)
    assert found.odd == {
        "sparse": "of layout sparse_coo",
        "rows": "of layout sparse_csr",
        "small": "quantized",
        "blank": "on the device meta, without elements",
    }


def test_a_file_without_end_is_refused(tmp_path):
    itself = {"w": WEIGHT}
    itself["self"] = itself
    torch.save(itself, tmp_path / "x.pth")
    assert read_checkpoint(tmp_path / "x.pth").tensors["w"].equal(WEIGHT)
    laughs = [WEIGHT]
    for _ in range(40):
        laughs = [laughs, laughs]
    torch.save(laughs, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="damaged"):
        read_checkpoint(tmp_path / "x.pth")


def script(path):
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(2)), path)


def run_folder(path):
    path.mkdir()
    (path / "config.json").touch()
    (path / "manifest.json").touch()


def parts(path):
    path.mkdir()
    save_file({"w": WEIGHT}, path / "model-00001-of-00002.safetensors")


NO_CHECKPOINTS = {
    "folder.pth": (lambda path: path.mkdir(), "is a folder, not the file"),
    "a run": (run_folder, "nnx sample"),
    "parts": (parts, "such as .*model-00001-of-00002.safetensors"),
    "pytorch_model.bin.index.json": (lambda path: path.write_text("{}"), "index of a checkpoint in several files"),
    "pointer.pth": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "script.pt": (script, "TorchScript"),
    "noise.pth": (lambda path: path.write_bytes(b"noise"), "no checkpoint of tensors"),
    "empty.safetensors": (lambda path: path.write_bytes(b""), "no checkpoint of tensors"),
    "zip.pt": (lambda path: np.savez(open(path, "wb"), a=np.ones(2)), "is a zip archive, no checkpoint"),
    "protocol.pth": (lambda path: torch.save({"w": WEIGHT}, path, pickle_protocol=4), "none of pickle protocol 2"),
    "settings.pth": (lambda path: torch.save(Settings(), path), r"no tensors beside objects of .*\.Settings"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NO_CHECKPOINTS)
def test_what_is_no_checkpoint_is_called_by_its_name(tmp_path, name):
    make, message = NO_CHECKPOINTS[name]
    make(tmp_path / name)
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(tmp_path / name)
    assert re.search(message, f"{error.value} {error.value.fix}")
