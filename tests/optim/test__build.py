import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import nnx_cli
from nnx_cli.config import TrainConfig
from nnx_cli.errors import CheckpointError
from nnx_cli.kernels import optimizer_step
from nnx_cli.layers.loss import LossModule
from nnx_cli.optim._base import set_lr
from nnx_cli.optim._build import build_optimizer, names
from nnx_cli.optim._groups import cast_matrices, hidden_matrices
from nnx_cli.optim._state import load_optimizer_state, optimizer_state
from nnx_cli.optim.adamw import AdamW
from nnx_cli.optim.adamw8bit import AdamW8bit
from nnx_cli.optim.lion import RoundedLion
from nnx_cli.optim.wolf import Wolf

KINDS = names()
STORED = ["fp32", "bf16"]


def config(kind, **fields):
    return TrainConfig(**(dict(optimizer=kind, lr=1e-3, weight_decay=0.1) | fields))


def built(model, kind, stored="fp32", **fields):
    cast_matrices(model, stored)
    return build_optimizer(model, config(kind, weight_precision=stored, **fields))


def set_gradients(model, seed=0):
    draw = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=draw).to(p.dtype)


def take_steps(model, optimizer, n, seed=0):
    torch.manual_seed(seed)
    for _ in range(n):
        ids = torch.randint(64, (2, 9))
        loss, count = LossModule(model)(ids[:, :-1], ids[:, 1:])
        optimizer.zero_grad()
        (loss / count).backward()
        optimizer.step()


def snapshot(model, optimizer):
    tensors = {**model.state_dict(), **{f"state {k}": v for k, v in optimizer_state(optimizer, model).items()}}
    return {
        name: tensor.detach().clone().contiguous().view(torch.uint8) if tensor.dim() else tensor.clone()
        for name, tensor in tensors.items()
    }


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_is_in_one_group_and_keeps_its_decay(tiny, kind):
    model = tiny("tape", dim=96)
    groups = build_optimizer(model, config(kind)).param_groups
    decay = [(p, group["weight_decay"]) for group in groups for p in group["params"]]
    assert len(decay) == len({id(p) for p, _ in decay}) == len(list(model.parameters()))
    assert all(value == (0.1 if p.dim() >= 2 else 0.0) for p, value in decay)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_gradient_shrinks_matrices_only(tiny, kind):
    model = tiny()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, config(kind))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 1 - 1e-3 * 0.1 if parameter.dim() >= 2 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit", "lion"])
def test_first_step_has_the_size_of_the_learning_rate(tiny, kind):
    model = tiny()
    optimizer = build_optimizer(model, TrainConfig(optimizer=kind, lr=1e-3, weight_decay=0.0))
    before = [p.detach().clone() for p in model.parameters()]
    take_steps(model, optimizer, 1)
    for old, parameter in zip(before, model.parameters(), strict=True):
        moved = (parameter.detach() - old).abs().max().item()
        assert moved == pytest.approx(1e-3, rel=1e-3)


def test_beta2_reaches_adamw(tiny):
    assert build_optimizer(tiny(), config("adamw", beta2=0.95)).param_groups[0]["betas"] == (0.9, 0.95)
    assert build_optimizer(tiny(), config("lion", beta2=0.95)).param_groups[0]["betas"] == (0.9, 0.99)


def test_set_lr_reaches_every_group(tiny):
    optimizer = build_optimizer(tiny(), config("adamw"))
    set_lr(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
    tensor = optimizer.param_groups[0]["lr"] = torch.zeros(())
    set_lr(optimizer, 0.5)
    assert tensor == 0.5 and optimizer.param_groups[0]["lr"] is tensor, "a graph reads this tensor"


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("kind", KINDS)
def test_found_inf_leaves_every_bit(tiny, kind, stored):
    model = tiny("llama", dim=64)
    optimizer = built(model, kind, stored)
    take_steps(model, optimizer, 2)
    before = snapshot(model, optimizer)
    set_gradients(model)
    for p in model.parameters():
        p.grad.view(-1)[0], p.grad.view(-1)[-1] = float("nan"), float("inf")
    for shape in ((), (1,)):
        optimizer.found_inf = torch.ones(shape)
        optimizer.step()
        assert same(before, snapshot(model, optimizer))
    set_gradients(model)
    optimizer.found_inf = torch.zeros(())
    optimizer.step()
    assert not same(before, snapshot(model, optimizer))


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("kind", KINDS)
def test_the_decision_on_the_device_leaves_every_bit_too(tiny, kind, stored):
    """As where `found_inf` cannot be read without waiting: `update` gets it as a tensor."""
    model = tiny("llama", dim=64)
    optimizer = built(model, kind, stored)
    take_steps(model, optimizer, 2)
    with torch.no_grad():
        for p in hidden_matrices(model):
            p.view(-1)[:2] = torch.tensor([0.0, -0.0])

    def update(found_inf):
        with torch.no_grad():
            for group in optimizer.param_groups:
                optimizer.update(group["params"], group, torch.tensor(found_inf))

    before = snapshot(model, optimizer)
    set_gradients(model)
    for p in model.parameters():
        p.grad.view(-1)[-3:] = float("nan")
    update(1.0)
    assert same(before, snapshot(model, optimizer))

    twin = copy.deepcopy(model)
    other = built(twin, kind, stored)
    load_optimizer_state(other, twin, {k: v.clone() for k, v in optimizer_state(optimizer, model).items()})
    set_gradients(model, 1)
    set_gradients(twin, 1)
    update(0.0)
    other.step()
    assert same(snapshot(model, optimizer), snapshot(twin, other))


FIELDS = {
    "adamw": {"step", "exp_avg", "exp_avg_sq"},
    "adamw8bit": {"step", "exp_avg", "exp_avg_sq"},
    "lion": {"exp_avg"},
    "muon": {"step", "exp_avg", "exp_avg_sq", "momentum"},
    "wolf": {"momentum"},
}


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("kind", KINDS)
def test_state_survives_a_round_trip(tiny, kind, stored):
    model = tiny(dim=64)
    optimizer = built(model, kind, stored, seed=3)
    take_steps(model, optimizer, 3)
    state = {key: value.clone() for key, value in optimizer_state(optimizer, model).items()}
    fields = {key.rpartition(".")[2] for key in state}
    if kind in FIELDS:
        assert fields - {"step", "exp_avg_scale", "exp_avg_sq_scale"} == FIELDS[kind] - {"step"}
    assert ("exp_avg_scale" in fields) == (kind == "adamw8bit")

    twin = tiny(dim=64)
    cast_matrices(twin, stored)
    twin.load_state_dict(model.state_dict())
    other = built(twin, kind, stored, seed=3)
    load_optimizer_state(other, twin, state)
    take_steps(model, optimizer, 3, seed=1)
    torch.rand(7)
    take_steps(twin, other, 3, seed=1)
    assert same(snapshot(model, optimizer), snapshot(twin, other))


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_weights_are_rounded_by_the_seed(tiny, kind):
    results = []
    for seed in (0, 0, 1):
        model = tiny()
        optimizer = built(model, kind, "bf16", seed=seed)
        take_steps(model, optimizer, 2)
        results.append(snapshot(model, optimizer))
    assert same(results[0], results[1]) and not same(results[0], results[2])


@pytest.mark.parametrize("kind", KINDS)
def test_dropping_a_field_would_show(tiny, kind):
    """The negative control of the round trip: without its moments an optimizer goes elsewhere."""
    model, twin = tiny(), tiny()
    optimizer, other = build_optimizer(model, config(kind)), build_optimizer(twin, config(kind))
    take_steps(model, optimizer, 3)
    twin.load_state_dict(model.state_dict())
    take_steps(model, optimizer, 1, seed=1)
    take_steps(twin, other, 1, seed=1)
    assert not torch.equal(model.embedding.weight, twin.embedding.weight)


def test_a_fresh_optimizer_has_an_empty_state(tiny):
    model = tiny()
    state = optimizer_state(build_optimizer(model, config("adamw")), model)
    assert state == {}
    load_optimizer_state(build_optimizer(model, config("adamw")), model, state)


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_of_another_model_is_refused(tiny, kind):
    model = tiny(dim=64)
    optimizer = build_optimizer(model, config(kind))
    take_steps(model, optimizer, 1)
    state = optimizer_state(optimizer, model)

    def load(other, state):
        load_optimizer_state(build_optimizer(other, config(kind)), other, state)

    with pytest.raises(CheckpointError, match="does not belong"):
        load(tiny(dim=96), state)
    with pytest.raises(CheckpointError, match="does not belong"):
        load(tiny("llama", dim=64), state)
    with pytest.raises(CheckpointError, match="does not cover"):
        load(model, {key: value for key, value in state.items() if not key.startswith("norm.")})
    for key, value in state.items():
        with pytest.raises(CheckpointError, match="does not cover"):
            load(model, {other: tensor for other, tensor in state.items() if other != key})
        for lie in (value[None], value.double(), torch.zeros(3, dtype=value.dtype)):
            with pytest.raises(CheckpointError, match="does not belong"):
                load(model, state | {key: lie})
    with pytest.raises(CheckpointError, match="does not belong"):
        load(model, state | {"norm.weight.exp_avg_new": torch.zeros(64)})


@pytest.mark.parametrize(
    ("kind", "stored", "wanted"),
    [
        ("adamw", "fp32", 8.0),
        ("adamw", "bf16", 8.0),
        ("adamw8bit", "fp32", 2.04),
        ("adamw8bit", "bf16", 2.04),
        ("lion", "fp32", 4.0),
        ("lion", "bf16", 2.0),
        ("muon", "fp32", 4.0),
        ("muon", "bf16", 2.0),
        ("wolf", "fp32", 4.0),
    ],
)
def test_bytes_of_state(kind, stored, wanted, tiny):
    """On matrices of blocks, and in all: what `state_specs` says before there is any is what there is."""
    model = tiny("llama", dim=64, n_layers=1)
    optimizer = built(model, kind, stored)
    promised = sum(
        size.numel() * dtype.itemsize for spec in optimizer.state_specs().values() for size, dtype in spec.values()
    )
    take_steps(model, optimizer, 1)
    state = [t for fields in optimizer.state.values() for t in fields.values()]
    assert promised == sum(t.numel() * t.element_size() for t in state)
    for p in hidden_matrices(model):
        held = sum(t.numel() * t.element_size() for t in optimizer.state[p].values())
        assert held / p.numel() == pytest.approx(wanted, abs=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_state_is_known_without_memory(tiny, kind):
    specs = []
    for device in ("meta", "cpu"):
        with torch.device(device):
            model = tiny("llama", dim=64)
        specs.append([*build_optimizer(model, config(kind)).state_specs().values()])
    assert specs[0] == specs[1]


@pytest.mark.parametrize("kind", [AdamW8bit, AdamW, RoundedLion, Wolf])
def test_pieces_make_no_difference(monkeypatch, kind):
    """Parameters are worked on in pieces; 8-bit blocks and random bits do not depend on where they end."""
    results = []
    for piece in (2**17, 512):
        monkeypatch.setitem(optimizer_step.PIECE, "cpu", piece)
        torch.manual_seed(0)
        model = nn.Linear(700, 3, bias=False, dtype=torch.bfloat16)
        optimizer = kind(model.parameters(), lr=0.1, weight_decay=0.1)
        for _ in range(3):
            model.weight.grad = torch.randn_like(model.weight)
            optimizer.step()
        results.append(snapshot(model, optimizer))
    assert same(*results)


@pytest.fixture(scope="module")
def plain_losses():
    """Where optimizers end with float32 everywhere, by their names."""
    return {}


@pytest.mark.parametrize(
    ("kind", "stored", "like"),
    [
        ("adamw8bit", "fp32", "adamw"),
        ("adamw8bit", "bf16", "adamw"),
        ("adamw", "bf16", "adamw"),
        ("muon", "bf16", "muon"),
        ("lion", "bf16", "lion"),
    ],
)
def test_what_saves_memory_trains_as_well(tiny, plain_losses, kind, stored, like):
    """The loss of one batch after 40 steps is within 2 % of that with float32 everywhere."""

    def final(kind, stored):
        model = tiny("llama", dim=64)
        optimizer = built(model, kind, stored, lr={"muon": 2e-3}.get(kind, 1e-3), weight_decay=0.0)
        ids = torch.randint(64, (8, 33), generator=torch.Generator().manual_seed(0))
        for _ in range(40):
            loss, count = LossModule(model)(ids[:, :-1], ids[:, 1:])
            optimizer.zero_grad()
            (loss / count).backward()
            optimizer.step()
        return (loss / count).item()

    plain = plain_losses[like] if like in plain_losses else plain_losses.setdefault(like, final(like, "fp32"))
    assert 0.5 < plain < 3.5, "neither untrained nor at the end of what can be learned"
    assert final(kind, stored) == pytest.approx(plain, rel=0.02)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("kind", KINDS)
def test_the_state_dict_of_torch_keeps_every_bit(tiny, kind, stored):
    """Torch alone would cast 8-bit codes, and moments beside bfloat16 weights, to the type of the weights."""
    model, twin = tiny("llama", dim=64), tiny("llama", dim=64)
    optimizer, other = built(model, kind, stored), built(twin, kind, stored)
    take_steps(model, optimizer, 3)
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert same(snapshot(model, optimizer), snapshot(twin, other))
    take_steps(model, optimizer, 2, seed=1)
    take_steps(twin, other, 2, seed=1)
    assert same(snapshot(model, optimizer), snapshot(twin, other))


@pytest.mark.parametrize("kind", KINDS)
def test_a_distributed_checkpoint_takes_it(tiny, kind):
    model, twin = tiny("llama", dim=64), tiny("llama", dim=64)
    optimizer, other = built(model, kind), built(twin, kind)
    take_steps(model, optimizer, 3)
    state = get_optimizer_state_dict(model, optimizer)
    assert {f"{name}.{field}" for name, fields in state["state"].items() for field in fields} == {
        *optimizer_state(optimizer, model)
    }
    twin.load_state_dict(model.state_dict())
    set_optimizer_state_dict(twin, other, state)
    assert same(snapshot(model, optimizer), snapshot(twin, other))


@pytest.mark.parametrize("kind", KINDS)
def test_a_scheduler_of_torch_and_a_closure_move_it(tiny, kind):
    model = tiny("llama")
    optimizer = build_optimizer(model, config(kind))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    before = model.embedding.weight.detach().clone()

    def closure():
        loss = model(torch.arange(8)[None]).square().mean()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0
    assert not torch.equal(before, model.embedding.weight)
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [5e-4] * len(optimizer.param_groups)


SGD = """
from nnx_cli.optim._base import DeviceOptimizer
from nnx_cli.optim._groups import parameter_groups


class Sgd(DeviceOptimizer):
    def state_spec(self, p, group):
        return {}

    def update(self, parameters, group, found_inf):
        for p in parameters:
            p.sub_(p.grad * group["lr"] * (1.0 if found_inf is None else 1 - found_inf))


def build(model, config):
    return Sgd(parameter_groups(model, config.weight_decay), {"lr": config.lr})
"""


COMMANDS = """
import json, sys
from typer.testing import CliRunner
from nnx_cli.cli import app

done = [CliRunner().invoke(app, words) for words in json.load(sys.stdin)]
print(json.dumps([(each.exit_code, each.output) for each in done]))
"""


def test_a_file_in_the_folder_is_an_optimizer(tmp_path, token_path):
    shutil.copytree(Path(nnx_cli.__file__).parent, tmp_path / "nnx_cli", ignore=shutil.ignore_patterns("*.pyc.*"))
    (tmp_path / "nnx_cli" / "optim" / "sgd.py").write_text(SGD)
    shape = "--model llama --n-layers 1 --dim 32 --n-heads 2 --seq-len 16"
    length = "--max-steps 20 --lr 0.1 --device cpu --threads 1 --compile off --sample-every 0"
    train = ["train", "--data", str(token_path), "--optimizer"]
    lines = [["train", "--help"], ["summarize", "--help"], [*train, "sdg"]]
    lines += [[*train, "sgd", "--out", "run", *shape.split(), *length.split()]]
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "COLUMNS": "200"}
    process = dict(input=json.dumps(lines), env=environment, cwd=tmp_path, capture_output=True, text=True)
    done = subprocess.run([sys.executable, "-c", COMMANDS], **process)
    assert done.returncode == 0, done.stderr
    *helped, refused, trained = json.loads(done.stdout)
    assert [code for code, _ in helped] == [0, 0] and trained[0] == 0, trained[1]
    assert all("muon, sgd, wolf" in " ".join(text.split()) for _, text in helped)
    assert refused[0] == 2 and "did you mean sgd?" in refused[1]
    losses = [json.loads(line).get("val_loss") for line in (tmp_path / "run" / "metrics.jsonl").open()]
    losses = [loss for loss in losses if loss is not None]
    assert losses[-1] < losses[0]
