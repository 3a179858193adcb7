"""A folder that Hugging Face's transformers loads: config.json, weights, tokenizer, generation settings, model card."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnx_cli.config import SampleConfig
from nnx_cli.convert.export._base import Found, Source
from nnx_cli.convert.export._compare import compare
from nnx_cli.convert.hub_llama import to_hub, to_hub_config
from nnx_cli.convert.modeling.write import make_modeling
from nnx_cli.data.conversations import ASSISTANT, END, SYSTEM, USER, Message, template_of
from nnx_cli.data.tokenizers.base import Tokenizer
from nnx_cli.data.tokenizers.hf_json import save_tokenizer
from nnx_cli.errors import QualityError
from nnx_cli.models import llama
from nnx_cli.models._base import ModelConfig
from nnx_cli.runs.tensors import size_on_disk, write_tensors
from nnx_cli.system.files import require_space, to_json, write_synced
from nnx_cli.system.signals import half_made

LIBRARIES = ("transformers",)
FILE = None
TOLERANCE = 1e-4  # of a logit, in float32
SAMPLING = {"do_sample": True, "temperature": SampleConfig.temperature, "top_k": SampleConfig.top_k or 0}
PROBE = "Naïve café, 小猫 — 1234.5 €\n\t\r\n  don't   WE'LL 🙂\0 <|endoftext"  # a text that tells tokenizers apart
LOADING = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this one, or the name of its repository
tokenizer = AutoTokenizer.from_pretrained(folder{trust})
model = AutoModelForCausalLM.from_pretrained(folder{trust})
ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens={n})[0]))
```"""
LOADING_BARE = """```python
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("."{trust})  # this folder, or the name of its repository
print(model.generate(torch.tensor([[0]]), max_new_tokens={n})[0].tolist())  # ids of a tokenizer that is not here
```"""
OWN_CODE = """The architecture is in `modeling_{name}.py`, which `trust_remote_code=True` runs. It takes texts of one
length at a time, without padding."""


def why_not(name: str, config: ModelConfig) -> str | None:
    """As in the base."""
    if getattr(config, "decoder", "") == "function" and config.variant == "original":
        return "variant original draws at random which function a token takes"
    if getattr(config, "kv_latent_dim", None) is not None:
        return "its keys and values rise from latents, which transformers' caches do not hold"
    return None


def write(source: Source, folder: Path) -> None:
    """As in the base."""
    model, tokenizer = source.model, source.tokenizer
    template, end = template_of(tokenizer), None if tokenizer is None else tokenizer.eot_id
    special = {"bos_token_id": None, "eos_token_id": end if template is None else [template.end_id, template.begin_id]}
    if isinstance(model, llama.Model):
        state, described, use = to_hub(model), to_hub_config(model.config), _loading(source)
    else:
        modeling = make_modeling(source.name, model)
        state, described = model.state_without_ties(), modeling.config
        state = {name: tensor for name, tensor in state.items() if name not in modeling.unused}
        use = f"{_loading(source)}\n\n{OWN_CODE.format(name=source.name)}"
        write_synced(folder / f"modeling_{source.name}.py", modeling.text.encode())
    require_space(folder, size_on_disk(state))
    write_synced(folder / "config.json", to_json(described | special | {"dtype": "float32"}))
    write_synced(folder / "generation_config.json", to_json(special | SAMPLING))
    if tokenizer is not None:
        _write_tokenizer(tokenizer, model.config.seq_len, folder)
    write_synced(folder / "README.md", source.card.to_markdown(use, [source.name], "transformers").encode())
    write_tensors(folder / "model.safetensors", state, {"format": "pt"}, partial(source.tell, "writing"))


def _loading(source: Source) -> str:
    """How a model is loaded, for its card."""
    trust = "" if isinstance(source.model, llama.Model) else ", trust_remote_code=True"
    text = LOADING_BARE if source.tokenizer is None else LOADING
    return text.format(trust=trust, n=max(1, min(100, source.model.config.seq_len // 2)))


def _write_tokenizer(tokenizer: Tokenizer, seq_len: int, folder: Path) -> None:
    """tokenizer.json, and what AutoTokenizer asks for beside it."""
    save_tokenizer(tokenizer, folder / "tokenizer.json")
    described: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": seq_len,
        "clean_up_tokenization_spaces": False,
    }
    if (template := template_of(tokenizer)) is not None:
        described["eos_token"] = END
        write_synced(folder / "chat_template.jinja", template.jinja.encode())
    elif tokenizer.eot_id is not None:
        name = next(name for name, token_id in tokenizer.specials.items() if token_id == tokenizer.eot_id)
        described["eos_token"] = name
    write_synced(folder / "tokenizer_config.json", to_json(described))


def check(source: Source, folder: Path) -> Found:
    """As in the base."""
    with _quiet_transformers():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        here = dict(local_files_only=True, trust_remote_code=not isinstance(source.model, llama.Model))
        if source.tokenizer is not None:
            _check_tokenizer(source.tokenizer, AutoTokenizer.from_pretrained(folder, **here), source.ids)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **here).eval()
        model.generation_config.eos_token_id = None  # compared are tokens behind an end too

        def generate(prompt: Tensor, n: int) -> Tensor:
            """`n` greedy tokens."""
            whole = torch.ones_like(prompt)
            ids = model.generate(prompt, attention_mask=whole, max_new_tokens=n, min_new_tokens=n, do_sample=False)
            return ids[0, prompt.shape[1] :]

        return compare(source, lambda ids: model(ids, use_cache=False).logits, generate, TOLERANCE)


def _check_tokenizer(ours: Tokenizer, theirs: Any, ids: Tensor) -> None:
    """Raise QualityError where both cut a text differently."""
    for text in (ours.decode(ids.flatten().numpy()), PROBE):
        if theirs(text, add_special_tokens=False)["input_ids"] != ours.encode(text).tolist():
            raise QualityError("written for transformers and loaded again, the tokenizer gives other ids")
    if (template := template_of(ours)) is not None:
        said = [Message(SYSTEM, "Be kind."), Message(USER, PROBE), Message(ASSISTANT, "Yes."), Message(USER, "Why?")]
        rows = [{"role": role, "content": content} for role, content in said]
        text = theirs.apply_chat_template(rows, tokenize=False, add_generation_prompt=True)
        if theirs(text, add_special_tokens=False)["input_ids"] != template.prompt(said):
            raise QualityError("written for transformers and loaded again, the chat template gives other ids")


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Nothing but errors on the screen meanwhile, and what transformers makes of our code in no folder of the
    user's."""
    from transformers import dynamic_module_utils
    from transformers.utils import logging

    level, bars, place = (
        logging.get_verbosity(),
        logging.is_progress_bar_enabled(),
        dynamic_module_utils.HF_MODULES_CACHE,
    )
    with half_made(), tempfile.TemporaryDirectory(prefix="nnx-") as modules:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        dynamic_module_utils.HF_MODULES_CACHE = modules
        try:
            yield
        finally:
            dynamic_module_utils.HF_MODULES_CACHE = place
            logging.set_verbosity(level)
            if bars:
                logging.enable_progress_bar()
            if modules in sys.path:
                sys.path.remove(modules)
