import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nnx_cli.system import doctor as diagnosis


def test_findings_and_the_lines_that_mend_them(nnx):
    result = nnx("doctor", "--json")
    assert result.exit_code == 0, result.stderr
    findings = json.loads(result.stdout)
    assert all(finding.keys() == {"level", "what", "fix"} for finding in findings)
    assert any(torch.__version__ in finding["what"] for finding in findings)
    assert "GiB of memory" in nnx("doctor").stdout


def test_a_card_that_torch_cannot_use(nnx, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(diagnosis, "_nvidia_gpu", lambda: ("GeForce RTX 3060", "535.183.01"))
    found = [finding for finding in diagnosis.diagnose() if "RTX 3060" in finding.what]
    assert found[0].level == "warning" and "CPU build" in found[0].what and "--torch-backend=auto" in found[0].fix


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
    assert found.fix == "pip install 'nnx-cli[bpe]'"


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
