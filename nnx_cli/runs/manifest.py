"""The files that make a folder a model: config.json, tokenizer.json, weights, and manifest.json with their SHA-256."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnx_cli import __version__, models
from nnx_cli.data.tokenizers.base import Tokenizer
from nnx_cli.data.tokenizers.hf_json import load_tokenizer, save_tokenizer
from nnx_cli.errors import CheckpointError, DataError
from nnx_cli.models._base import ModelConfig
from nnx_cli.runs.tensors import write_tensors
from nnx_cli.system.files import (
    check_types,
    cleared,
    read_json,
    refused_output,
    replace_file,
    sha256_file,
    sha256_regular,
    sync_folder,
    to_json,
    write_synced,
)

FORMAT = 1
BEST = "model.safetensors"
SOURCE = "model.py.txt"  # of a file of the user's whose code the model runs: to be read, never run
CONFIG_TYPES = {  # of what config.json may hold, that which something here relies on
    "model": {"name": str, "file": str, "sha256": str},
    "parameters": int,
    "tokenizer": {},
    "training": {},
    "sampling": {"max_new_tokens": int},
    "data": {"folder": str, "fingerprint": str},
    "lora": {"rank": int},
    "quantization": {"kept": list},
    "versions": {"torch": str},
}


def versions() -> dict[str, str]:
    """What a file was written with."""
    return {"nnx": __version__, "torch": torch.__version__, "python": platform.python_version()}


def describe_model(
    name: str, size: str | None, config: ModelConfig, n_parameters: int, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """What config.json says of every model, however it was made."""
    known = None
    if tokenizer is not None:
        known = {
            "kind": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size,
            "fingerprint": tokenizer.fingerprint,
        }
    return {
        "format": FORMAT,
        "model": models.describe(name, size, config),
        "parameters": n_parameters,
        "tokenizer": known,
        "versions": versions(),
    }


def write_model_folder(
    folder: Path,
    config: Mapping[str, Any],
    tokenizer: Tokenizer | None,
    weights: Mapping[str, Tensor] | None,
    file: Path | None = None,
) -> None:
    """Write config.json, tokenizer.json, the weights where there are any, and their manifest into an empty folder.

    The text of a `file` of the user's is copied whose code the model runs.
    """
    write_synced(folder / "config.json", to_json(dict(config)))
    files = {"config.json": sha256_file(folder / "config.json")}
    if tokenizer is not None:
        save_tokenizer(tokenizer, folder / "tokenizer.json")
        files["tokenizer.json"] = sha256_file(folder / "tokenizer.json")
    if file is not None:
        write_synced(folder / SOURCE, models.read_source(str(file)))
        files[SOURCE] = sha256_file(folder / SOURCE)
        if files[SOURCE] != config["model"]["sha256"]:
            raise CheckpointError(f"{file} has changed since it was read", fix="run the command again")
    if weights is not None:
        files[BEST] = write_tensors(folder / BEST, weights)
    write_synced(folder / "manifest.json", to_json({"format": FORMAT, "files": files}))


def replace_listed(folder: Path, name: str, digest: str, write: Callable[[Path], Any]) -> None:
    """Replace a file of the manifest: while it changes, the manifest allows the old content and the new; a file
    that was not there does not count until it is listed. Raises OutputError."""
    path = folder / "manifest.json"
    manifest = read_json(path)
    files, replacing = manifest["files"], manifest.pop("replacing", {})
    if name in files:
        replace_file(path, to_json(manifest | {"replacing": replacing | {name: digest}}))
    temporary = folder / f".tmp-{name}-{os.getpid()}"
    with refused_output(path), cleared(temporary):
        write(temporary)
        os.replace(temporary, folder / name)
        sync_folder(folder)
    replacing.pop(name, None)
    manifest |= {"files": files | {name: digest}} | ({"replacing": replacing} if replacing else {})
    replace_file(path, to_json(manifest))


def allowed_digests(folder: Path, name: str) -> set[str]:
    """SHA-256 that the manifest allows a file of a model folder to have: two while it is being replaced."""
    manifest = read_json(folder / "manifest.json")
    files, replacing = (
        value if isinstance(value, dict) else {} for value in (manifest.get("files"), manifest.get("replacing"))
    )
    return {str(table[name]) for table in (files, replacing) if name in table}


def read_digests(folder: Path, names: tuple[str, ...]) -> dict[str, str]:
    """SHA-256 of each of `names` in a folder. Raises CheckpointError where the manifest is damaged or from the
    future."""
    manifest = read_json(folder / "manifest.json")
    check_format(manifest, folder / "manifest.json")
    files = manifest.get("files")
    if not isinstance(files, dict) or any(not isinstance(files.get(name), str) for name in names):
        raise CheckpointError(f"{folder / 'manifest.json'} is damaged: it does not list {', '.join(names)}")
    return files


def check_format(content: Mapping[str, Any], path: Path) -> None:
    """Raise CheckpointError unless a file says that it has the format this version reads."""
    if content.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has format {str(content.get('format'))[:20]}; this version of nnx reads format {FORMAT}"
        )


def read_verified_config(folder: Path) -> dict[str, Any]:
    """config.json of a run or model folder. Raises CheckpointError where there is none or it was altered."""
    path = folder / "config.json"
    if not os.path.lexists(path):
        raise CheckpointError(f"{folder} is no run of nnx: it has no config.json", fix="see the runs: nnx list")
    if sha256_regular(path) not in allowed_digests(folder, "config.json"):
        raise CheckpointError(f"{path} is damaged: its checksum is not the recorded one")
    config = read_json(path)
    check_format(config, path)
    described = config.get("model")
    if not isinstance(described, dict) or "name" not in described or "parameters" not in config:
        raise CheckpointError(f"{path} is damaged: it describes no model")
    check_types(config, CONFIG_TYPES, path)
    if described.get("variant") == "seed":  # its older name, which nothing writes
        described["variant"] = "original"
    return config


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a run or model folder, or None for a model over bare ids. Raises CheckpointError."""
    path = folder / "tokenizer.json"
    allowed = allowed_digests(folder, "tokenizer.json")
    if not allowed and not os.path.lexists(path):
        return None
    if sha256_regular(path) not in allowed:
        raise CheckpointError(f"{path} is damaged: its checksum is not the recorded one")
    try:
        return load_tokenizer(path)
    except DataError as error:
        raise CheckpointError(f"{error}") from error
