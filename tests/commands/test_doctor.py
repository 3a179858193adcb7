import json

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
