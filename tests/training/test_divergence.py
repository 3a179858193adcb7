import math
import random
import re

import pytest
import torch

from nnx_cli import models
from nnx_cli.training.divergence import FAMILIAR, LossCourse, LossSpikeDetector, first_overflow


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


GUESSING = math.log(256)


def course(train, val, best_at=None):
    """Records of a run that logs every tenth step, validates with every third of them and at the end."""
    records = [{"step": 10 * i + 1, "train_loss": loss, "val_loss": None} for i, loss in enumerate(train)]
    for i, loss in zip([*range(0, len(train) - 1, 3), len(train) - 1], val, strict=True):
        records[i]["val_loss"] = loss
    return LossCourse.of(records)


def why(train, val, n_used=60):
    return course(train, val).why_diverged(256, lambda: n_used)


def falls(start, end, n=31):
    return [end + (start - end) * math.exp(-6 * i / n) for i in range(n)]


DIVERGED = {
    "89 at the end": ([5.6, 30.0, 150.0, 89.0], [5.6, 89.0], "89.00, and guessing costs 4.09"),
    "above guessing": ([5.6, 5.7, 6.0, 6.2], [5.6, 6.2], "6.20, and guessing costs 5.55"),
    "never came back to what the text's own letters cost": (
        [5.6, 40.0, *falls(30, 4.5, 8)],
        [5.6, 9.0, 6.0, 4.5],
        "4.50, and guessing costs 4.09",
    ),
    "lost what it knew": (
        [*falls(5.6, 1.5, 15), *[3.9, 4.1] * 8],
        [*falls(5.6, 1.6, 5), 4.0, 4.1, 4.0, 4.0, 4.0, 4.0],
        "rose from .* at step 121 to 4.00, and the training loss with it",
    ),
    "an adapter that forgot its base": ([1.5, 7.0, 4.0, 3.9], [4.2, 3.9], "began at 1.50 and ended at 3.90"),
    "no finite number": (falls(5.6, 1.5, 4), [5.0, None], "no finite number"),
    "never a finite number": ([5.6, 5.0, 4.0, 4.0], [None, None], "no finite number"),
}


@pytest.mark.parametrize("name", DIVERGED)
def test_losses_that_went_wrong(name):
    train, val, words = DIVERGED[name]
    assert re.search(words, why(train, val))


SOUND = {
    "an ordinary run": (falls(5.6, 1.5), falls(5.6, 1.7, 11)),
    "one step": ([5.6], [5.58]),
    "a few steps of a rising rate": ([5.55, 5.6, 5.7, 5.8], [5.6, 5.85]),
    "a rate too low to learn anything": ([5.6, 5.58] * 50, [5.59] * 34),
    "a text that is known by heart": (falls(5.6, 0.05), [*falls(5.6, 1.9, 5), 2.4, 2.8, 3.2, 3.5, 3.8, 4.2]),
    "known by heart from the first epoch on": (
        falls(0.9, 0.01),
        [1.5, 2.0, 2.4, 2.8, 3.0, 3.1, 3.1, 3.2, 3.2, 3.2, 3.3],
    ),
    "noisy batches": ([5.6, *[0.5, 3.0, 1.0, 2.6, 0.4] * 6], [5.0, *[1.8, 1.9] * 5]),
    "a spike that healed": ([5.6, 3.0, 40.0, *falls(6, 1.5, 28)], [5.0, 20.0, *falls(4, 1.6, 9)]),
    "a base on text that it never saw": ([8.0, 7.8, 7.5, 7.0], [7.9, 6.9]),
    "other text than it was trained on": (falls(5.6, 1.0), [5.6, 3.0, 2.5, 3.0, 3.1, 3.2, 3.3, 3.4, 3.4, 3.4, 3.45]),
}


@pytest.mark.parametrize("name", SOUND)
def test_losses_that_are_no_divergence(name):
    assert why(*SOUND[name]) is None


def test_overfitting_is_told_from_divergence():
    assert course(*SOUND["a text that is known by heart"]).overfitted
    assert (
        not course(*SOUND["an ordinary run"]).overfitted and not course(*DIVERGED["lost what it knew"][:2]).overfitted
    )


def test_a_run_without_a_log_is_not_judged():
    assert LossCourse.of([]) is None and LossCourse.of([{"step": 1, "train_loss": None, "val_loss": None}]) is None
