import pytest
import torch

from nnx_cli.config import TrainConfig
from nnx_cli.engine.loss import TrainStep
from nnx_cli.engine.optimizer import (
    build_optimizer,
    load_optimizer_state,
    optimizer_state,
    parameter_groups,
    set_lr,
)
from nnx_cli.errors import CheckpointError

KINDS = ["adamw", "lion"]


def config(kind):
    return TrainConfig(optimizer=kind, lr=1e-3, weight_decay=0.1)


def take_steps(model, optimizer, n, seed=0):
    torch.manual_seed(seed)
    for _ in range(n):
        ids = torch.randint(64, (2, 9))
        loss, count = TrainStep(model)(ids[:, :-1], ids[:, 1:])
        optimizer.zero_grad()
        (loss / count).backward()
        optimizer.step()


def test_matrices_decay_and_vectors_do_not(tiny):
    model = tiny("llama")
    groups = parameter_groups(model, 0.1)
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decay == {id(p): 0.1 if p.dim() >= 2 else 0.0 for p in model.parameters()}


def test_frozen_parameters_are_left_out(tiny):
    model = tiny("llama")
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.dim() < 2)
    (group,) = parameter_groups(model, 0.1)
    assert all(p.dim() < 2 for p in group["params"]) and group["weight_decay"] == 0.0


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


@pytest.mark.parametrize("kind", KINDS)
def test_first_step_has_the_size_of_the_learning_rate(tiny, kind):
    model = tiny()
    optimizer = build_optimizer(model, TrainConfig(optimizer=kind, lr=1e-3, weight_decay=0.0))
    before = [p.detach().clone() for p in model.parameters()]
    take_steps(model, optimizer, 1)
    for old, parameter in zip(before, model.parameters(), strict=True):
        moved = (parameter.detach() - old).abs().max().item()
        assert moved == pytest.approx(1e-3, rel=1e-3)


def test_set_lr_reaches_every_group(tiny):
    optimizer = build_optimizer(tiny(), config("adamw"))
    set_lr(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


@pytest.mark.parametrize("kind", KINDS)
def test_state_survives_a_round_trip(tiny, kind):
    model = tiny()
    optimizer = build_optimizer(model, config(kind))
    take_steps(model, optimizer, 3)
    state = {key: value.clone() for key, value in optimizer_state(optimizer, model).items()}
    fields = {"adamw": {"step", "exp_avg", "exp_avg_sq"}, "lion": {"exp_avg"}}[kind]
    assert state.keys() == {f"{name}.{field}" for name, _ in model.named_parameters() for field in fields}

    twin = tiny()
    twin.load_state_dict(model.state_dict())
    other = build_optimizer(twin, config(kind))
    load_optimizer_state(other, twin, state)
    take_steps(model, optimizer, 3, seed=1)
    take_steps(twin, other, 3, seed=1)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
    ours, theirs = optimizer_state(optimizer, model), optimizer_state(other, twin)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


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


def test_the_state_of_another_model_is_refused(tiny):
    model = tiny()
    optimizer = build_optimizer(model, config("adamw"))
    take_steps(model, optimizer, 1)
    state = optimizer_state(optimizer, model)

    def load(other, state):
        load_optimizer_state(build_optimizer(other, config("adamw")), other, state)

    with pytest.raises(CheckpointError, match="does not belong"):
        load(tiny(dim=64), state)
    with pytest.raises(CheckpointError, match="does not belong"):
        load(tiny("llama"), state)
    with pytest.raises(CheckpointError, match="does not cover"):
        load(model, {key: value for key, value in state.items() if not key.startswith("norm.")})
    with pytest.raises(CheckpointError, match="does not cover"):
        load(model, {key: value for key, value in state.items() if key != "norm.weight.exp_avg"})
