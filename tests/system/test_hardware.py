import sys
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import pytest
import torch

from nnx_cli import system
from nnx_cli.system import hardware
from nnx_cli.system.device import pick_device
from nnx_cli.system.hardware import Hardware, of, of_device, planned

GPU = torch.device("cuda", 7)


class TritonError(Exception):
    pass


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that is not there, with a Triton whose launches are counted and raise what is put into a list."""
    launched, errors = [], []

    def launch(device):
        launched.append(device)
        for error in errors:
            raise error

    found, probe = ModuleType("triton.errors"), ModuleType("nnx_cli.system.triton_probe")
    found.TritonError, probe.launch = TritonError, launch
    monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))
    monkeypatch.setitem(sys.modules, "triton.errors", found)
    monkeypatch.setattr(system, "triton_probe", probe, raising=False)
    monkeypatch.setattr(hardware.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(hardware, "_GPUS", {})
    return errors, launched


def test_triton_is_tried_once(gpu):
    _, launched = gpu
    wanted = Hardware("cuda", (8, 0), flash=True, triton=True, hip=torch.version.hip is not None)
    assert of_device(GPU) == of_device(GPU) == wanted
    assert launched == [GPU]


@pytest.mark.parametrize("error", [TritonError(), RuntimeError("Failed to find C compiler"), OSError()], ids=repr)
def test_a_launch_that_fails_means_no_triton(gpu, error):
    errors, launched = gpu
    errors.append(error)
    assert not of_device(GPU).triton and not of_device(GPU).triton and len(launched) == 1


def test_old_gpus_are_not_asked_and_have_little(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    found = of_device(GPU)
    assert not (found.triton or found.flash or found.bf16_matmul or gpu[1])


def test_other_devices_have_their_kind_alone():
    assert of(torch.zeros(1)) == Hardware("cpu") and of_device(torch.device("mps")) == Hardware("mps")


def test_a_meta_tensor_has_the_hardware_of_its_plan():
    x, planned_for = torch.zeros(1, device="meta"), Hardware("cuda", (9, 0), flash=True, triton=True)
    with planned(planned_for):
        assert of(x) is planned_for and of(torch.zeros(1)).kind == "cpu"
        with planned(Hardware("cpu")):
            assert of(x).kind == "cpu"
        assert of(x) is planned_for
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(of, x).result().kind == "meta", "a plan is that of its thread"
    assert of(x).kind == "meta"


@pytest.mark.parametrize(("name", "current"), [("cuda:1", [1]), ("cuda", []), ("auto", [0])])
def test_a_gpu_that_is_named_becomes_the_current_one(name, current, monkeypatch):
    """Streams, graphs and what waits for them are the current one's."""
    made = []
    for attribute, value in {"is_available": True, "device_count": 2, "current_device": 0}.items():
        monkeypatch.setattr(torch.cuda, attribute, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "set_device", made.append)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda enabled: None)
    assert pick_device(name) == torch.device("cuda", *(current or [0])) and made == current
