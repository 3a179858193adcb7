"""An original's checkpoint to a model folder, without running anything that is in it."""

from __future__ import annotations

import pickle
import struct
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from nnx_cli import models
from nnx_cli.data.tokenizers.build import build_tokenizer
from nnx_cli.errors import CheckpointError, UsageError
from nnx_cli.models._base import LanguageModel
from nnx_cli.runs.manifest import describe_model, write_model_folder
from nnx_cli.runs.tensors import check_finite
from nnx_cli.system.files import new_folder, refuse_existing

MAX_REPEATS = 4  # how often a file may use the same elements: tied matrices and views do, bombs do more
DAMAGE = (
    pickle.UnpicklingError,
    SafetensorError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    MemoryError,
    AssertionError,
    NotImplementedError,
)
NONSENSE = (ArithmeticError, LookupError, AttributeError, RuntimeError, TypeError, ValueError)  # well formed, unusable
WRAPPERS = ("state_dict", "model_state_dict", "model")  # keys under which training scripts nest the weights
PREFIXES = ("module.", "_orig_mod.")  # what data-parallel and compiled wrappers put before names


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Tensors by name from a safetensors file or a torch checkpoint, the latter by the loader that builds tensors only.

    Raises CheckpointError for anything else.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        if path.suffix == ".safetensors":
            content: Any = safetensors.torch.load_file(path)
        else:
            if zipfile.is_zipfile(path):
                _check_archive(path)
            with warnings.catch_warnings(action="ignore"):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (*DAMAGE, *NONSENSE) as error:
        raise CheckpointError(f"{path} is no checkpoint of tensors, or is damaged; nothing in it was run") from error
    for key in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors")
    for tensor in tensors.values():
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise CheckpointError(f"{path} holds tensors of a kind that no original has")
    n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if n_bytes > MAX_REPEATS * path.stat().st_size:
        raise CheckpointError(f"{path} is damaged: its tensors are larger than the file")
    check_finite(tensors, path)
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _check_archive(path: Path) -> None:
    """Raise CheckpointError where the zip archive that torch writes would unpack to more than it is, or where what it
    holds is not what was written (torch itself does not look at the checksums)."""
    with zipfile.ZipFile(path) as archive:
        if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:
            raise CheckpointError(f"{path} is damaged: it unpacks to more than its size")
        if damaged := archive.testzip():
            raise CheckpointError(f"{path} is damaged: the checksum of {damaged} is not the recorded one")


def _load_original(name: str, path: Path, weights: dict[str, Tensor], variant: str | None) -> LanguageModel:
    """The model that an original's weights make, whose shape is read off theirs. Raises CheckpointError where they make
    none, UsageError for a variant there is not."""
    if variant is not None:
        models.make_config(name, variant=variant)
    try:
        arguments = models.infer_reference(name, weights)
    except NONSENSE as error:
        raise CheckpointError(f"{path} is no checkpoint of {name}: {error}") from error
    try:
        shapes = {key: tensor.to("meta") for key, tensor in weights.items()}
        with torch.device("meta"):  # names and shapes, before they take any memory
            models.load_reference(name, arguments, shapes, variant=variant)
        return models.load_reference(name, arguments, weights, variant=variant)
    except (UsageError, *NONSENSE) as error:
        raise CheckpointError(f"{path} is no checkpoint of {name}: {error}") from error


def import_checkpoint(
    name: str, path: Path, out: Path, tokenizer: str | None = None, variant: str | None = None
) -> dict[str, Any]:
    """Write the model folder `out` from an original's checkpoint; returns its config.json.

    The original's constructor arguments are read off the shapes of its weights. Without `tokenizer`: bytes where the
    vocabulary is 256, else bare ids. Raises UsageError for an architecture without an original, CheckpointError,
    OutputError.
    """
    models.original(name)
    refuse_existing(out)
    weights = read_checkpoint(path)
    model = _load_original(name, path, weights, variant)
    chosen = tokenizer or ("byte" if model.config.vocab_size == 256 else None)
    known = build_tokenizer(chosen) if chosen else None
    if known is not None and known.vocab_size != model.config.vocab_size:
        raise CheckpointError(
            f"{path} has a vocabulary of {model.config.vocab_size:,}, {chosen} of {known.vocab_size:,}"
        )
    n_parameters = sum(p.numel() for p in model.parameters())
    config = describe_model(name, None, model.config, n_parameters, known) | {"imported_from": path.name}
    with new_folder(out) as folder:
        write_model_folder(folder, config, known, model.state_without_ties())
    return config
