"""A folder of Hugging Face's Hub to a model folder: `LlamaForCausalLM` in safetensors, in one file or several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from nnx_cli import models
from nnx_cli.convert.hub_llama import CLASS, UNUSED, from_hub, from_hub_config
from nnx_cli.convert.import_original import NO_TOKENIZER, check_ready
from nnx_cli.data.tokenizers.base import Tokenizer
from nnx_cli.data.tokenizers.build import build_tokenizer
from nnx_cli.data.tokenizers.hf_json import load_tokenizer
from nnx_cli.errors import CheckpointError, DataError, UsageError
from nnx_cli.layers.quantized import widen
from nnx_cli.models.llama import Config
from nnx_cli.runs.manifest import describe_model, write_model_folder
from nnx_cli.runs.tensors import check_finite, read_header, size_on_disk
from nnx_cli.system.files import new_folder, open_regular, read_json, refuse_existing, require_space, sha256_file

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"


def import_hub(name: str, path: Path, out: Path, tokenizer: str | None = None) -> tuple[dict[str, Any], list[str]]:
    """Write the model folder `out` from a folder of the Hub's layout; returns its config.json, and notes on what was
    left out.

    Without `tokenizer` the folder's own is taken; "none" imports a model over bare ids. Nothing in the folder is run.
    Raises CheckpointError for another architecture, or naming what does not map, and OutputError.
    """
    if name != "llama":
        raise CheckpointError(
            f"{path} is a folder, and folders are read as {CLASS} alone", fix="name a file, or --model llama"
        )
    check_ready(tokenizer)
    refuse_existing(out)
    config = _read_config(path)
    tensors, files = _read_weights(path)
    try:
        state = widen(from_hub(config, tensors))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    check_finite(state, path)
    known = _read_tokenizer(path, tokenizer, config.vocab_size)
    origin = {"imported_from": path.resolve().name, "imported_sha256": sha256_file(files[0])}
    n_parameters = sum(tensor.numel() for tensor in state.values())
    described = describe_model(name, None, config, n_parameters, known) | origin
    with new_folder(out) as folder:
        require_space(folder, size_on_disk(state))
        write_model_folder(folder, described, known, state)
    unused = [key for key in tensors if UNUSED.fullmatch(key)]
    told = f"left out of {path}, for they follow from rope_theta: {', '.join(unused[:2])}{', …' * (len(unused) > 2)}"
    return described, [told] if unused else []


def _read_config(path: Path) -> Config:
    """The shape that config.json describes."""
    found = read_json(path / "config.json", follow_links=True)
    try:
        config = models.make_config("llama", **from_hub_config(found))
    except (CheckpointError, UsageError) as error:
        raise CheckpointError(f"{path}: {str(error).replace('--', '')}") from error
    assert isinstance(config, Config)
    return config


def _read_weights(path: Path) -> tuple[dict[str, Tensor], list[Path]]:
    """All tensors of a folder, and the files that they are in."""
    if (path / WEIGHTS).is_file():
        files = [path / WEIGHTS]
    elif (path / INDEX).is_file():
        names = read_json(path / INDEX, follow_links=True).get("weight_map")
        if not isinstance(names, dict) or not names or not all(_is_plain(name) for name in names.values()):
            raise CheckpointError(f"{path / INDEX} is damaged: its weight_map names no files of this folder")
        files = [path / name for name in sorted(set(names.values()))]
    else:
        others = sorted(each.name for each in path.glob("*.bin"))
        has = f"; it has {others[0]}, which may run code" if others else ""
        raise CheckpointError(
            f"{path} has no {WEIGHTS}{has}",
            fix='save it where it was made: model.save_pretrained("FOLDER", safe_serialization=True)',
        )
    tensors: dict[str, Tensor] = {}
    for file in files:
        more = _read_tensors(file)
        if twice := tensors.keys() & more.keys():
            raise CheckpointError(f"{file} has {sorted(twice)[0]}, which another file has too")
        tensors |= more
    return tensors, files


def _is_plain(name: object) -> bool:
    """Whether a name is that of a file in the same folder."""
    return isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name and "\\" not in name


def _read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file, which may be a link into a cache."""
    with open_regular(file, follow_links=True) as opened:
        read_header(opened, file)
        data = opened.read()
    try:
        return safetensors.torch.load(data)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error


def _read_tokenizer(path: Path, chosen: str | None, vocab_size: int) -> Tokenizer | None:
    """The tokenizer that was asked for, or the folder's own where it has one."""
    bare = f"import it over bare ids: --tokenizer {NO_TOKENIZER}"
    if chosen == NO_TOKENIZER or (chosen is None and not (path / TOKENIZER).is_file()):
        return None
    try:
        known = load_tokenizer(path / TOKENIZER) if chosen is None else build_tokenizer(chosen)
    except DataError as error:
        raise CheckpointError(f"{error}", fix=bare) from error
    if known.vocab_size != vocab_size:
        raise CheckpointError(
            f"{path} has a vocabulary of {vocab_size:,}, its tokenizer of {known.vocab_size:,}", fix=bare
        )
    return known
