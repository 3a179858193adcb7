"""A MODEL of the command line to a model that computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnx_cli import models
from nnx_cli.config import coerce
from nnx_cli.data.tokenizers.base import Tokenizer
from nnx_cli.errors import CheckpointError, UsageError, quoted
from nnx_cli.layers.lora import add_adapters
from nnx_cli.layers.quantized import Quantization, quantize_layers, restore_stored, unpack_slow_layers, widen
from nnx_cli.models._base import LanguageModel
from nnx_cli.runs.checkpoint import check_no_link, step_folder, steps_in
from nnx_cli.runs.manifest import BEST, SOURCE, allowed_digests, read_digests, read_tokenizer, read_verified_config
from nnx_cli.runs.tensors import load_weights, read_tensors
from nnx_cli.system.device import DTYPES
from nnx_cli.system.files import follow, relative


@dataclass(frozen=True)
class ModelRef:
    """A MODEL of the command line: a folder and which of its weights."""

    folder: Path
    which: str = "best"  # best, last or a step
    file: Path | None = None  # of the user's, whose code it runs, where that was named

    @property
    def label(self) -> str:
        """How the user would name it."""
        return str(self.folder) if self.which == "best" else f"{self.folder}@{self.which}"

    @property
    def as_argument(self) -> str:
        """How a command names it that can be pasted."""
        return quoted(self.label) + self.naming

    @property
    def naming(self) -> str:
        """What commands on it need besides its name: the file of the user's whose code it runs."""
        return "" if self.file is None else f" {option_of(self.config)} {quoted(self.file)}"

    @property
    def config(self) -> dict[str, Any]:
        """The contents of config.json. Raises CheckpointError."""
        return read_verified_config(self.folder)

    def config_at(self, out: Path) -> dict[str, Any]:
        """The config.json of a model made from this one in the folder `out`: the way to the data is another."""
        config = self.config
        if data := config.get("data"):
            config["data"] = data | {"folder": relative(follow(self.folder, data["folder"]), out)}
        return config

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Its tokenizer, or None for a model over bare ids. Raises CheckpointError."""
        return read_tokenizer(self.folder)

    @property
    def start_ids(self) -> list[int]:
        """What its text begins with where there is no prompt: tokens that it was trained on, as far as that is known.
        Raises CheckpointError."""
        config = self.config
        known, vocab_size = (config.get("sampling") or {}).get("start_ids"), config["model"].get("vocab_size")
        if known and isinstance(known, list) and all(type(i) is int and 0 <= i < vocab_size for i in known):
            return known
        if (tokenizer := self.tokenizer) is None:
            return [0]
        return [tokenizer.eot_id] if tokenizer.eot_id is not None else tokenizer.encode("\n").tolist()

    def weights(self) -> tuple[Path, dict[str, Tensor]]:
        """The tensors and where they were read. Without a validated best, `best` is the last checkpoint."""
        best = allowed_digests(self.folder, BEST)
        if self.which == "best" and best:
            path = self.folder / BEST
            try:
                return path, read_tensors(path, *best)
            except CheckpointError as error:
                others = (self.folder / "checkpoints").is_dir()
                fix = f"try the last checkpoint: {quoted(f'{self.folder}@last')}" if others else None
                raise CheckpointError(f"{error}", fix=fix) from error
        folder = self.folder / "checkpoints"
        check_no_link(folder)
        steps = steps_in(folder)
        step = int(self.which) if self.which.isdecimal() else (steps[-1] if steps else -1)
        if step not in steps:
            have = f"it has {', '.join(map(str, steps))}" if steps else "it has none"
            raise CheckpointError(f"{self.folder} has no checkpoint {self.which}; {have}")
        path = step_folder(folder, step)
        check_no_link(path)
        name = "model.safetensors"
        return path / name, read_tensors(path / name, read_digests(path, (name,))[name])


BANK = "bank_file"  # the field that names a file with functions


def option_of(config: Mapping[str, Any]) -> str:
    """The option that names the file of the user's whose code a model runs."""
    return "--model" if config["model"].get(BANK) is None else "--bank-file"


def shape_of(config: Mapping[str, Any], source: Path, file: Path | None = None) -> tuple[str, dict[str, Any]]:
    """The architecture that a config.json describes, as `architecture_of` says, and the values of its fields."""
    name = architecture_of(config, source, file)
    fields = {key: value for key, value in config["model"].items() if key not in ("name", "size", "file", "sha256")}
    if fields.get(BANK) is not None and not models.is_file(name):
        fields[BANK] = str(file)
    return name, fields


def architecture_of(config: Mapping[str, Any], source: Path, file: Path | None = None) -> str:
    """The architecture that a config.json describes: its name, or the path of the user's `file` that it came from.

    Raises CheckpointError where it is none, where the model runs code of a file and none is named, or one of another
    content: opening a folder runs no code. Raises UsageError where a file is named for one that needs none.
    """
    described = config.get("model")
    if not isinstance(described, dict) or "name" not in described:
        raise CheckpointError(f"{source / 'config.json'} names no model of this version of nnx")
    is_known, has_bank = described["name"] in models.names(), described.get(BANK) is not None
    if (origin := described.get("file", described[BANK] if has_bank else None)) is not None:
        if file is None:
            what = "bank" if has_bank else "architecture"
            raise CheckpointError(
                f"the {what} of {source} is in {origin}, and opening a folder runs no code",
                fix=f"name the file: {option_of(config)} {quoted(origin)} (its text is in {source / SOURCE})",
            )
        if models.sha256_source(str(file)) != described.get("sha256"):
            raise CheckpointError(
                f"{file} is not the file that {source} was made with: its SHA-256 differs",
                fix=f"the text it was made with is in {source / SOURCE}",
            )
        return described["name"] if has_bank and is_known else str(file)
    if file is not None:
        raise UsageError(f"{source} is a {described['name']}, which needs no file", fix="leave it out")
    if not is_known:
        raise CheckpointError(f"{source / 'config.json'} names no model of this version of nnx")
    return described["name"]


def model_from_config(config: Mapping[str, Any], source: Path, file: Path | None = None) -> LanguageModel:
    """The model that a config.json describes, on the meta device. Raises CheckpointError where it describes none."""
    name, fields = shape_of(config, source, file)
    try:
        stated = {key: value for key, value in fields.items() if value is not None}
        coerce(models.config_fields(name), stated, "its model")
        with torch.device("meta"):
            model = models.build(name, **fields)
            if config.get("lora"):
                add_adapters(model, config["lora"]["rank"])
            return model
    except (UsageError, TypeError, KeyError, RuntimeError) as error:  # the last: a size beyond what torch can count
        raise CheckpointError(f"{source / 'config.json'} describes no {models.stem(name)}: {error}") from error


def load_model(ref: ModelRef, device: torch.device, precision: str = "fp32") -> LanguageModel:
    """The model of a MODEL, in evaluation mode, computing in `precision` on `device`. Raises CheckpointError."""
    config = ref.config
    model = model_from_config(config, ref.folder, ref.file)
    path, state = ref.weights()
    if "quantization" in config:
        quantize_layers(model, _read_quantization(config["quantization"], ref.folder))
    training = config.get("training") or {}
    if "quantization" in config or training.get("weight_precision") == "bf16":
        state = widen(state)
    return fill_model(model, state, path, device, precision)


def fill_model(
    model: LanguageModel, state: Mapping[str, Tensor], source: Path, device: torch.device, precision: str
) -> LanguageModel:
    """`model` with the tensors of `state`, in evaluation mode. Raises CheckpointError where they are another's."""
    load_weights(model, restore_stored(model, state), source, device)
    model.compute_dtype = DTYPES[precision]
    unpack_slow_layers(model, model.compute_dtype)
    return model.eval()


def _read_quantization(described: Mapping[str, Any], source: Path) -> Quantization:
    """How the matrices of a model are stored. Raises CheckpointError where that cannot be."""
    try:
        return Quantization.read(described)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{source / 'config.json'} describes no quantization: {error}") from error
