"""An original's checkpoint to a model folder, without running anything that is in it."""

from __future__ import annotations

import pickle
import platform
import zipfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from nnx_cli import __version__, models
from nnx_cli.engine.files import new_folder, refuse_existing
from nnx_cli.engine.run import write_model_folder
from nnx_cli.engine.tokenizer import build_tokenizer
from nnx_cli.errors import CheckpointError

WRAPPERS = ("state_dict", "model_state_dict", "model")  # keys under which training scripts nest the weights
PREFIXES = ("module.", "_orig_mod.")  # what data-parallel and compiled wrappers put before names


def read_foreign(path: Path) -> dict[str, Tensor]:
    """Tensors by name from a safetensors file or a torch checkpoint, the latter by the loader that builds tensors only.

    Raises CheckpointError for anything else.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        if path.suffix == ".safetensors":
            content: Any = safetensors.torch.load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, zipfile.BadZipFile, EOFError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} is no checkpoint of tensors, or is damaged; nothing in it was run") from error
    for key in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors")
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def import_checkpoint(
    name: str, path: Path, out: Path, tokenizer: str | None = None, variant: str | None = None
) -> dict[str, Any]:
    """Write the model folder `out` from an original's checkpoint; returns its config.json.

    The original's constructor arguments are read off the shapes of its weights. Without `tokenizer`: bytes where the
    vocabulary is 256, else bare ids. Raises CheckpointError, OutputError.
    """
    refuse_existing(out)
    weights = read_foreign(path)
    arguments = models.infer_reference(name, weights)
    model = models.load_reference(name, arguments, weights, variant=variant)
    chosen = tokenizer or ("byte" if model.config.vocab_size == 256 else None)
    reader = build_tokenizer(chosen) if chosen else None
    if reader is not None and reader.vocab_size != model.config.vocab_size:
        raise CheckpointError(
            f"{path} has a vocabulary of {model.config.vocab_size:,}, {chosen} of {reader.vocab_size:,}"
        )
    config = {
        "format": 1,
        "model": {"name": name, "size": None, **models.config_dict(model.config)},
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokenizer": None if reader is None else {
            "kind": reader.kind, "vocab_size": reader.vocab_size, "fingerprint": reader.fingerprint,
        },
        "imported_from": path.name,
        "versions": {"nnx": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }  # fmt: skip
    with new_folder(out) as folder:
        write_model_folder(folder, config, reader, model.unique_state())
    return config
