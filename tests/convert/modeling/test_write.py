"""Modelling files, in the place of transformers a few lines that stand for it: test_hf has the true one."""

import dataclasses
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from odd_models import ODD, built

import nnx_cli
from nnx_cli.convert.modeling.write import make_modeling

PROJECT = Path(nnx_cli.__file__).parents[1] / "pyproject.toml"
OTHERS = [each for each in ODD if each[0] != "llama"]


class PreTrainedConfig:
    def __init__(self, **values):
        vars(self).update(values)


class PreTrainedModel(torch.nn.Module):
    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, config):
        super().__init__()
        self.config = config

    def post_init(self):
        assert self.embedding is not None


@dataclasses.dataclass
class Output:
    loss: object = None
    logits: object = None
    cache: object = None


@pytest.fixture
def transformers(monkeypatch):
    """What a modelling file imports."""
    names = dict(
        PreTrainedConfig=PreTrainedConfig, PreTrainedModel=PreTrainedModel, GenerationMixin=type("Mixin", (), {})
    )
    outputs = types.SimpleNamespace(CausalLMOutputWithPast=Output)
    monkeypatch.setitem(sys.modules, "transformers", types.SimpleNamespace(**names))
    monkeypatch.setitem(sys.modules, "transformers.modeling_outputs", outputs)


def opened(modeling, model):
    """The model that a file defines, with the weights of another."""
    module = types.ModuleType("modeling")
    exec(compile(modeling.text, "modeling.py", "exec"), vars(module))
    kind = modeling.config["architectures"][0]
    assert modeling.config["auto_map"]["AutoModelForCausalLM"].endswith(f".{kind}")
    config = getattr(module, kind.replace("ForCausalLM", "Config"))(**modeling.config)
    theirs = getattr(module, kind)(config).eval()
    state = {key: x for key, x in model.state_dict().items() if key not in modeling.unused}
    theirs.load_state_dict(state)
    tied = {key for key in state if key not in model.state_without_ties()}
    assert set(theirs._tied_weights_keys) == tied and modeling.config["tie_word_embeddings"] == bool(tied)
    return theirs


@pytest.mark.parametrize(("name", "fields"), OTHERS, ids=str)
@torch.no_grad()
def test_it_computes_the_same_with_and_without_a_cache(transformers, name, fields):
    ours = built(name, fields)
    theirs = opened(make_modeling(name, ours), ours)
    ids = torch.randint(61, (2, 21), generator=torch.Generator().manual_seed(5))
    expected = ours(ids)
    assert torch.allclose(theirs(ids, use_cache=False).logits, expected, atol=1e-4, rtol=0)
    cached, cache = ours(ids, cache=ours.make_cache(2, 21)), None
    for piece, wanted in zip(ids.split((1, 7, 1, 12), dim=1), cached.split((1, 7, 1, 12), dim=1), strict=True):
        given = theirs.prepare_inputs_for_generation(
            ids[:, : piece.shape[1] + (cache.get_seq_length() if cache else 0)], cache=cache
        )
        assert torch.equal(given["input_ids"], piece)
        output = theirs(**given)
        cache = output.cache
        assert torch.allclose(output.logits, wanted, atol=1e-4, rtol=0)
    cache.reorder_cache(torch.tensor([1, 1]))
    first, second = theirs(torch.tensor([[5], [5]]), cache=cache).logits
    torch.testing.assert_close(first, second, atol=1e-5, rtol=0)
    assert not torch.allclose(output.logits[0, -1], output.logits[1, -1], atol=1e-3)


@pytest.mark.parametrize(("name", "fields"), OTHERS, ids=str)
def test_labels_are_learned(transformers, name, fields):
    ours = built(name, fields)
    theirs = opened(make_modeling(name, ours), ours)
    ids = torch.randint(61, (2, 21), generator=torch.Generator().manual_seed(5))
    labels = ids.clone()
    labels[:, :9] = -100
    output = theirs(ids, labels=labels)
    expected = torch.nn.functional.cross_entropy(ours(ids)[:, 8:-1].flatten(0, 1), ids[:, 9:].flatten())
    assert output.loss.item() == pytest.approx(expected.item(), abs=1e-4) and output.cache is None
    output.loss.backward()
    assert all(p.grad is not None for p in theirs.embedding.parameters())


@pytest.mark.parametrize(("name", "fields"), OTHERS, ids=str)
def test_it_is_short_and_clean(tmp_path, name, fields):
    text = make_modeling(name, built(name, fields)).text
    path = tmp_path / f"modeling_{name}.py"
    path.write_text(text, encoding="utf-8")
    assert len(text.splitlines()) <= 450 and "nnx_cli" not in text and "MIT licence" in text
    for word in ("lora", "triton", "dropout", "quantiz", "self.training", "backward"):
        assert word not in text.lower(), word
    pytest.importorskip("ruff")
    ruff = [sys.executable, "-m", "ruff", "check", "--no-cache", "--config", PROJECT, "--ignore", "TID253", path]
    checked = subprocess.run(ruff, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
