import getpass
import json
import platform
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from odd_models import ODD, made

from nnx_cli import models
from nnx_cli.convert.export import hf
from nnx_cli.convert.modeling import write
from nnx_cli.data.conversations import Message, Template, with_template
from nnx_cli.data.tokenizers.build import build_tokenizer
from nnx_cli.data.tokenizers.char import CharTokenizer
from nnx_cli.data.tokenizers.hf_json import load_tokenizer
from nnx_cli.runs.find import find_model
from nnx_cli.runs.load import load_model

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'nnx-cli[hf]'")

TEXT = "Naïve café, 小猫 — 1234.5 €\n\t\r\n  don't   WE'LL\u2028 🙂\0 <|endoftext"


def opened(folder):
    """The model as its users open it."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


@pytest.fixture(autouse=True)
def own_modules(tmp_path, monkeypatch):
    """A place of its own for what transformers copies of modelling files."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.mark.parametrize(("name", "fields"), ODD, ids=lambda x: x if isinstance(x, str) else " ".join(x) or "plain")
@torch.no_grad()
def test_transformers_computes_the_same(nnx, workspace, name, fields):
    ours = made(Path("weights/odd"), name, fields)
    result = nnx("export", "odd", "--format", "hf", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["max_logit_difference"] <= 1e-4
    theirs = opened("odd-hf")
    ids = torch.randint(61, (2, 21), generator=torch.Generator().manual_seed(5))
    expected = ours(ids)
    assert torch.allclose(theirs(ids, use_cache=False).logits, expected, atol=1e-4, rtol=0)
    last = theirs(ids, use_cache=False, logits_to_keep=1).logits
    assert last.shape == (2, 1, 61) and torch.allclose(last[:, 0], expected[:, -1], atol=1e-4, rtol=0)
    if fields.get("variant") != "original" or name != "tape":  # which is not causal without a cache
        cache, parts = None, []
        for piece in ids.split((1, 7, 1, 12), dim=1):
            output = theirs(piece, use_cache=True, **({} if cache is None else {cache_name(theirs): cache}))
            cache = output[cache_name(theirs)]
            parts.append(output.logits)
        assert torch.allclose(torch.cat(parts, dim=1), expected, atol=1e-4, rtol=0)
    if name == "llama":
        assert type(theirs) is transformers.LlamaForCausalLM and not list(Path("odd-hf").glob("*.py"))


def cache_name(model):
    """What this transformers calls a cache."""
    names = transformers.modeling_outputs.CausalLMOutputWithPast.__annotations__
    return "cache" if "cache" in names else "past_key_values"


@pytest.mark.parametrize("name", models.names())
def test_a_trained_model_writes_the_same_text(nnx, start, workspace, name):
    run, trainer = start(workspace / "weights" / name, model=name, max_steps=6, save_every=3)
    with run.lock():
        run.set_status(status=trainer.train(run, lambda: False))
    assert nnx("export", name, "--format", "hf").exit_code == 0
    theirs, ids = opened(f"{name}-hf"), torch.tensor([[97, 32], [98, 99]])
    how = dict(attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    for beams in (1, 3):
        cached = theirs.generate(ids, num_beams=beams, **how)
        assert torch.equal(cached, theirs.generate(ids, num_beams=beams, use_cache=False, **how))
    assert theirs.generate(ids, num_return_sequences=2, do_sample=True, max_new_tokens=3).shape == (4, 5)
    if name == "llama":  # and back again
        assert nnx("import", "--model", "llama", "llama-hf", "--out", "weights/back").exit_code == 0
        before, after = (load_model(find_model(each), torch.device("cpu")) for each in ("llama", "back"))
        assert before.config == after.config and find_model("back").tokenizer.kind == "byte"
        assert all(torch.equal(x, after.get_parameter(key)) for key, x in before.state_without_ties().items())
    assert (theirs.get_input_embeddings().weight.shape, theirs.config.max_position_embeddings) == ((256, 32), 32)


def test_padding_is_refused_in_words(nnx, workspace):
    made(Path("weights/odd"), "nyx", {})
    assert nnx("export", "odd", "--format", "hf").exit_code == 0
    ids = torch.ones(2, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="takes no padding"):
        opened("odd-hf").generate(ids, attention_mask=torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]), max_new_tokens=2)


@pytest.mark.parametrize("kind", ["byte", "char", "bpe"])
def test_the_tokenizer_gives_the_same_ids(nnx, workspace, kind):
    folder = Path(__file__).parents[2] / "folders" / "data" / "bpe" / "tokenizer.json"
    ours = {"byte": lambda: build_tokenizer("byte"), "char": lambda: CharTokenizer(TEXT[:9])}
    tokenizer = ours.get(kind, lambda: load_tokenizer(folder))()
    made(Path("weights/odd"), "nyx", dict(vocab_size=tokenizer.vocab_size), tokenizer)
    assert nnx("export", "odd", "--format", "hf").exit_code == 0
    theirs = transformers.AutoTokenizer.from_pretrained("odd-hf", trust_remote_code=True)
    ids = tokenizer.encode(TEXT).tolist()
    assert theirs(TEXT)["input_ids"] == ids and theirs.decode(ids) == TEXT
    assert theirs.eos_token_id == tokenizer.eot_id and theirs.model_max_length == 24
    generation = json.loads(Path("odd-hf/generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.eot_id and generation["temperature"] == 0.8


def test_another_tokenizer_is_not_kept(refused, run, monkeypatch):
    monkeypatch.setattr(hf, "save_tokenizer", lambda tokenizer, path: path.write_text(json.dumps(_reversed(tokenizer))))
    refused(6, "gives other ids", "export", "words", "--format", "hf")


def _reversed(tokenizer):
    from nnx_cli.data.tokenizers.hf_json import to_json

    content = to_json(tokenizer)
    vocab = content["model"]["vocab"]
    content["model"]["vocab"] = {name: 255 - i for name, i in vocab.items()}
    return content


@pytest.mark.parametrize(("old", "new"), [("eps: float = 1e-5", "eps: float = 1e-2"), ("F.silu(gate)", "F.gelu(gate)")])
def test_a_file_that_computes_something_else_is_not_kept(refused, run, monkeypatch, old, new):
    true = write.make_modeling

    def false(name, model):
        modeling = true(name, model)
        assert old in modeling.text
        return write.Modeling(modeling.text.replace(old, new), modeling.config, modeling.unused)

    monkeypatch.setattr(hf, "make_modeling", false)
    refused(6, "in a logit", "export", "words", "--format", "hf")


def test_adapters_are_merged_and_the_run_says_so(nnx, run):
    words = ["--init-from", "words", "--data", "data/words", "--lora-rank", 4, "--max-steps", 6, "--lr", 0.01]
    words += ["--save-every", 2, "--val-every", 3, "--sample-every", 0, "--batch-size", 4, "--grad-accum", 1]
    trained = nnx("train", *words, "--threads", 1, "--out", "weights/adapted")
    assert trained.exit_code == 0, trained.stderr
    assert nnx("export", "adapted@last", "--format", "hf").exit_code == 0
    ids = torch.randint(256, (1, 20))
    ours = load_model(find_model("adapted@last"), torch.device("cpu"))
    with torch.no_grad():
        assert torch.allclose(opened("adapted-hf")(ids).logits, ours(ids), atol=1e-4, rtol=0)
    assert "adapters (rank 4)" in Path("adapted-hf/README.md").read_text(encoding="utf-8")


@torch.no_grad()
@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_model_computes_what_its_codes_stand_for(nnx, run, bits):
    assert nnx("quantize", "words", "--bits", bits, "--max-drop", 9).exit_code == 0
    assert nnx("export", f"words-int{bits}", "--format", "hf").exit_code == 0
    ids = torch.randint(256, (1, 20))
    ours = load_model(find_model(f"words-int{bits}"), torch.device("cpu"))
    assert torch.allclose(opened(f"words-int{bits}-hf")(ids).logits, ours(ids), atol=2e-3, rtol=0)


def test_nothing_of_the_machine_is_in_a_file(nnx, run, workspace):
    assert nnx("export", "words", "--format", "hf", "--out", "hub/made").exit_code == 0
    secrets = [
        str(workspace),
        str(Path.home()),
        workspace.name,
        "words",
        "data/",
        getpass.getuser(),
        socket.gethostname(),
    ]
    secrets += [platform.processor()]
    for path in Path("hub/made").iterdir():
        content = path.read_bytes()
        assert not [x for x in secrets if len(x) > 3 and x.encode() in content], path


def test_the_card_can_be_read_by_the_hub(nnx, run):
    yaml = pytest.importorskip("yaml")
    assert nnx("export", "words", "--format", "hf").exit_code == 0
    card = Path("words-hf/README.md").read_text(encoding="utf-8")
    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["nnx", "nyx"],
    }
    ran = run_example(body, "words-hf")
    assert ran.returncode == 0 and ran.stdout.startswith("Once upon a time"), ran.stderr


def run_example(card, folder):
    """The program on a card, run in its folder."""
    program = card.split("```python\n")[1].split("```")[0]
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=folder)


def test_a_model_over_bare_ids_has_an_example_too(nnx, workspace):
    made(Path("weights/odd"), "llama", {})
    assert nnx("export", "odd", "--format", "hf").exit_code == 0
    ran = run_example(Path("odd-hf/README.md").read_text(encoding="utf-8"), "odd-hf")
    assert ran.returncode == 0 and ran.stdout.startswith("[0, "), ran.stderr


def test_transformers_is_left_as_it_was(nnx, run):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled(), sys.path
    place = transformers.dynamic_module_utils.HF_MODULES_CACHE
    result = nnx("export", "words", "--format", "hf")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled(), sys.path) == before
    assert place == transformers.dynamic_module_utils.HF_MODULES_CACHE and not Path(place).exists()
    assert result.stderr == ""


def test_what_transformers_has_no_way_to_do_is_refused(refused, workspace):
    made(Path("weights/odd"), "neon", dict(decoder="function", variant="original"))
    refused(2, "draws at random", "export", "odd", "--format", "hf")
    made(Path("weights/latent"), "n4", dict(kv_latent_dim=12))
    refused(2, "rise from latents", "export", "latent", "--format", "hf")


@pytest.mark.parametrize("name", ["llama", "tape"])
def test_the_template_of_conversations_comes_along(nnx, workspace, name):
    tokenizer = with_template(CharTokenizer(TEXT[:9]))
    template = Template(tokenizer)
    made(Path("weights/odd"), name, dict(vocab_size=tokenizer.vocab_size), tokenizer)
    result = nnx("export", "odd", "--format", "hf", "--json")
    assert result.exit_code == 0, result.stderr
    theirs, model = transformers.AutoTokenizer.from_pretrained("odd-hf"), opened("odd-hf")
    asked = [{"role": "user", "content": TEXT[:30]}]
    ids = theirs.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids == template.prompt([Message("user", TEXT[:30])])
    assert theirs.eos_token_id == template.end_id
    assert set(model.generation_config.eos_token_id) == {template.end_id, template.begin_id}
