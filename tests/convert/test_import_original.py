import argparse
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nnx_cli import models
from nnx_cli.convert.import_original import import_checkpoint
from nnx_cli.errors import CheckpointError
from nnx_cli.runs.load import ModelRef, load_model

CASES = Path(__file__).parents[1] / "models"
IDS = torch.arange(16)[None] * 7 % 64


@pytest.fixture
def original(tiny, workspace):
    """A NYX, and its tensors under its original's names."""
    model = tiny("nyx", ffn_dim=64)
    return model, {name: tensor.clone() for name, tensor in models.reference_tensors(model).items()}


def imported(content, name="nyx"):
    """Notes on importing a checkpoint of `content`, and the model that it became."""
    torch.save(content, "x.pth")
    shutil.rmtree("out", ignore_errors=True)
    _, notes = import_checkpoint(name, Path("x.pth"), Path("out"))
    return notes, load_model(ModelRef(Path("out")), torch.device("cpu"))


def refusal(content, name="nyx"):
    """What importing a checkpoint of `content` is refused with."""
    with pytest.raises(CheckpointError) as error:
        imported(content, name)
    assert not Path("out").exists()
    return error.value


def under(prefix, weights):
    return {prefix + name: tensor for name, tensor in weights.items()}


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "module.",
        "_orig_mod.module.",
        "module._orig_mod.",
        "net.",
        "model.",
        "_fsdp_wrapped_module.gpt.",
        "a.b.c.d.",
    ],
)
@pytest.mark.parametrize(
    "wrappers", ["", "model", "state_dict", "weights model_state_dict", "ema", "checkpoint params model", "0"]
)
def test_weights_are_found_wherever_they_are(original, prefix, wrappers):
    model, weights = original
    content = under(prefix, weights)
    for wrapper in reversed(wrappers.split()):
        content = {"epoch": 3, wrapper: content}
    notes, found = imported(content)
    assert (found(IDS) - model(IDS)).abs().max() < 1e-5 and not notes


@pytest.mark.parametrize("name", ["n4", "neon", "ngpt", "tape"])
def test_weights_of_every_original_are_found(workspace, name):
    entry = json.loads((CASES / f"{name}.parity.json").read_text())["cases"]
    case = next(case for case in entry.values() if case["file"] == f"{name}.parity.safetensors")
    prefix, tensors = case["weights_prefix"], load_file(CASES / case["file"])
    weights = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    expected = models.load_reference(name, models.infer_reference(name, weights), weights).state_dict()
    notes, found = imported({"args": argparse.Namespace(), "net": under("module.", weights)}, name)
    state = found.state_dict()
    assert state.keys() == expected.keys() and all(state[key].equal(expected[key]) for key in expected)
    assert notes[-1].endswith("objects of argparse.Namespace")


def test_a_whole_model_is_read_without_its_class(original):
    model, weights = original
    theirs = torch.nn.Module()
    for name, tensor in weights.items():
        *path, last = name.split(".")
        place = theirs
        for part in path:
            if part not in dict(place.named_children()):
                place.add_module(part, torch.nn.Module())
            place = getattr(place, part)
        place.register_parameter(last, torch.nn.Parameter(tensor))
    _, found = imported(theirs)
    assert (found(IDS) - model(IDS)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("taken", "other"),
    [("model", "ema"), ("weights", "model_ema"), ("student", "teacher"), ("net", "swa_model"), ("ema", "exp_avg")],
)
def test_of_several_weights_the_newest_are_taken_and_that_is_said(original, taken, other):
    model, weights = original
    zeros = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    for content in ({taken: weights, other: zeros}, {other: under("module.", zeros), taken: weights}):
        notes, found = imported(content)
        assert (found(IDS) - model(IDS)).abs().max() < 1e-5
        assert f"those at {taken}.* are taken, not {other}." in notes[0] and len(notes) == 1


def test_weights_that_are_not_all_there_give_way_to_others(original):
    model, weights = original
    content = {"model": {"token_embedding.weight": torch.zeros(64, 32)}, "ema": weights}
    notes, found = imported(content)
    assert (found(IDS) - model(IDS)).abs().max() < 1e-5 and "those at ema.* are taken" in notes[0]


@pytest.mark.parametrize(
    ("beside", "note"),
    [
        ({"n_averaged": torch.tensor(3)}, "left out of x.pth: the tensor n_averaged"),
        ({"lm_head.weight": torch.zeros(64, 32), "criterion.weight": torch.ones(3)}, "2 tensors (lm_head.weight, …)"),
        ({"layers.0.func.mask": torch.ones(8, 8, dtype=torch.bool)}, "layers.0.func.mask"),
        ({"odd": torch.eye(3).to_sparse()}, "odd, which is of layout sparse_coo"),
        ({"optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}}, "optimizer.state.0.exp_avg"),
        ({"broken": torch.tensor([float("nan")])}, "broken"),
    ],
)
def test_tensors_beside_the_weights_are_left_out_and_named(original, beside, note):
    model, weights = original
    notes, found = imported(weights | beside)
    assert (found(IDS) - model(IDS)).abs().max() < 1e-5 and note in notes[0]


def test_so_are_those_of_a_safetensors_file(original):
    _, weights = original
    save_file(under("model.", weights) | {"step": torch.tensor(3)}, "x.safetensors")
    _, notes = import_checkpoint("nyx", Path("x.safetensors"), Path("out"))
    assert notes == ["left out of x.safetensors: the tensor step"]


def test_what_cannot_be_mapped_is_named_with_file_tensor_and_shape(original):
    _, weights = original
    bias = {"layers.1.func.attn_output_proj.bias": torch.zeros(32)}
    assert str(refusal(weights | bias)) == ("x.pth: layers.1.func.attn_output_proj.bias (32,) has no place in this nyx")
    lacks = {k: v for k, v in weights.items() if k != "layers.1.func.norm_layer.gamma"}
    assert "x.pth, at net.*: " in str(refusal({"net": lacks}))
    assert "'layers.1.func.norm_layer.gamma' is missing" in str(refusal(lacks))
    output = "layers.0.func.attn_output_proj.weight"
    renamed = {("layers.0.func.attn_out.weight" if k == output else k): v for k, v in weights.items()}
    assert str(refusal(under("net.", renamed))) == (
        f"x.pth, at net.*: this is no checkpoint of nyx: '{output}' is missing; the most like it is "
        "net.layers.0.func.attn_out.weight (32, 32)"
    )
    shape = weights | {"norm_layer.gamma": torch.zeros(5)}
    assert "(5,)" in str(refusal(shape)) and "(32,)" in str(refusal(shape))
    whole = weights | {"norm_layer.gamma": torch.zeros(32, dtype=torch.int8)}
    assert "norm_layer.gamma is of torch.int8" in str(refusal(whole))
    sparse = weights | {"token_embedding.weight": weights["token_embedding.weight"].to_sparse()}
    assert str(refusal(sparse)) == "x.pth: token_embedding.weight is of layout sparse_coo"
    inner = "layers.0.func.feedforward_net.2.weight"
    assert f"{inner} is of layout sparse_coo" in str(refusal(weights | {inner: weights[inner].to_sparse()}))
    nan = weights | {"norm_layer.gamma": torch.full((32,), float("nan"))}
    assert "norm_layer.gamma has elements that are not finite" in str(refusal(nan))


def test_a_checkpoint_of_another_model_says_what_it_holds(original):
    _, weights = original
    error = refusal({"wte.weight": torch.zeros(3, 4)})
    assert str(error) == (
        "x.pth is no checkpoint of nyx: no tensor is called token_embedding.weight; the first is wte.weight (3, 4)"
    )
    assert refusal({"net": weights}, "n4").fix == "nnx import --model nyx x.pth"
