import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nnx_cli import models
from nnx_cli.convert.export import _compare
from nnx_cli.convert.export._base import Source
from nnx_cli.data.tokenizers.byte import ByteTokenizer
from nnx_cli.errors import UsageError
from nnx_cli.runs.card import Card
from nnx_cli.runs.run import Run

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
from nnx_cli.convert.export import onnx as form  # noqa: E402

MODELS = {
    "llama": ("llama", dict(dim=44, n_heads=2, n_kv_heads=1, tie_embeddings=False)),
    "nyx": ("nyx", dict(qk_norm=True, n_layers=1)),
    "ngpt": ("ngpt", {}),
    "ngpt normalised on use": ("ngpt", dict(normalize_on_use=True, tie_embeddings=False, n_layers=1)),
    "n4": ("n4", {}),
    "n4 with a window": ("n4", dict(window=5, bias=True, dyt_alpha=True, head_scale=True, n_kv_heads=1, n_layers=1)),
    "neon": ("neon", dict(decoder="function", diff_mlp=True, n_layers=1, n_global_functions=2)),
    "neon on the sphere": ("neon", dict(decoder="memory", normalized=True, diff_attention="constrained", n_layers=1)),
    "tape": ("tape", dict(n_layers=1, n_critics=1, coda_layers=1)),
}


@pytest.fixture
def source(tiny, finished):
    """Makes a Source of random weights and text: source("llama", n_layers=1)."""

    def make(name, **fields):
        model = tiny(name, **(dict(vocab_size=101) | fields)).eval().requires_grad_(False)
        with torch.no_grad():  # as after training: attention is sharp, and gains are not 1
            for parameter in model.parameters():
                parameter.mul_(0.2 / parameter.std()) if parameter.dim() == 2 else parameter.add_(
                    torch.rand_like(parameter) / 4
                )
        ids = torch.randint(101, _compare.compared_shape(model))
        card = Card("a model", "It is one.", [], [], [])
        return Source(name, model, ByteTokenizer(), card, None, ids, None, lambda what, done: None)

    return make


@pytest.mark.parametrize("name", MODELS)
def test_both_graphs_compute_what_the_model_does_at_any_length(source, tmp_path, name):
    architecture, fields = MODELS[name]
    made = source(architecture, **fields)
    form.write(made, tmp_path)
    found = form.check(made, tmp_path)
    assert found.max_logit_difference <= form.TOLERANCE and found.same_greedy_tokens == found.greedy_tokens
    whole, decode = (form.Session(tmp_path / file) for file in (form.WHOLE, form.DECODE))
    for shape in ((1, 1), (3, 2), (2, 47)):
        ids = torch.randint(101, shape)
        expected = made.model(ids)
        torch.testing.assert_close(whole.run(ids)[0], expected, atol=1e-4, rtol=0)
        state, steps = decode.empty(shape[0]), []
        for one in ids.split(1, dim=1):
            logits, *state = decode.run(one, state)
            steps.append(logits)
        torch.testing.assert_close(torch.cat(steps, dim=1), expected, atol=1e-4, rtol=0)


def test_every_architecture_is_written():
    assert {name for name, _ in MODELS.values()} == set(models.names())


@pytest.mark.parametrize(
    ("name", "fields", "why"),
    [
        ("tape", dict(variant="original"), "later positions"),
        ("neon", dict(decoder="function", variant="original"), "exponential"),
    ],
)
def test_what_no_graph_computes_is_refused_in_a_sentence(name, fields, why):
    assert why in form.why_not(name, models.make_config(name, **fields))
    assert form.why_not(name, models.make_config(name)) is None


def test_a_graph_that_computes_something_else_is_found(source, tmp_path):
    made, other = source("llama", n_layers=1), source("llama", n_layers=1, rope_theta=9_000.0)
    other.model.load_state_dict(made.model.state_dict())
    form.write(other, tmp_path)
    assert form.check(made, tmp_path).max_logit_difference > 10 * form.TOLERANCE


def test_large_weights_stand_beside_the_graph(source, tmp_path, monkeypatch):
    monkeypatch.setattr(form, "IN_ONE_FILE", 1000)
    made = source("llama", n_layers=1)
    form.write(made, tmp_path)
    assert {path.name for path in tmp_path.glob("*.data")} == {"model.onnx.data", "decode.onnx.data"}
    assert form.check(made, tmp_path).max_logit_difference <= form.TOLERANCE


@pytest.fixture
def llama(start, workspace):
    made, trainer = start(workspace / "weights" / "secret-text", model="llama", max_steps=4, save_every=4)
    with made.lock():
        made.set_status(status=trainer.train(made, lambda: False))
    return Run(made.folder)


def test_a_folder_holds_nothing_of_the_machine_and_its_readme_runs(nnx, llama, workspace):
    result = nnx("export", "secret-text", "--format", "onnx", "--out", "made", "--json")
    assert result.exit_code == 0, result.stderr
    receipt = json.loads(result.stdout)
    assert receipt["max_logit_difference"] <= 1e-4 and receipt["same_greedy_tokens"] == 16
    files = sorted(path.name for path in Path("made").iterdir())
    assert files == ["README.md", "decode.onnx", "model.onnx", "tokenizer.json"]
    for path in Path("made").iterdir():
        content = path.read_bytes()
        for private in (str(workspace), "secret-text", "site-packages", "nnx_cli", str(Path.home())):
            assert private.encode() not in content, (path.name, private)
    for file in ("model.onnx", "decode.onnx"):
        onnx.checker.check_model(f"made/{file}", full_check=True)
    pytest.importorskip("tokenizers")
    assert example(Path("made")).startswith("Once")


def example(folder):
    """What the program on a card prints."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.S)[1]
    program = code.replace("FOLDER", folder.as_posix())
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8")
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.parametrize(("name", "seq_len"), [("llama", 12), ("n4", 24), ("tape", 1)])
def test_a_model_over_bare_ids_has_an_example_within_its_context_too(source, tmp_path, name, seq_len):
    made = replace(source(name, n_layers=1, seq_len=seq_len), tokenizer=None)
    form.write(made, tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()
    ids = json.loads(example(tmp_path))
    assert ids[0] == 0 and len(ids) == 1 + max(1, seq_len // 2)


class Untraceable(torch.nn.Module):
    def __init__(self, compute):
        super().__init__()
        self.compute = compute

    def forward(self, x):
        return self.compute(x)


@pytest.mark.parametrize(
    ("compute", "why"),
    [
        (torch.special.bessel_j0, "it has no operator for prims.bessel_j0"),
        (lambda x: x if x.sum() > 0 else -x, "data-dependent"),
        (lambda x: x if x.shape[0] == form.EXAMPLE[0] else -x, "conflicts"),
    ],
)
def test_what_no_graph_holds_is_refused_in_a_line(source, tmp_path, compute, why):
    made = source("llama", n_layers=1)
    made.model.norm = Untraceable(compute)
    with pytest.raises(UsageError, match=why) as refused:
        form.write(made, tmp_path)
    assert len(str(refused.value)) < 250 and "\n" not in str(refused.value)
