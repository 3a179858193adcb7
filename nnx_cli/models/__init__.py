"""The zoo: one file per architecture, found by its name. Importing this imports no torch and no architecture.

Wherever an architecture is named here, it may also be the path of a file that ends in .py: the user's own.
"""

from __future__ import annotations

import importlib
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnx_cli.config import Field, read_fields
from nnx_cli.errors import CheckpointError, UsageError, nearest
from nnx_cli.models._file import (
    blaming,
    check_file,
    fields_of,
    fields_of_sizes,
    is_file,
    load_file,
    read_source,
    sha256_source,
    sizes_in,
    stem,
)

if TYPE_CHECKING:
    from types import ModuleType

    from torch import Tensor

    from nnx_cli.models._base import LanguageModel, ModelConfig, Recipe


FOLDER = Path(__file__).parent


@cache
def names() -> list[str]:
    """Architectures, in alphabetical order: the files of this folder without a leading underscore."""
    return sorted(path.stem for path in FOLDER.glob("[!_]*.py"))


def config_fields(name: str) -> tuple[Field, ...]:
    """The fields of an architecture's `Config`, shared ones first, read from the source without importing it."""
    shared = read_fields(FOLDER / "_base.py", "ModelConfig")
    own = fields_of(name) if is_file(name) else read_fields(FOLDER / f"{name}.py", "Config")
    return tuple({field.name: field for field in (*shared, *own)}.values())


def sizes(name: str) -> tuple[str, ...]:
    """Names of an architecture's sizes, smallest first, read from the source without importing it."""
    return sizes_in(_source(name))


def sized_fields(name: str) -> set[str]:
    """The fields that an architecture's sizes set, read from the source without importing it."""
    return fields_of_sizes(_source(name))


def _source(name: str) -> bytes:
    return read_source(name) if is_file(name) else (FOLDER / f"{name}.py").read_bytes()


def check_name(name: str) -> None:
    """Raise UsageError, with the nearest match, unless `name` is an architecture."""
    if is_file(name):
        check_file(name)
    elif name not in names():
        near = f"; did you mean {name}.py?" if Path(f"{name}.py").is_file() else nearest(name, names())
        raise UsageError(f"there is no model {name!r}{near}", fix=f"choose from {', '.join(names())}")


def _module(name: str) -> ModuleType:
    """The module of an architecture. A file of the user's runs here and nowhere else."""
    return load_file(name) if is_file(name) else importlib.import_module(f"nnx_cli.models.{name}")


def own_file(name: str, config: ModelConfig) -> Path | None:
    """The file of the user's whose code a model runs: that of its architecture, or one that its configuration names."""
    file = name if is_file(name) else config.code_file()
    return None if file is None else Path(file)


def describe(name: str, size: str | None, config: ModelConfig) -> dict[str, Any]:
    """What config.json says of a model: its architecture, size and fields, and the file whose code it runs where that
    is the user's, with its SHA-256."""
    file, fields = own_file(name, config), config_dict(config)
    if file is None:
        return {"name": name, "size": size, **fields}
    fields = {key: file.name if value == str(file) else value for key, value in fields.items()}
    return {"name": stem(name), "file": file.name, "sha256": sha256_source(str(file)), "size": size, **fields}


def make_config(name: str, *, size: str | None = None, **overrides: Any) -> ModelConfig:
    """The `Config` of an architecture: a named size, or the defaults, with single fields overridden.

    A size fixes `ffn_dim` and the like for its own width; with another `dim` they follow from that again.
    Raises UsageError for an unknown model, size or field, or values that do not fit together.
    """
    check_name(name)
    known = {field.name for field in config_fields(name)}
    for key in overrides.keys() - known:
        owners = [other for other in names() if key in {field.name for field in config_fields(other)}]
        which = f"; it belongs to {', '.join(owners)}" if owners else ""
        raise UsageError(f"{stem(name)} has no option --{key.replace('_', '-')}{which}")
    module = _module(name)
    shape: dict[str, Any] = {}
    if size is not None:
        if size not in module.SIZES:
            near = nearest(size, module.SIZES)
            raise UsageError(f"{stem(name)} has no size {size!r}{near}", fix=f"choose from {', '.join(module.SIZES)}")
        shape = dict(module.SIZES[size])
        if "dim" in overrides:
            optional = {field.name for field in config_fields(name) if field.default is None}
            shape = {key: value for key, value in shape.items() if key not in optional}
    with blaming(name, "making its Config"):
        config: ModelConfig = module.Config(**(shape | overrides))
    if is_file(name) and config.code_file() is not None:
        raise UsageError(f"{config.code_file()} goes with nnx's own architectures alone, not with {name}")
    return config


def build(name: str, *, vocab_size: int = 256, size: str | None = None, **overrides: Any) -> LanguageModel:
    """A freshly initialised model: `build("nyx", vocab_size=256, size="tiny", n_layers=4)`."""
    return from_config(name, make_config(name, size=size, vocab_size=vocab_size, **overrides))


def recipe(name: str) -> Recipe:
    """What an architecture learns best from."""
    return _module(name).Model.recipe


def from_config(name: str, config: ModelConfig) -> LanguageModel:
    """A freshly initialised model of architecture `name`."""
    module = _module(name)
    with blaming(name, "making its Model"):
        model: LanguageModel = module.Model(config)
    return model


def original(name: str) -> ModuleType:
    """The module that reads the checkpoints of an architecture's original. Raises UsageError where it has none."""
    check_name(name)
    if not has_original(name):
        raise UsageError(f"{stem(name)} has no original to load from")
    return importlib.import_module(f"nnx_cli.models.originals.{name}")


def has_original(name: str) -> bool:
    """Whether checkpoints of an architecture's original can be read."""
    return not is_file(name) and (FOLDER / "originals" / f"{name}.py").is_file()


def load_reference(
    name: str,
    config: dict[str, Any],
    weights: dict[str, Tensor],
    *,
    variant: str | None = None,
    noise: dict[str, Tensor] | None = None,
) -> LanguageModel:
    """A model from an original's constructor arguments and weights, both under the original's names.

    `variant` is a value of the `variant` field (default: the architecture's); `noise` replaces random draws of
    architectures that have any. Raises CheckpointError where names or shapes do not match.
    """
    model = _reference_model(name, config, variant)
    if noise:
        model.set_noise(noise)
    own, tensors = model.state_without_ties(), original(name).Tensors(model)
    unknown = sorted(weights.keys() - tensors.save(own).keys() - tensors.unused)
    try:
        state = tensors.load(weights)
    except KeyError as error:
        raise CheckpointError(f"weights do not belong to this {name}: {error} is missing") from error
    if unknown or state.keys() != own.keys():
        odd = (unknown or sorted(state.keys() ^ own.keys()))[0]
        raise CheckpointError(f"weights do not belong to this {name}: {odd} has no place in it")
    for key, tensor in state.items():
        if own[key].shape != tensor.shape:
            raise CheckpointError(f"{key} would be {tuple(tensor.shape)}, this {name} needs {tuple(own[key].shape)}")
        own[key].copy_(tensor)
    return model


def _reference_model(name: str, config: dict[str, Any], variant: str | None) -> LanguageModel:
    """A model of the shape that an original's constructor arguments describe."""
    from nnx_cli.layers.lora import add_adapters

    arguments = {key: value for key, value in config.items() if key != "lora_rank_applied"}
    fields = original(name).reference_config(**arguments) | ({} if variant is None else {"variant": variant})
    model = from_config(name, make_config(name, **fields))
    if rank := config.get("lora_rank_applied"):
        add_adapters(model, rank)
    return model


def reference_names(name: str, config: dict[str, Any], *, variant: str | None = None) -> frozenset[str]:
    """Names of the tensors that an original has for these constructor arguments, unused ones too."""
    model = _reference_model(name, config, variant)
    tensors = original(name).Tensors(model)
    return tensors.unused | tensors.save(model.state_without_ties()).keys()


def infer_reference(name: str, weights: dict[str, Tensor]) -> dict[str, Any]:
    """The original's constructor arguments that fit a checkpoint's weights. Raises CheckpointError where none do."""
    reader = original(name)
    try:
        return reader.infer_reference(weights)
    except (KeyError, ValueError) as error:
        why = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"this is no checkpoint of {name}: {why}") from error


def reference_tensors(model: LanguageModel, grads: bool = False) -> dict[str, Tensor]:
    """Weights, or their gradients, under the original's names and in its layout; absent gradients are left out."""
    tensors = original(model.architecture).Tensors(model)
    if not grads:
        return tensors.save(model.state_without_ties())
    return tensors.save({name: p.grad for name, p in model.named_parameters() if p.grad is not None})


def config_dict(config: ModelConfig) -> dict[str, Any]:
    """All fields of a model configuration, derived ones filled in, as JSON values."""
    return asdict(config)
