"""A folder that Hugging Face's transformers loads: config.json, weights, tokenizer, generation settings, model card."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnx_cli.convert.export._base import Found, Source
from nnx_cli.convert.export._compare import compare
from nnx_cli.convert.hub_llama import hub_config, to_hub
from nnx_cli.data.tokenizers.base import Tokenizer
from nnx_cli.data.tokenizers.hf_json import save_tokenizer
from nnx_cli.models._base import ModelConfig
from nnx_cli.models.llama import Model
from nnx_cli.runs.tensors import size_on_disk, write_tensors
from nnx_cli.system.files import require_space, to_json, write_synced

LIBRARIES = ("transformers",)
FILE = None
TOLERANCE = 1e-4  # of a logit, in float32
HOW_TO_LOAD = """
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER")
ids = tokenizer("Once", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=100, do_sample=True)[0]))
```
"""


def why_not(name: str, config: ModelConfig) -> str | None:
    """As in the base."""
    return None if name == "llama" else "transformers has none of this kind"


def write(source: Source, folder: Path) -> None:
    """As in the base."""
    model, tokenizer = source.model, source.tokenizer
    assert isinstance(model, Model)
    config, state = model.config, to_hub(model)
    require_space(folder, size_on_disk(state))
    end = None if tokenizer is None else tokenizer.eot_id
    special = {"bos_token_id": None, "eos_token_id": end}
    described = hub_config(config) | special | {"dtype": "float32"}
    write_synced(folder / "config.json", to_json(described))
    write_synced(folder / "generation_config.json", to_json(special | {"do_sample": True, "temperature": 0.8}))
    if tokenizer is not None:
        _write_tokenizer(tokenizer, config.seq_len, folder)
    card = source.card.to_markdown(HOW_TO_LOAD, [source.name], "transformers")
    write_synced(folder / "README.md", card.encode())
    write_tensors(folder / "model.safetensors", state, {"format": "pt"}, partial(source.tell, "writing"))


def _write_tokenizer(tokenizer: Tokenizer, seq_len: int, folder: Path) -> None:
    """tokenizer.json, and what AutoTokenizer asks for beside it."""
    save_tokenizer(tokenizer, folder / "tokenizer.json")
    described: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": seq_len,
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.eot_id is not None:
        name = next(name for name, token_id in tokenizer.specials.items() if token_id == tokenizer.eot_id)
        described["eos_token"] = name
    write_synced(folder / "tokenizer_config.json", to_json(described))


def check(source: Source, folder: Path) -> Found:
    """As in the base."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()

    def generate(prompt: Tensor, n: int) -> Tensor:
        """`n` greedy tokens."""
        ids = model.generate(prompt, max_new_tokens=n, min_new_tokens=n, do_sample=False)
        return ids[0, prompt.shape[1] :]

    return compare(source, lambda ids: model(ids, use_cache=False).logits, generate, TOLERANCE)
