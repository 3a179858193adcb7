"""The code that the architectures come from: how it is had, built and mended, and how it writes text.

The originals are fetched by whoever runs this, into FOLDER, and are no part of this repository:

    https://github.com/Rikka-Botan/Nova-Nox-Neural-Network at a5ccd3ea45b1b2079088376397f5a5f0df68d1cb: MIT
    https://github.com/nomadicsynth/neon-transformer at 8ea0ff1c3a69baeb26ca8a02f555fd10ba5fe35e: Apache-2.0 by its
        headers, no license file
    https://github.com/falseywinchnet/nano-research-gpt at dad5666e86978a4d8e6f6474a6e66d015ad6f2d2: its author's own
        license, which permits use and modification; copies must carry it. A cell of its notebook is executed from there
    pip install --no-deps --target FOLDER/packages nGPT-pytorch==0.2.16 palm-rlhf-pytorch==0.8.0 einops==0.8.1
        rotary-embedding-torch==0.9.1 beartype==0.22.9 transformers==4.50.0 tokenizers==0.21.4 huggingface-hub==0.36.0:
        the first two are MIT, the others what they and Neon import; besides: pip install requests regex pyyaml tqdm

For a machine without a network those four go to FOLDER/packages too, all with `--only-binary=:all:`, its
`--python-version` and `--platform`; of transformers/models only `auto` and every `__init__.py` are imported.

NYX's own repository could not be established; palm-rlhf-pytorch has the class that NYX's files rename (equal logits).
"""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnx_cli import models
from nnx_cli.models._base import ModelConfig


@dataclass
class Original:
    """An original, ready to train: its model, its loss of tokens (B, T + 1), `write` of n tokens after ids (1, T), in
    evaluation, what that does, and what is done after a training step."""

    model: nn.Module
    loss: Callable[[Tensor], Tensor]
    write: Callable[[Tensor, int], Any]
    way: str
    after_step: Callable[[], Any] = lambda: None


def nyx(folder: Path, config: dict[str, Any], device: torch.device) -> Original:
    """Only three files of the package are needed; its `__init__` would import a dozen packages for other ends."""
    package = ModuleType("palm_rlhf_pytorch")
    package.__path__ = [str(folder / "packages/palm_rlhf_pytorch")]
    sys.modules[package.__name__] = package
    from palm_rlhf_pytorch.palm import PaLM

    model = PaLM(
        dim=config["model_dim"],
        num_tokens=config["vocab_size"],
        depth=config["layer_depth"],
        heads=config["num_attention_heads"],
        dim_head=config["head_dimension"],
        ff_mult=config["feedforward_scale"],
    ).to(device)

    def write(ids: Tensor, n: int) -> Tensor:
        return model.generate(ids.shape[1] + n, ids)

    return Original(model, lambda tokens: model(tokens, return_loss=True), write, "its `generate`, no cache")


def ngpt(folder: Path, config: dict[str, Any], device: torch.device) -> Original:
    """Its classes define equality without a hash, so that no parameter can be listed: they get nn.Module's back."""
    from nGPT_pytorch import nGPT

    classes = vars(importlib.import_module("nGPT_pytorch.nGPT")).values()
    for cls in classes:
        if isinstance(cls, type) and issubclass(cls, nn.Module) and cls.__hash__ is None:
            cls.__hash__ = nn.Module.__hash__
    model = nGPT(**config).to(device)
    after_step = model.norm_weights_ if config["manual_norm_weights"] else lambda: None

    @torch.no_grad()
    def write(ids: Tensor, n: int) -> Tensor:
        """As its train.py does, but for the noise that chooses among the best tenth: that is drawn in fewer steps."""
        for _ in range(n):
            best, tokens = model(ids)[:, -1].topk(math.ceil(config["num_tokens"] / 10))
            drawn = torch.multinomial(best.float().softmax(-1), 1)
            ids = torch.cat((ids, tokens.gather(-1, drawn)), -1)
        return ids

    way = "loop over its forward as in its train.py, no cache"
    return Original(model, lambda tokens: model(tokens, return_loss=True), write, way, after_step)


def n4(folder: Path, config: dict[str, Any], device: torch.device) -> Original:
    sys.path.insert(0, str(folder / "Nova-Nox-Neural-Network/model"))
    from N4_modeling import N4C

    model = N4C(**config).to(device)

    def write(ids: Tensor, n: int) -> list[int]:
        return list(model.generate_n4c(ids, n, eos_token_id=-1))

    loss = lambda tokens: model(tokens[:, :-1], labels=tokens[:, :-1])[1]  # noqa: E731
    return Original(model, loss, write, "its `generate_n4c`, no cache")


def neon(folder: Path, config: dict[str, Any], device: torch.device) -> Original:
    """Eager attention: its default, sdpa, fails in the first forward pass. No cache, as in its generate.py: with
    one its attention fails. Without CUDA its rotary kernel is replaced by the same rotation in torch."""
    sys.path.insert(0, str(folder / "neon-transformer"))
    if device.type != "cuda":
        rotary = ModuleType("neon.rotary")
        rotary.apply_rotary_emb = neon_rotation
        sys.modules[rotary.__name__] = rotary
    from neon.configuration_neon import NeonConfig
    from neon.modeling_neon import NeonForCausalLM

    model = NeonForCausalLM(NeonConfig(**config, attn_implementation="eager", use_cache=False)).to(device).train()
    model.generation_config.eos_token_id = None

    def write(ids: Tensor, n: int) -> Tensor:
        how = dict(do_sample=True, temperature=0.8, top_k=200, max_new_tokens=n, use_cache=False)
        return model.generate(ids, attention_mask=torch.ones_like(ids), **how)

    loss = lambda tokens: model(input_ids=tokens[:, :-1], labels=tokens[:, :-1]).loss  # noqa: E731
    return Original(model, loss, write, "`generate` of transformers as in its generate.py, no cache")


def neon_rotation(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """What Neon's kernel does to x (B, T, H, K): it reads tables (T, K) as if their rows were K/2 wide."""
    assert interleaved
    T, half = x.shape[1], x.shape[-1] // 2
    cos, sin = (table.reshape(-1, half)[:T, None].float() for table in (cos, sin))
    even, odd = x.float().unflatten(-1, (half, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


def tape(folder: Path, config: dict[str, Any], device: torch.device) -> Original:
    """The cell that defines the classes, executed; as it is, so without a causal mask and with its unused parts. Its
    cache reads the batch size of the notebook: 1 where it writes."""
    notebook = json.loads((folder / CASES["tape"].source).read_text(encoding="utf-8"))
    cells = ("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code")
    namespace = {"torch": torch, "nn": nn, "F": F, "math": math, "Optimizer": torch.optim.Optimizer}
    namespace["batch_size"] = 1
    exec(next(cell for cell in cells if "class TapeTransformer" in cell), namespace)
    model = namespace["TapeTransformer"](**config).to(device).train()

    def loss(tokens: Tensor) -> Tensor:
        log_probabilities, _, _ = model(tokens[:, :-1])
        return -log_probabilities.gather(-1, tokens[:, 1:].unsqueeze(-1)).mean()

    @torch.no_grad()
    def write(ids: Tensor, n: int) -> Tensor:
        cache = None
        for _ in range(n):
            log_probabilities, cache = model(ids[:, -1:], past_kv=cache)
            ids = torch.cat((ids, torch.multinomial(log_probabilities[:, -1].float().exp(), 1)), -1)
        return ids

    return Original(model, loss, write, "loop of its notebook, with its cache")


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    name: str  # of the architecture here
    build: Callable[[Path, dict[str, Any], torch.device], Original]
    source: str  # the original's file, and the SHA-256 it has at the commit above
    sha256: str
    batch: dict[str, tuple[int, int]]  # sequences and their length, on CUDA and on a CPU
    times: dict[str, float]  # the original's speed asked of ours
    config: dict[str, Any]  # the original's constructor arguments
    variant: str = "sound"


LONG = {"cuda": (4, 1024), "cpu": (1, 1024)}
NGPT_CASE = Case(
    "ngpt",
    ngpt,
    "packages/nGPT_pytorch/nGPT.py",
    "e743060062ac798d",
    LONG,
    {"cuda": 10, "cpu": 1.5},
    dict(num_tokens=256, dim=512, depth=8, tied_embedding=True, attn_norm_qk=False, manual_norm_weights=False),
)
CASES = {
    "nyx": Case(
        "nyx",
        nyx,
        "packages/palm_rlhf_pytorch/palm.py",
        "32b6465ea835d018",
        LONG,
        {"cuda": 5, "cpu": 2},
        dict(
            model_dim=512, vocab_size=256, layer_depth=8, head_dimension=64, num_attention_heads=8, feedforward_scale=4
        ),
    ),
    "ngpt": NGPT_CASE,
    # weights normalised after each step: what nnx does unless told otherwise
    "ngpt-manual": replace(NGPT_CASE, config=NGPT_CASE.config | dict(manual_norm_weights=True)),
    "n4": Case(
        "n4",
        n4,
        "Nova-Nox-Neural-Network/model/N4_modeling.py",
        "8724295b0235123d",
        LONG,
        {"cuda": 3, "cpu": 2},
        dict(vocab_size=32064, hidden_size=768, inter_size=3072, heads=6, layers=6),
    ),
    "neon": Case(
        "neon",
        neon,
        "neon-transformer/neon/modeling_neon.py",
        "86932e83a5c5da45",
        LONG,
        {"cuda": 5, "cpu": 1.5},
        dict(
            vocab_size=32000,
            hidden_size=512,
            intermediate_size=1360,
            num_hidden_layers=8,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
        ),
    ),
    "tape": Case(
        "tape",
        tape,
        "nano-research-gpt/TapeTransformer.ipynb",
        "c140b3956246cb61",
        {"cuda": (16, 128), "cpu": (16, 128)},
        {"cuda": 40, "cpu": 2},
        dict(vocab_size=65, seq_len=128, embed_dim=256, num_heads=4, dropout=0.0),
        variant="tape",
    ),
}


def our_config(case: Case, seq_len: int) -> ModelConfig:
    """The original's configuration in our words."""
    fields = models.original(case.name).reference_config(**case.config) | {"variant": case.variant, "seq_len": seq_len}
    return models.make_config(case.name, **fields)
