import json
import shutil
from pathlib import Path
from types import SimpleNamespace

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
    monkeypatch.setattr(diagnosis, "_nvidia_gpu", lambda: "GeForce RTX 3060")
    found = [finding for finding in diagnosis.diagnose() if "RTX 3060" in finding.what]
    assert found[0].level == "warning" and "CPU build" in found[0].what and found[0].fix


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
