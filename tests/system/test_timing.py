import pytest
import torch

from nnx_cli.system import timing

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """Has calls take the seconds given, one after the other."""

    def set_clock(*seconds):
        readings = iter([reading for x in seconds for reading in (0.0, x)])
        monkeypatch.setattr(timing.time, "perf_counter", lambda: next(readings))

    return set_clock


def test_the_median_leaves_the_first_call_out(clock):
    calls = []
    clock(9.0, 1.0, 3.0, 2.0)
    assert timing.median_seconds(lambda: calls.append(1), CPU, max_calls=3, max_seconds=99.0) == 2.0
    assert len(calls) == 4


def test_slow_calls_are_few(clock):
    clock(9.0, 5.0)
    assert timing.median_seconds(lambda: None, CPU, max_calls=3, max_seconds=4.0) == 5.0
