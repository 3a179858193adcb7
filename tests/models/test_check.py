"""A file of the user's is tried before it trains, and refused with the file and the rule."""

import re
from pathlib import Path

import pytest

from nnx_cli import models
from nnx_cli.errors import UsageError
from nnx_cli.models._check import check_model

README = (models.FOLDER / "README.md").read_text(encoding="utf-8")
EXAMPLE = re.search(r"```python\n(from dataclasses.*?)```", README, re.DOTALL)[1]
SMALL = dict(vocab_size=61, dim=48, n_heads=3, n_layers=2, seq_len=24)

LEAK = "must not depend on later tokens"
CONVOLUTION = """
class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.conv = nn.Conv1d(config.dim, config.dim, 3, padding=1)
        nn.init.zeros_(self.conv.weight)

    def forward(self, x, cache):
        return x + self.conv(x.transpose(1, 2)).transpose(1, 2)


class Model"""
BROKEN = {  # a change of the example, and what is said
    "base of Config": ("class Config(ModelConfig)", "class Config", "subclass of nnx_cli.models._base.ModelConfig"),
    "base of Model": ("class Model(LanguageModel)", "class Model(nn.Module)", "subclass of .*LanguageModel"),
    "no dataclass": ("@dataclass(frozen=True, kw_only=True)\n", "", "Config must be a @dataclass"),
    "no default": ("gain: float = 1.0", "gain: float", "the field gain of Config must have a default"),
    "unknown in SIZES": ("dim=128", "width=128", "has 'width', which is no field"),
    "SIZES of names": ("dict(dim=128, n_layers=4, n_heads=4, seq_len=256)", "'small'", "must be a dict of fields"),
    "no head": ("self.head =", "self.out =", "must set self.head"),
    "no blocks": ("nn.ModuleList(Block(config, layer) for", "list(Block(config, layer) for", "must set self.blocks"),
    "raises when made": ("self.norm = RMSNorm(config.dim)\n        self.h", "1 / 0\n        self.h", "ZeroDivision"),
    "raises in a pass": ("x = block(x, cache)", "x = block(x)", "a forward pass raises TypeError"),
    "one position": ("return self.norm(x)", "return self.norm(x)[:, -1]", r"must be logits \(B, T, V\)"),
    "nothing returned": ("        return self.norm(x)", "        self.norm(x)", "fails: a forward pass raises"),
    "not finite": ("return self.norm(x)", "return self.norm(x) / 0", "must be finite"),
    "mean of all": ("return self.norm(x)", "return self.norm(x + x.mean(1, keepdim=True))", LEAK),
    "reversed": ("return self.norm(x)", "return self.norm(x + x.flip(1))", LEAK),
    "one ahead": ("return self.norm(x)", "return self.norm(x + x.roll(-1, 1))", LEAK),
    "a convolution that begins as nothing": ("\nclass Model", CONVOLUTION, LEAK),
    "no cache": ("def make_cache", "def make_no_cache", "must define make_cache"),
    "none returned": ("return KVCache(", "KVCache(", "its cache must have span"),
    "a cache that is not counted": ("cache.advance(input_ids.shape[1])", "pass", "with its cache raises"),
    "a cache that is not read": ("q, k, v, cache, self", "q, k, v, None, self", "the logits of one pass"),
}


def tried(source, **fields):
    Path("mine.py").write_text(source, encoding="utf-8")
    check_model("mine.py", models.make_config("mine.py", **SMALL | fields))


def test_the_example_of_the_readme_is_taken(workspace):
    tried(EXAMPLE)
    tried(EXAMPLE, dim=4096, n_heads=8)  # which is tried in the size of the file


@pytest.mark.parametrize("name", models.names())
def test_the_zoo_would_be_taken(workspace, name):
    tried((models.FOLDER / f"{name}.py").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", BROKEN)
def test_what_breaks_a_rule_is_refused(workspace, case):
    old, new, message = BROKEN[case]
    assert old in EXAMPLE
    with pytest.raises(UsageError, match=f"--model mine.py.*{message}"):
        tried(EXAMPLE.replace(old, new, 1))


def test_a_file_beside_it_is_named(workspace):
    Path("mine").mkdir()
    Path("mine/parts.py").write_text("")
    Path("mine/x.py").write_text("from parts import Block\n" + EXAMPLE)
    with pytest.raises(UsageError, match="'parts'; a file must stand alone") as error:
        models.make_config("mine/x.py")
    assert "into mine/x.py itself" in error.value.fix
    Path("mine/y.py").write_text("import not_to_be_found\n" + EXAMPLE)
    with pytest.raises(UsageError, match="'not_to_be_found'$"):
        models.make_config("mine/y.py")


def test_no_text_is_read_before_it(refused, workspace, text_file):
    Path("mine.py").write_text(
        EXAMPLE.replace("self.norm(x)\n\n    def make", "self.norm(x.cummax(1)[0].flip(1))\n\n    def make")
    )
    shape = ["--dim", 48, "--n-heads", 3, "--n-layers", 2]
    for words in (
        ["train", "--model", "mine.py", "--filepath", text_file, *shape],
        ["train", "--model", "mine.py", "--filepath", text_file, "--dry-run"],
        ["summarize", "--model", "mine.py", "--size", "nano"],
        ["compare", "--models", "mine.py,llama", "--filepath", text_file, "--budget", "100k"],
        ["sweep", "--model", "mine.py", "--filepath", text_file, "--set", "lr=1e-3,1e-2", "--max-steps", 2],
    ):
        refused(2, LEAK, *words)
    assert not Path("weights").exists() or not any(Path("weights").iterdir())
