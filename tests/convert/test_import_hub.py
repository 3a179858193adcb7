import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nnx_cli import models
from nnx_cli.convert.hub_llama import to_hub, to_hub_config
from nnx_cli.data.tokenizers.build import build_tokenizer
from nnx_cli.data.tokenizers.hf_json import save_tokenizer
from nnx_cli.runs.find import find_model
from nnx_cli.runs.load import load_model
from nnx_cli.system.files import to_json

SHAPE = dict(vocab_size=67, dim=48, n_heads=3, n_kv_heads=1, n_layers=2, ffn_dim=37, seq_len=20)


def write(folder, config, tensors):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_bytes(to_json(config))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture
def hub(workspace):
    """Writes a folder of the Hub's layout: hub(**fields) returns its model, config and tensors."""

    def make(**fields):
        torch.manual_seed(2)
        model = models.build("llama", **(SHAPE | fields)).eval()
        config, tensors = to_hub_config(model.config), {k: x.contiguous() for k, x in to_hub(model).items()}
        write(Path("hub"), config, tensors)
        return model, config, tensors

    return make


def imported(name="llama-hub"):
    return load_model(find_model(name), torch.device("cpu"))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        dict(tie_embeddings=False),
        dict(n_kv_heads=3, n_layers=1, rope_theta=1234.5, norm_eps=3e-6),
        dict(vocab_size=256, n_kv_heads=3),
    ],
    ids=lambda fields: " ".join(fields) or "plain",
)
def test_there_and_back_is_the_same_model_to_the_bit(nnx, hub, fields):
    model, *_ = hub(**fields)
    result = nnx("import", "--model", "llama", "hub", "--json")
    assert result.exit_code == 0, result.stderr
    product = json.loads(result.stdout)
    back = imported()
    assert product["parameters"] == sum(p.numel() for p in model.parameters()) and back.config == model.config
    ours, theirs = model.state_without_ties(), back.state_without_ties()
    assert ours.keys() == theirs.keys() and all(torch.equal(x, theirs[name]) for name, x in ours.items())


def test_narrow_weights_are_widened(nnx, hub):
    model, config, tensors = hub()
    write(Path("hub"), config, {name: x.bfloat16() for name, x in tensors.items()})
    assert nnx("import", "--model", "llama", "hub").exit_code == 0
    theirs = imported().state_without_ties()
    assert all(torch.equal(x.bfloat16().float(), theirs[name]) for name, x in model.state_without_ties().items())


def test_older_folders_say_it_otherwise(nnx, hub):
    model, config, tensors = hub(rope_theta=10_000.0, n_kv_heads=3)
    for name in ("rope_parameters", "num_key_value_heads", "head_dim", "attention_bias"):
        del config[name]
    config |= {"rope_scaling": None, "rope_theta": 10000, "torch_dtype": "float32", "pretraining_tp": 1}
    tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()  # tied, and written twice
    write(Path("hub"), config, tensors)
    result = nnx("import", "--model", "llama", "hub")
    assert result.exit_code == 0 and "rotary_emb.inv_freq" in result.stderr
    assert torch.equal(imported()(torch.arange(9)[None]), model(torch.arange(9)[None]))


def test_several_files_and_links_into_a_cache(nnx, hub, workspace):
    model, _, tensors = hub(tie_embeddings=False)
    names, cache = sorted(tensors), Path("cache")
    cache.mkdir()
    where = {}
    for number, part in enumerate((names[:5], names[5:9], names[9:]), 1):
        file = f"model-{number:05}-of-00003.safetensors"
        save_file({name: tensors[name] for name in part}, cache / str(number))
        Path("hub", file).symlink_to(workspace / "cache" / str(number))
        where |= dict.fromkeys(part, file)
    Path("hub", "model.safetensors").unlink()
    Path("hub", "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    assert nnx("import", "--model", "llama", "hub", "--out", "weights/mine").exit_code == 0
    assert torch.equal(imported("mine")(torch.arange(9)[None]), model(torch.arange(9)[None]))


def test_its_tokenizer_comes_along(nnx, hub):
    hub(vocab_size=256)
    save_tokenizer(build_tokenizer("byte"), Path("hub/tokenizer.json"))
    assert nnx("import", "--model", "llama", "hub", "--out", "weights/a").exit_code == 0
    assert nnx("import", "--model", "llama", "hub", "--out", "weights/b", "--tokenizer", "none").exit_code == 0
    assert find_model("a").tokenizer.kind == "byte" and find_model("b").tokenizer is None
    assert nnx("sample", "a", "--max-new-tokens", 3).exit_code == 0
    assert nnx("quantize", "a", "--filepath", __file__, "--max-drop", 9).exit_code == 0


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"architectures": ["MistralForCausalLM"]}, "it is a MistralForCausalLM"),
        ({"architectures": None, "model_type": "qwen2"}, "it is a qwen2"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"head_dim": 32}, "head_dim is 32"),
        ({"head_dim": "wide"}, "head_dim is wide"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_parameters is"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map is"),
        ({"hidden_size": None}, "does not say its hidden_size"),
        ({"hidden_size": "48"}, "dim is '48'"),
        ({"num_attention_heads": 5, "head_dim": None}, "cannot be divided"),
        ({"intermediate_size": 38}, "down_proj"),
        ({"num_key_value_heads": 3}, "k_proj"),
        ({"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight is missing"),
        ({"num_hidden_layers": 1}, "model.layers.1."),
        ({"vocab_size": 66}, "embed_tokens"),
        ({"tie_word_embeddings": False}, "lm_head.weight is missing"),
    ],
)
def test_what_does_not_map_is_named(refused, hub, changed, told):
    _, config, tensors = hub()
    write(Path("hub"), config | changed, tensors)
    refused(5, told, "import", "--model", "llama", "hub")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(48)}),
            "q_proj.bias (48,) has no place",
        ),
        (lambda t: t.update({"lm_head.weight": torch.ones(67, 48)}), "lm_head.weight is not its embedding"),
        (lambda t: t.update({"model.norm.weight": torch.ones(48, dtype=torch.int32)}), "no matrix of floats"),
        (lambda t: t.update({"model.norm.weight": torch.full((48,), torch.nan)}), "not finite"),
        (lambda t: t.pop("model.layers.0.mlp.up_proj.weight"), "up_proj.weight is missing"),
        (lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.ones(37, 47)}), "different widths"),
    ],
)
def test_tensors_that_do_not_map_are_named(refused, hub, change, told):
    _, config, tensors = hub()
    change(tensors)
    write(Path("hub"), config, tensors)
    refused(5, told, "import", "--model", "llama", "hub")


def test_folders_that_are_none(refused, hub, workspace):
    _, _, tensors = hub()
    index, weights = Path("hub/model.safetensors.index.json"), Path("hub/model.safetensors")
    data = weights.read_bytes()
    weights.write_bytes(data[:-9])
    refused(5, "is damaged", "import", "--model", "llama", "hub")
    weights.unlink()
    refused(5, "has no model.safetensors", "import", "--model", "llama", "hub")
    Path("hub/pytorch_model.bin").write_bytes(b"")
    refused(5, "pytorch_model.bin, which may run code", "import", "--model", "llama", "hub")
    for outside in ("../other.safetensors", "/etc/passwd", "a/b.safetensors", "weights.bin", 7):
        index.write_text(json.dumps({"weight_map": {"x": outside}}))
        refused(5, "names no files of this folder", "import", "--model", "llama", "hub")
    for number in (1, 2):
        save_file({"model.norm.weight": tensors["model.norm.weight"]}, f"hub/{number}.safetensors")
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    refused(5, "which another file has too", "import", "--model", "llama", "hub")
    Path("hub/config.json").write_text("[]")
    refused(5, "not a JSON object", "import", "--model", "llama", "hub")
    Path("empty").mkdir()
    refused(5, "cannot be read", "import", "--model", "llama", "empty")


def test_usage_is_checked_first(refused, hub):
    hub()
    refused(5, "read as LlamaForCausalLM alone", "import", "--model", "nyx", "hub")
    refused(2, "--variant does nothing", "import", "--model", "llama", "hub", "--variant", "sound")
    refused(2, "made from a text", "import", "--model", "llama", "hub", "--tokenizer", "bpe")
    Path("weights/there").mkdir(parents=True)
    refused(8, "exists already", "import", "--model", "llama", "hub", "--out", "weights/there")
    result = refused(2, "has no original", "import", "--model", "llama", "hub/model.safetensors")
    assert "nnx import --model llama hub" in result.stderr


def test_another_vocabulary_is_refused(refused, hub):
    hub()
    save_tokenizer(build_tokenizer("byte"), Path("hub/tokenizer.json"))
    result = refused(5, "a vocabulary of 67, its tokenizer of 256", "import", "--model", "llama", "hub")
    assert "--tokenizer none" in result.stderr
    Path("hub/tokenizer.json").write_text('{"model": {"type": "Unigram"}}')
    refused(5, "its model is not BPE", "import", "--model", "llama", "hub")


@pytest.mark.parametrize("shards", ["1GB", "20KB"])
def test_a_folder_of_transformers(nnx, workspace, shards):
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'nnx-cli[hf]'")
    shape = dict(vocab_size=99, hidden_size=48, intermediate_size=70, num_hidden_layers=3, num_attention_heads=6)
    shape |= dict(num_key_value_heads=2, max_position_embeddings=40)
    config = transformers.LlamaConfig(**shape, rope_parameters={"rope_type": "default", "rope_theta": 777.0})
    torch.manual_seed(1)
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained("small", max_shard_size=shards)
    assert Path("small/model.safetensors").exists() == (shards == "1GB")
    result = nnx("import", "--model", "llama", "small")
    assert result.exit_code == 0, result.stderr
    ids = torch.randint(99, (2, 33))
    with torch.no_grad():
        assert torch.allclose(imported("llama-small")(ids), theirs(ids).logits, atol=1e-4, rtol=0)
    assert nnx("export", "llama-small", "--format", "hf").exit_code == 0
    before, after = theirs.state_dict(), load_file("llama-small-hf/model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(x, after[name]) for name, x in before.items())
