import math

import pytest

from nnx_cli.training.schedule import lr_at


def lr(step, progress, schedule="linear", min_lr=0.0, warmup_steps=0):
    return lr_at(step, progress, schedule=schedule, lr=1.0, min_lr=min_lr, warmup_steps=warmup_steps)


@pytest.mark.parametrize(
    ("schedule", "progress", "wanted"),
    [
        ("linear", 0.0, 1.0),
        ("linear", 0.25, 0.75),
        ("linear", 0.5, 0.5),
        ("linear", 1.0, 0.0),
        ("cosine", 0.0, 1.0),
        ("cosine", 0.25, 0.5 * (1 + math.sqrt(0.5))),
        ("cosine", 0.5, 0.5),
        ("cosine", 1.0, 0.0),
        ("wsd", 0.0, 1.0),
        ("wsd", 0.6, 1.0),
        ("wsd", 0.7, 0.75),
        ("wsd", 0.8, 0.5),
        ("wsd", 1.0, 0.0),
        ("constant", 0.0, 1.0),
        ("constant", 0.7, 1.0),
        ("constant", 1.0, 1.0),
    ],
)
def test_values_without_warmup(schedule, progress, wanted):
    assert lr(500, progress, schedule) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize(("schedule", "half"), [("linear", 0.55), ("cosine", 0.55), ("wsd", 1.0)])
def test_min_lr_is_where_it_ends(schedule, half):
    assert lr(9, 1.0, schedule, min_lr=0.1) == pytest.approx(0.1)
    assert lr(9, 0.5, schedule, min_lr=0.1) == pytest.approx(half)
    assert lr(9, 0.0, schedule, min_lr=0.1) == pytest.approx(1.0)


def test_warmup_rises_linearly_and_never_begins_at_zero():
    values = [lr(step, 0.0, "constant", warmup_steps=4) for step in range(6)]
    assert values == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_warmup_multiplies_the_schedule():
    assert lr(1, 0.25, "linear", warmup_steps=3) == pytest.approx(0.5 * 0.75)


@pytest.mark.parametrize("progress", [-0.5, 1.5])
def test_progress_beyond_the_ends_counts_as_the_end(progress):
    assert lr(9, progress) == lr(9, min(max(progress, 0.0), 1.0))
    assert lr(9, progress, "cosine", min_lr=0.2) >= 0.2
