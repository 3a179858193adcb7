"""Every architecture through a run: interrupted and resumed, and with adapters."""

import copy

import pytest
import torch

from nnx_cli import models
from nnx_cli.errors import UsageError
from nnx_cli.layers.lora import add_adapters, check_rank, merge_adapters, remove_adapters
from nnx_cli.runs.run import Run
from nnx_cli.training import session
from nnx_cli.training.observer import Silent

NAMES = models.names()


def train(run, trainer, stop_at):
    with run.lock():
        trainer.train(run, lambda: trainer.state.step >= stop_at)


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_ends_with_the_same_bits(start, workspace, name):
    settings = dict(max_steps=6, val_every=3, save_every=2, batch_size=2, grad_accum=2)
    whole, trainer = start(workspace / "whole", name, **settings)
    train(whole, trainer, 6)
    run, trainer = start(workspace / "parts", name, **settings)
    train(run, trainer, 3)
    train(run, session.resume(session.plan_restart(Run(run.folder), {}), Silent())[0], 6)
    ends = [r.newest_checkpoint()[0] for r in (whole, run)]
    for kind in ("model", "optimizer"):
        one, other = (getattr(end, kind) for end in ends)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", NAMES)
def test_adapters_are_added_trained_merged_and_removed(tiny, name):
    model = tiny(name)
    ids = torch.randint(64, (2, 16))
    base, state = model(ids), {key: value.clone() for key, value in model.state_without_ties().items()}
    add_adapters(model, 4)
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert trained and all(key.endswith(("lora_a", "lora_b")) for key in trained)
    assert (model(ids) - base).abs().max() < 1e-5  # they begin with nothing
    optimizer = torch.optim.SGD(trained.values(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
    model.eval()
    adapted, merged = model(ids), copy.deepcopy(model)
    assert (adapted - base).abs().max() > 1e-4
    merge_adapters(merged)
    assert (merged(ids) - adapted).abs().max() < 1e-4
    remove_adapters(model)
    assert model.state_without_ties().keys() == state.keys() == merged.state_without_ties().keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_without_ties().items())


@pytest.mark.parametrize("name", NAMES)
def test_a_rank_that_is_not_low_is_refused(tiny, name):
    model = tiny(name)
    add_adapters(model, 3)
    sides = [
        min(layer.lora_b.shape[0], layer.in_features)
        for layer in model.modules()
        if hasattr(layer, "lora_b") and layer.lora_b is not None
    ]
    check_rank(model, 3)
    for rank in (max(sides), 5000):
        with pytest.raises(UsageError, match=f"--lora-rank {rank} is no low rank"):
            check_rank(model, rank)
    with pytest.raises(UsageError) as error:
        check_rank(model, 5000)
    check_rank(model, int(error.value.fix.split()[2]))
