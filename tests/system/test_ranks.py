import threading
import time
from dataclasses import make_dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import distributed
from torch.distributed.elastic.multiprocessing.api import PContext
from torch.distributed.launcher import api as launcher

from nnx_cli.errors import NnxError
from nnx_cli.system import ranks
from nnx_cli.system.ranks import ENDED, Group
from nnx_cli.system.torch_private import seconds_to_leave


@pytest.fixture
def restarted(monkeypatch):
    """Starts the one process of a group again and again, as torchrun does: at one store."""
    server = distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    where = dict(MASTER_ADDR="localhost", MASTER_PORT=server.port, RANK=0, WORLD_SIZE=1)
    for name, value in (where | dict(TORCHELASTIC_USE_AGENT_STORE=True)).items():
        monkeypatch.setenv(name, str(value))
    yield lambda n_restarts: Group(torch.device("cpu"), print, n_restarts)
    if distributed.is_initialized():
        distributed.destroy_process_group()


def test_processes_that_are_started_anew_hear_nothing_of_those_before(restarted):
    before = restarted(0)
    before.leave(NnxError("out of luck"))
    assert before.store.check([ENDED])
    distributed.destroy_process_group()
    again = restarted(1)
    assert not again.store.check([ENDED]) and again.gather("here") == ["here"]
    again.close()


@pytest.mark.parametrize(("alive", "gone"), [((), 1), ((1, 2), None), ((2,), 1), ((1,), 2)])
def test_a_sign_that_was_given_before_is_no_sign_of_life(monkeypatch, alive, gone):
    """One rank was killed, and what it said last is read only when a message to it has failed."""
    monkeypatch.setattr(ranks, "LOOK_S", 1.0)
    group = object.__new__(Group)
    group.rank, group.count = 0, 3
    group.store = SimpleNamespace(check=lambda keys: False)
    group._beats = {rank: (b"7", time.monotonic()) for rank in (1, 2)}

    def speak(those, sign):
        group._beats |= {rank: (sign, time.monotonic()) for rank in those}

    timers = [threading.Timer(0.1, speak, [(1, 2), b"8"]), threading.Timer(0.7, speak, [alive, b"9"])]
    for timer in timers:
        timer.start()
    why = group.why_gone()
    for timer in timers:
        timer.join()
    assert why is None if gone is None else str(why).startswith(f"process {gone} of 3 is gone")


def test_processes_have_time_to_save_whatever_torch_can_be_told(monkeypatch):
    monkeypatch.setattr(PContext.close, "__defaults__", PContext.close.__defaults__)
    monkeypatch.setattr(launcher, "LaunchConfig", make_dataclass("LaunchConfig", ["shutdown_timeout"]))
    assert seconds_to_leave(7) == {"shutdown_timeout": 7}
    monkeypatch.setattr(launcher, "LaunchConfig", make_dataclass("LaunchConfig", ["max_restarts"]))
    assert seconds_to_leave(8) == {} and PContext.close.__defaults__ == (None, 8)
