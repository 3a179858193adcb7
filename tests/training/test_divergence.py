import math
import random

import pytest
import torch

from nnx_cli import models
from nnx_cli.training.divergence import FAMILIAR, LossSpikeDetector, first_overflow


def losses(n, seed=0):
    """A loss that falls and jitters."""
    draw = random.Random(seed)
    return [1.5 + 3 * math.exp(-i / 60) + draw.gauss(0, 0.05) for i in range(n)]


@pytest.mark.parametrize("seed", range(5))
def test_an_ordinary_run_has_no_spikes(seed):
    detector = LossSpikeDetector()
    assert not any(detector.update(loss) for loss in losses(300, seed))


@pytest.mark.parametrize("height", [0.8, 3.0, 100.0])
def test_a_jump_is_a_spike_and_stays_one(height):
    detector = LossSpikeDetector()
    for loss in losses(200):
        detector.update(loss)
    assert detector.update(1.6 + height) and detector.update(1.6 + height), "the first does not make the second usual"
    assert not detector.update(1.6)


def test_a_loss_that_stays_high_becomes_usual():
    detector = LossSpikeDetector()
    for loss in losses(200):
        detector.update(loss)
    reported = [detector.update(3.0) for _ in range(200)]
    assert reported[0] and not reported[-1]


def test_a_run_just_begun_has_no_usual_loss():
    detector = LossSpikeDetector()
    assert not any(detector.update(loss) for loss in [5.0, 50.0] * (FAMILIAR // 2))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return models.build("llama", dim=32, n_layers=3, n_heads=2, seq_len=16)


IDS = torch.arange(16)[None]


def test_a_weight_that_is_not_finite_is_named(model):
    model.blocks[1].mlp.down.weight.data[0, 0] = math.nan
    assert first_overflow(model, IDS, IDS) == "blocks.1.mlp.down.weight has elements that are not finite"


def test_the_first_layer_that_overflows_is_named(model):
    model.blocks[1].mlp.down.weight.data.fill_(3e38)
    model.blocks[1].mlp.gate_up.weight.data.fill_(1e3)
    assert first_overflow(model, IDS, IDS) == "the output of blocks.1.mlp.down is the first that is not finite"
    assert all(p.grad is None for p in model.parameters())


def test_a_gradient_that_is_not_finite_is_named(model):
    model.blocks[2].attention.register_full_backward_pre_hook(lambda module, grads: (grads[0] * math.inf,))
    named = first_overflow(model, IDS, IDS)
    assert named.startswith("the gradient of blocks.2.attention") and named.endswith("is the first that is not finite")


def test_a_sound_model_has_nothing_to_name(model):
    assert first_overflow(model, IDS, IDS) == "now everything is finite"
