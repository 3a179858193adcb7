import pytest

from nnx_cli.config import TrainConfig
from nnx_cli.training import cadence
from nnx_cli.training.cadence import Cadence, Due


@pytest.fixture
def clock(monkeypatch):
    """The time in seconds, in a list of one."""
    now = [0.0]
    monkeypatch.setattr(cadence.time, "monotonic", lambda: now[0])
    return now


def test_looking_and_saving_take_a_small_share_of_the_time(clock):
    budget = cadence.TimeBudget()
    clock[0] = 1.9
    assert not budget.is_affordable()
    clock[0] = 2.1
    assert budget.is_affordable()
    with budget.timed():
        clock[0] += 3.0
    clock[0] += 59.0
    assert not budget.is_affordable()
    clock[0] += 2.0
    assert budget.is_affordable()


def due(config, step, n_steps=100, must_save=False):
    return Cadence(config).due(step, (step - 1) / n_steps, step / n_steps, must_save)


def test_every_so_many_steps_and_at_the_end():
    config = TrainConfig(val_every=6, sample_every=7, save_every=9)
    steps = {
        kind: [step for step in range(1, 101) if getattr(due(config, step), kind)]
        for kind in ("validate", "sample", "save")
    }
    assert steps["validate"] == [*range(6, 100, 6), 100]
    assert steps["sample"] == [*range(7, 100, 7), 100]
    assert steps["save"] == [*range(9, 101, 9), 100]


def test_samples_that_are_never_drawn_are_not_drawn_at_the_end():
    assert due(TrainConfig(val_every=7, sample_every=0, save_every=7), 100) == Due(True, True, False, True)


def test_the_first_step_every_tenth_and_every_validation_is_logged():
    config = TrainConfig(val_every=7, sample_every=0, save_every=500)
    assert [step for step in range(1, 31) if due(config, step).log] == [1, 7, 10, 14, 20, 21, 28, 30]


def test_at_milestones_while_there_is_time(clock):
    config = TrainConfig(val_every=None, sample_every=None, save_every=None)
    now = Cadence(config)
    assert now.due(2, 0.01, 0.02, False) == Due(log=True, validate=True, sample=False, save=False)
    clock[0] += 3.0
    assert now.due(2, 0.01, 0.02, False) == Due(log=True, validate=True, sample=True, save=True)
    assert now.due(3, 0.02, 0.03, False) == Due(log=False, validate=False, sample=False, save=False)


def test_a_large_checkpoint_is_not_saved_as_soon_as_a_run_goes_on(clock):
    config = TrainConfig(val_every=None, sample_every=0, save_every=None)
    for n_bytes, saves in ((10**6, True), (10**10, False)):
        now = Cadence(config)
        now.expect_to_save(n_bytes)
        clock[0] += 100.0
        assert now.due(2, 0.01, 0.02, False).save == saves
        clock[0] += 101.0
        assert now.due(2, 0.01, 0.02, False).save


def test_no_checkpoint_is_older_than_ten_minutes(clock):
    automatic, asked = Cadence(TrainConfig(save_every=None)), Cadence(TrainConfig(save_every=500))
    clock[0] = 599.0
    assert not automatic.is_overdue()
    clock[0] = 601.0
    assert automatic.is_overdue() and not asked.is_overdue()
    with automatic.saving.timed():
        pass
    assert not automatic.is_overdue()
    assert due(TrainConfig(val_every=500, sample_every=0, save_every=500), 3, must_save=True).save
