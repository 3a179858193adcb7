import json
import shutil
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nnx_cli.errors import pip_install
from nnx_cli.system import doctor as diagnosis


def test_findings_and_the_lines_that_mend_them(nnx):
    result = nnx("doctor", "--json")
    assert result.exit_code == 0, result.stderr
    findings = json.loads(result.stdout)
    assert all(finding.keys() == {"level", "what", "fix"} for finding in findings)
    assert any(torch.__version__ in finding["what"] for finding in findings)
    assert "GiB of memory" in nnx("doctor").stdout


@pytest.fixture
def unused_gpu(monkeypatch):
    """A machine whose torch, for that CUDA or none, does not use its GPU with that driver: what is said first."""

    def first(cuda, driver):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(diagnosis, "_nvidia_gpu", lambda: ("GeForce RTX 3060", driver))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        return next(diagnosis._devices())

    return first


@pytest.mark.parametrize(("driver", "update"), [("535.183.01", False), ("525.60.13", False), ("470.256.02", True)])
def test_a_gpu_and_a_cpu_build(unused_gpu, driver, update):
    found = unused_gpu(None, driver)
    assert found.level == "warning" and "RTX 3060" in found.what and "CPU build" in found.what
    assert ("update the driver to 525" in found.fix) == update
    assert f"--python {sys.prefix} --reinstall-package torch --torch-backend=auto 'torch>=2.11'" in found.fix


@pytest.mark.parametrize(("driver", "torch_for_it"), [("579.99", True), ("525.60.13", True), ("470.256.02", False)])
def test_a_torch_for_an_old_driver(unused_gpu, driver, torch_for_it):
    fix = unused_gpu("13.0", driver).fix
    assert "update the driver to 580" in fix and ("--torch-backend=auto" in fix) == torch_for_it


@pytest.mark.parametrize(("present", "line"), [(None, "pip install uv && uv pip install "), ("uv", "uv pip install ")])
def test_cuda_without_a_gpu(monkeypatch, present, line):
    monkeypatch.setattr(shutil, "which", lambda name: name if name == present else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    fix = next(diagnosis._devices()).fix
    assert fix.startswith(line) and "--torch-backend=cpu" in fix
    assert fix.endswith("triton") == (sys.platform == "linux")


@pytest.mark.parametrize(
    ("built_for", "capability", "runs"),
    [
        (["sm_75", "sm_80", "sm_86", "sm_90"], (8, 9), True),
        (["sm_75", "sm_80", "sm_86", "sm_90"], (7, 0), False),  # an older one of the same generation
        (["sm_50", "sm_60", "sm_70"], (6, 1), True),
        (["sm_75", "sm_120"], (6, 1), False),
        (["sm_80", "sm_90a"], (12, 0), False),
        (["sm_80", "compute_90"], (12, 0), True),
        (["sm_100", "sm_120"], (12, 1), True),
        ([], (9, 0), True),  # not told
    ],
)
def test_kernels_for_a_gpu(built_for, capability, runs):
    assert diagnosis._has_kernels(built_for, capability) == runs


@pytest.mark.parametrize(
    ("capability", "hip", "backend"),
    [((6, 1), None, "cu126"), ((7, 0), None, "cu126"), ((12, 0), None, "auto"), ((11, 0), "7.2", None)],
)
def test_no_kernels_for_a_gpu(monkeypatch, capability, hip, backend):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["gfx1100"] if hip else ["sm_75", "sm_80", "sm_90"])
    monkeypatch.setattr(diagnosis, "describe", lambda device: "a GPU")
    found, *errors = diagnosis._gpu(torch.device("cuda", 0))
    assert found.level == "ok" and [error.level for error in errors] == ["error"] * (backend is not None)
    assert all(f"--torch-backend={backend} 'torch>=2.11'" in error.fix for error in errors)


@pytest.mark.parametrize(
    ("cuda", "driver", "why"),
    [
        ("13.0", "535.183.01", "(580)"),
        ("13.0", "579.99", "(580)"),
        ("12.8", "470.256.02", "(525)"),
        ("11.8", "390.157", "(450)"),
        ("12.8", "525.60.13", "cannot reach"),
        ("13.0", "580.65.06", "cannot reach"),
        ("14.0", "600.10", "cannot reach"),
        ("12.8", "[N/A]", "cannot reach"),
    ],
)
def test_an_old_driver(monkeypatch, tmp_path, cuda, driver, why):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho 'GeForce RTX 3060, {driver}'\n")
    tool.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(tool) if name == "nvidia-smi" else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    first = next(diagnosis._devices())
    assert first.level == "warning" and "RTX 3060" in first.what and why in first.what and first.fix
    if why == "cannot reach":
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        assert next(diagnosis._devices()).fix == "unset CUDA_VISIBLE_DEVICES"


@pytest.mark.parametrize(("platform", "line"), [("linux", "g++"), ("darwin", "xcode-select"), ("win32", "winget")])
def test_no_compiler(monkeypatch, platform, line):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(diagnosis.sys, "platform", platform)
    (found,) = diagnosis._compilers()
    assert found.level == "note" and line in found.fix


def test_no_headers_of_python(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(diagnosis.sys, "platform", "linux")
    (found,) = diagnosis._compilers()
    assert found.level == "note" and "python3-dev" in found.fix
    (tmp_path / "Python.h").touch()
    assert not [*diagnosis._compilers()]


@pytest.mark.parametrize(("free", "level", "exit_code"), [(0, "error", 7), (2**24, "error", 7), (2**29, "warning", 0)])
def test_no_disk_space(nnx, monkeypatch, free, level, exit_code):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free, total=2**40))
    result = nnx("doctor", "--json")
    found = [finding for finding in json.loads(result.stdout) if "free on this disk" in finding["what"]]
    assert result.exit_code == exit_code and found[-1]["level"] == level and "nnx train" in found[-1]["fix"]


def test_an_old_torch_cannot_train(nnx, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    result = nnx("doctor")
    assert result.exit_code == 7 and "older than 2.11" in result.stdout


def test_a_missing_package_names_its_extra(monkeypatch):
    monkeypatch.setattr(diagnosis, "EXTRAS", {"bpe": ("surely_not_here", "train BPE tokenizers")})
    (found,) = diagnosis._extras()
    assert found.fix == pip_install("nnx-cli[bpe]")


def several(monkeypatch, n_gpus, **found):
    """Findings on a machine with so many GPUs, of which some are as given."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: n_gpus > 0)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 5))
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", found.get("peers", lambda a, b: True))
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: found.get("nccl", True))
    monkeypatch.setattr(torch.distributed, "is_gloo_available", lambda: found.get("gloo", True))
    monkeypatch.setattr(diagnosis, "SHARED_MEMORY", Path("."))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=found.get("shared", 2**33)))
    return [*diagnosis._several_gpus(n_gpus)]


def test_several_gpus_in_order(monkeypatch):
    findings = several(monkeypatch, 4)
    assert {finding.level for finding in findings} == {"ok"}
    said = "\n".join(finding.what for finding in findings)
    assert "gloo and NCCL 2.27.5" in said and "between all 4 GPUs" in said and "8.0 GiB of shared memory" in said


def test_several_gpus_that_cannot_talk(monkeypatch):
    findings = several(monkeypatch, 2, nccl=False, shared=2**26)
    assert [finding.level for finding in findings] == ["warning", "ok", "ok", "warning"]
    assert "no NCCL" in findings[0].what and "64 MiB" in findings[3].what and "--shm-size" in findings[3].fix
    apart = several(monkeypatch, 3, peers=lambda a, b: (a, b) == (0, 1))[1]
    assert apart.level == "note" and "GPUs 0 and 2, 1 and 2:" in apart.what
    assert "without gloo" in several(monkeypatch, 0, nccl=False, gloo=False)[0].what


def test_one_gpu_needs_neither_nccl_nor_much_shared_memory(monkeypatch):
    for n_gpus in (0, 1):
        assert {finding.level for finding in several(monkeypatch, n_gpus, nccl=False, shared=2**26)} == {"ok"}
