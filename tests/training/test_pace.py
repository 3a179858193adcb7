import time

import pytest
import torch

from nnx_cli.training.pace import READING_S, READINGS, SlowRankDetector, WorkClock


def told(*readings):
    """What is told after each reading."""
    detector = SlowRankDetector()
    return [detector.update(seconds) for seconds in readings]


@pytest.mark.parametrize(("seconds", "slow"), [((3.0, 3.2), []), ((3.0, 3.4), [1]), ((3.0, 2.0, 2.1, 2.0), [0])])
def test_a_rank_is_slow_from_a_tenth_on(seconds, slow):
    *before, last = told(*[seconds] * READINGS)
    assert not any(before) and [*last] == slow
    assert all(times == pytest.approx(1.3, abs=0.2) for times in last.values())


def test_it_is_named_once_and_for_no_moment():
    assert told(*[(1.0, 3.0)] * 3 * READINGS).count({}) == 3 * READINGS - 1
    assert not any(told((1.0, 3.0), (1.0, 3.0), (3.0, 3.0), (1.0, 3.0), (1.0, 3.0), (3.0, 1.0)))
    assert not any(told(*[(0.0, 0.0)] * READINGS))


def test_short_readings_are_taken_together():
    n = round(READING_S / 0.5)
    found = told(*[(0.25, 0.5)] * READINGS * n)
    assert [i for i, slow in enumerate(found) if slow] == [READINGS * n - 1]


def test_a_clock_leaves_waiting_out():
    clock = WorkClock(torch.device("cpu"))
    for _ in range(2):
        with clock.running():
            time.sleep(0.02)
        time.sleep(0.1)
    with pytest.raises(ValueError), clock.running():
        raise ValueError
    assert 0.04 <= clock.read() < 0.1 and clock.read() == 0.0


def test_it_follows_the_forward_passes_of_training():
    block, clock = torch.nn.Dropout(), WorkClock(torch.device("cpu"))
    clock.follow([block])
    block.eval()(torch.ones(3))
    assert clock.read() == 0.0
    block.train()(torch.ones(3))
    assert 0 < clock.read() < 1
