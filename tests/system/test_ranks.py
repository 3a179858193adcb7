import pytest
import torch
from torch import distributed

from nnx_cli.errors import NnxError
from nnx_cli.system.ranks import ENDED, Group


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
