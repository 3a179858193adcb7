import argparse
import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

from nnx_cli import models
from nnx_cli.runs.find import find_model
from nnx_cli.runs.load import load_model


@pytest.fixture
def seed(tiny, workspace):
    """A NYX under its original's names, as a .pth file, and the model itself."""
    model = tiny("nyx", vocab_size=256, ffn_dim=64, qk_norm=True)
    torch.save({"model": {f"module.{k}": v for k, v in models.reference_tensors(model).items()}}, "seed.pth")
    return model


def test_the_imported_model_is_the_same_function(nnx, seed):
    product = json.loads(nnx("import", "--model", "nyx", "seed.pth", "--json").stdout)
    assert product["parameters"] == sum(p.numel() for p in seed.parameters())
    loaded = load_model(find_model(product["out"]), torch.device("cpu"))
    ids = torch.randint(256, (2, 16))
    assert (loaded(ids) - seed(ids)).abs().max() < 1e-5  # another context: positions are centred elsewhere
    assert find_model(product["out"]).tokenizer.kind == "byte"
    assert nnx("sample", product["out"], "--max-new-tokens", 3).exit_code == 0


def test_safetensors_too(nnx, seed):
    save_file(models.reference_tensors(seed), "seed.safetensors")
    assert nnx("import", "--model", "nyx", "seed.safetensors", "--out", "weights/mine").exit_code == 0


def test_an_original_is_trained_on(nnx, seed, text_file):
    result = nnx(
        "train",
        "--filepath",
        text_file,
        "--checkpoint_path",
        "seed.pth",
        "--num_batches",
        2,
        "--seq_len",
        16,
        "--batch_size",
        2,
        "--gradient_accumulate_every",
        1,
        "--json",
    )
    assert result.exit_code == 0, result.stderr
    config = find_model(json.loads(result.stdout)["out"]).config
    assert config["model"]["qk_norm"] is True and config["training"]["optimizer"] == "lion"
    assert config["init_from"].endswith("nyx-seed")


SMALL = ("--num_batches", 2, "--seq_len", 16, "--batch_size", 2, "--gradient_accumulate_every", 1)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (3, ["--data", "nowhere"]),
        (3, ["--filepath", "nowhere.txt"]),
        (3, ["--filepath", "empty.txt"]),
        (2, ["--filepath", "words.txt", "--dim", 64]),
        (2, ["--filepath", "words.txt", "--lora-rank", 5000]),
        (2, ["--filepath", "words.txt", "--tokenizer", "char"]),
        (4, ["--filepath", "words.txt", "--vram", "1.0001GB"]),
        (8, ["--filepath", "words.txt", "--out", "seed.pth"]),
        (0, ["--filepath", "words.txt", "--dry-run"]),
    ],
    ids=str,
)
def test_a_run_that_is_not_to_be_leaves_no_import(nnx, seed, text_file, workspace, code, words):
    (workspace / "words.txt").write_bytes(text_file.read_bytes())
    (workspace / "empty.txt").touch()
    before = sorted(workspace.rglob("*"))
    result = nnx("train", "--checkpoint_path", "seed.pth", *SMALL, *words)
    assert result.exit_code == code, result.stderr
    assert sorted(workspace.rglob("*")) == before


def test_a_checkpoint_is_known_by_its_content_not_its_name(nnx, seed, tiny, text_file, workspace):
    """What stands under the name that an import would have is another checkpoint's, a run on a text, or damaged."""
    begin = ("train", "--filepath", text_file, *SMALL, "--json", "--checkpoint_path")

    def started_from(path):
        result = nnx(*begin, path)
        assert result.exit_code == 0, result.stderr
        return find_model(json.loads(result.stdout)["out"]).config["init_from"]

    assert [started_from("seed.pth") for _ in range(2)] == ["weights/nyx-seed"] * 2
    (workspace / "other").mkdir()
    torch.save(models.reference_tensors(tiny("nyx", vocab_size=256, ffn_dim=64, dropout=0.0)), "other/seed.pth")
    assert [started_from("other/seed.pth") for _ in range(2)] == ["weights/nyx-seed-2"] * 2
    (workspace / "weights" / "nyx-seed" / "config.json").write_text("{}")
    assert started_from("seed.pth") == "weights/nyx-seed-3"


class Bomb:
    def __reduce__(self):
        return open, ("bomb-went-off", "w")


def test_nothing_in_a_checkpoint_is_run(refused, workspace):
    with open("bomb.pth", "wb") as file:
        pickle.dump({"model": Bomb()}, file)
    torch.save({"model": Bomb()}, "bomb2.pth")
    for name in ("bomb.pth", "bomb2.pth"):
        refused(5, "nothing in it was run", "import", "--model", "nyx", name)
    assert not (workspace / "bomb-went-off").exists()


def test_what_cannot_be_imported(refused, seed, workspace):
    (workspace / "noise.pth").write_bytes(b"noise")
    refused(5, "no checkpoint of tensors", "import", "--model", "nyx", "noise.pth")
    refused(5, "there is no checkpoint", "import", "--model", "nyx", "nothing.pth")
    torch.save({"weight": torch.ones(2)}, "other.pth")
    refused(5, "no checkpoint of nyx", "import", "--model", "nyx", "other.pth")
    for path in ("seed.pth", "noise.pth", "nothing.pth"):
        refused(2, "has no original", "import", "--model", "llama", path)
    (workspace / "weights" / "there").mkdir(parents=True)
    refused(8, "exists already", "import", "--model", "nyx", "seed.pth", "--out", "weights/there")


def test_usage_is_checked_before_the_file(refused):
    for words, message in (
        (["--tokenizer", "nosuch"], "--tokenizer is 'nosuch'"),
        (["--tokenizer", "bpe"], "--tokenizer bpe is made from a text"),
        (["--variant", "nosuch"], "--variant is 'nosuch'"),
        (["--model", "nosuch"], "there is no model 'nosuch'"),
    ):
        refused(2, message, "import", "--model", "nyx", "nofile.pth", *words)


def test_what_was_taken_and_what_was_left_is_said(nnx, seed):
    weights = models.reference_tensors(seed)
    torch.save({"ema": weights, "net": weights, "args": argparse.Namespace(), "step": torch.tensor(3)}, "both.pth")
    result = nnx("import", "--model", "nyx", "both.pth")
    assert result.exit_code == 0 and len(result.stdout.splitlines()) == 2
    assert "those at net.* are taken, not ema.*" in result.stderr and "objects of argparse.Namespace" in result.stderr


def test_a_file_is_what_it_holds_not_what_it_is_called(nnx, seed, workspace):
    weights = models.reference_tensors(seed)
    save_file({name: weight.clone() for name, weight in weights.items()}, "model.pth")
    save_file({name: weight.clone() for name, weight in weights.items()}, "model")
    torch.save(weights, "model.safetensors")
    for number, name in enumerate(("model.pth", "model", "model.safetensors")):
        assert nnx("import", "--model", "nyx", name, "--out", f"weights/{number}").exit_code == 0, name


@pytest.mark.parametrize(
    "key", ["layers.0.func.fused_attention_feedforward.weight", "layers.1.func.attn_output_proj.weight"]
)
@pytest.mark.parametrize("rows", [1, 3])
def test_what_is_read_off_shapes_is_no_fault_of_an_option(refused, seed, key, rows):
    weights = models.reference_tensors(seed)
    weights[key] = weights[key][:rows]
    torch.save(weights, "odd.pth")
    assert "--" not in refused(5, "odd.pth: ", "import", "--model", "nyx", "odd.pth").stderr.splitlines()[0]


@pytest.mark.parametrize("names", [("embed_tokens.weight", "lm_head.weight"), ("wte.weight",), ("token_embed.weight",)])
def test_another_original_is_named_only_where_it_can_be_meant(refused, workspace, names):
    torch.save({f"model.{name}": torch.ones(300, 32) for name in names}, "theirs.pth")
    assert "nnx import" not in refused(5, "no checkpoint of nyx", "import", "--model", "nyx", "theirs.pth").stderr


@pytest.mark.parametrize("name", ["n4", "neon"])
def test_another_original_is_named_where_it_is_meant(nnx, refused, tiny, name):
    torch.save(models.reference_tensors(tiny(name, vocab_size=256)), "theirs.pth")
    result = refused(5, "no checkpoint of nyx", "import", "--model", "nyx", "theirs.pth")
    assert f"nnx import --model {name} theirs.pth" in result.stderr
