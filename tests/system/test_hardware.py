import sys
from types import ModuleType

import pytest
import torch

from nnx_cli.system import hardware as triton_probe
from nnx_cli.system.hardware import has_triton

CARD = torch.device("cuda", 7)


class TritonError(Exception):
    pass


@pytest.fixture
def card(monkeypatch):
    """A card that is not there, with a Triton whose launches are counted and raise what is put into a list."""
    launched, errors = [], []

    def launch(device):
        launched.append(device)
        for error in errors:
            raise error

    found = ModuleType("triton.errors")
    found.TritonError = TritonError
    monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))
    monkeypatch.setitem(sys.modules, "triton.errors", found)
    monkeypatch.setattr(triton_probe, "launch", launch)
    monkeypatch.setattr(triton_probe.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    has_triton.cache_clear()
    yield errors, launched
    has_triton.cache_clear()


def test_it_is_tried_once(card):
    _, launched = card
    assert has_triton(CARD) and has_triton(CARD) and len(launched) == 1


@pytest.mark.parametrize("error", [TritonError(), RuntimeError("Failed to find C compiler"), OSError()], ids=repr)
def test_a_launch_that_fails_means_no(card, error):
    errors, launched = card
    errors.append(error)
    assert not has_triton(CARD) and not has_triton(CARD) and len(launched) == 1


def test_old_cards_and_other_devices_are_not_asked(card, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    assert not has_triton(CARD) and not has_triton(torch.device("cpu")) and not has_triton(torch.device("meta"))
    assert not card[1]
