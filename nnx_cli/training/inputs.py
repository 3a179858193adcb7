"""What a new run is made from: its token folder, the model it starts from, its plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nnx_cli import models
from nnx_cli.config import PrepareConfig, TrainConfig
from nnx_cli.data import prepare
from nnx_cli.data.token_folder import TokenFolder, open_token_folder
from nnx_cli.data.tokenizers.base import N_BYTES
from nnx_cli.data.tokenizers.build import Vocabularies, build_tokenizer, needs_training
from nnx_cli.errors import CheckpointError, DataError, OutputError, UsageError
from nnx_cli.planning.flops import count_parameters, meta_model
from nnx_cli.planning.parallel import RankDevice
from nnx_cli.planning.plan import Plan, auto_size, plan_run
from nnx_cli.planning.rates import nominal_flops
from nnx_cli.planning.recipe.tokenizer import vocabularies_for
from nnx_cli.runs.find import find_model
from nnx_cli.runs.load import ModelRef, shape_of
from nnx_cli.system.files import discard_folder, is_forbidden


@dataclass(frozen=True)
class Shape:
    """An architecture by name, its size (auto: chosen by the plan, None: the fields' own), its fields."""

    model: str
    size: str | None
    fields: dict[str, Any]


def start_from(spec: str, model: str | None, size: str, fields: Mapping[str, Any]) -> tuple[ModelRef, Shape]:
    """The model to start from, and its shape with the context and dropout that may differ.

    Raises CheckpointError where it is quantized or has adapters, UsageError where another shape is asked for.
    """
    is_own = model is not None and models.is_file(model)
    named = model if is_own else fields.get("bank_file")
    file = None if named is None else Path(named)
    base = find_model(spec, file)
    if base.config.get("lora"):
        raise CheckpointError(
            f"{spec} has adapters, and a run starts from a plain model",
            fix=f"merge them first: nnx merge {base.as_argument}",
        )
    if base.config.get("quantization"):
        raise CheckpointError(
            f"{spec} is quantized, and a run starts from a plain model", fix="take the run that it was made from"
        )
    architecture, described = shape_of(base.config, base.folder, file)
    if not is_own and model not in (None, architecture) or size != "auto":
        raise UsageError(f"{spec} is a {models.stem(architecture)} of its own size", fix="leave out --model and --size")
    config = models.make_config(architecture, **described)
    for field in fields.keys() - {"seq_len", "dropout"}:
        if field not in described or replace(config, **{field: fields[field]}) != config:
            value, option = fields[field], field.replace("_", "-")
            said = f"{option} {value}" if not isinstance(value, bool) else option if value else f"no-{option}"
            raise UsageError(f"--{said} is not what {spec} has", fix="leave it out")
    return base, Shape(architecture, None, described | dict(fields))


def model_vocabularies(shape: Shape, train: TrainConfig, device: torch.device, precision: str) -> Vocabularies:
    """What suits a new model: from how many bytes of text on, how many ids."""
    size = shape.size
    if size == "auto":
        size = auto_size(shape.model, train, device, nominal_flops(device, precision))
    model = meta_model(
        shape.model, models.make_config(shape.model, size=size, **shape.fields | {"vocab_size": N_BYTES})
    )
    return vocabularies_for(count_parameters(model)["total"])


def prepare_tokens(
    filepath: list[str],
    preparing: PrepareConfig,
    base: ModelRef | None,
    tell: Callable[[dict[str, Any]], None],
    out: Path | None = None,
    vocabularies: Vocabularies = (),
) -> tuple[Path, list[Path]]:
    """The token folder of a text, or of the built-in one, and the folders that were made for it now, innermost first.

    `tell` is told how preparing goes. A folder made earlier, or by another process meanwhile, is used again. It is made
    in data/ here or, where that cannot be written to, in data/ beside the run folder `out`. `vocabularies` suit a new
    model; `base` has its own.
    """
    if "-" in filepath:
        raise UsageError("train cannot read standard input", fix="prepare it first: nnx prepare - --out data/NAME")
    if base is not None and base.tokenizer is not None:
        preparing = replace(preparing, tokenizer=str(base.folder / "tokenizer.json"))
    folder = prepare.default_folder(filepath, preparing, None, vocabularies)
    if not filepath and not (folder / "meta.json").exists():
        tell({"note": "no --filepath: training on the language documentation that Python ships"})
    try:
        return _prepared(folder, filepath, preparing, tell, vocabularies)
    except OutputError as error:
        if out is None or out.parent / folder == folder or not is_forbidden(error):
            raise
        tell({"note": f"{error}; the prepared text goes to {out.parent / folder}"})
    return _prepared(out.parent / folder, filepath, preparing, tell, vocabularies)


def _prepared(
    folder: Path,
    filepath: list[str],
    preparing: PrepareConfig,
    tell: Callable[[dict[str, Any]], None],
    vocabularies: Vocabularies,
) -> tuple[Path, list[Path]]:
    """The token folder, made now unless it exists, and the folders that were made for it, innermost first."""
    if (folder / "meta.json").exists():
        return folder, []
    missing = [parent for parent in folder.parents if not parent.exists()]
    try:
        prepare.prepare(filepath, folder, preparing, None, tell, vocabularies)
    except OutputError:
        if not (folder / "meta.json").exists():  # else another process prepared the same text meanwhile
            raise
        return folder, []
    return folder, [folder, *missing]


def brings(base: ModelRef, tokenizer: str) -> bool:
    """Whether the tokenizer of that name is the one that a model brings. One to be trained never is."""
    own = base.tokenizer
    if own is None or tokenizer == "auto":  # it takes any of its size
        return True
    if tokenizer == own.kind:
        return not needs_training(tokenizer)
    return Path(tokenizer).is_file() and build_tokenizer(tokenizer).fingerprint == own.fingerprint


def take_back(made: list[list[Path]]) -> None:
    """Remove what was made for a run that is not to be: lists of folders, innermost first; others may use an outer
    one."""
    for folders in made:
        for number, folder in enumerate(folders):
            with suppress(OSError):
                discard_folder(folder) if number == 0 else folder.rmdir()


def open_tokens(folder: Path, base: ModelRef | None, tokenizer: str | None) -> TokenFolder:
    """Open a token folder. `tokenizer` is what it is said to be made with. Raises DataError where it is not, or not
    with that of `base`, to which conversations add their special tokens."""
    trained = tokenizer is not None and needs_training(tokenizer)  # on whatever text it was
    named = None if tokenizer is None or trained else build_tokenizer(tokenizer)
    tokens = open_token_folder(folder, (base.tokenizer if base else None) or named, may_extend=base is not None)
    if trained and (tokens.tokenizer is None or tokens.tokenizer.kind != tokenizer):
        raise DataError(f"{folder} was not made with --tokenizer {tokenizer}", fix="leave it out, or name its file")
    return tokens


def open_and_plan(
    folder: Path,
    shape: Shape,
    train: TrainConfig,
    *,
    device: torch.device,
    precision: str,
    sources: dict[str, str],
    base: ModelRef | None,
    tokenizer: str | None,
    ranks: Sequence[RankDevice] = (),
) -> tuple[TokenFolder, Plan]:
    """Open the tokens and fill in every value. `tokenizer` is what the folder is said to be made with, `ranks` are the
    devices of a run on several.

    Raises DataError or UsageError where vocabularies disagree.
    """
    fields = dict(shape.fields)
    tokens = open_tokens(folder, base, tokenizer)
    if base is not None and base.tokenizer is not None and tokens.vocab_size > fields["vocab_size"]:
        if train.lora_rank is not None:
            raise UsageError(
                f"{base.label} does not know the special tokens of conversations yet, and adapters do not learn them",
                fix="leave out --lora-rank",
            )
        fields["vocab_size"] = tokens.vocab_size
    if base is not None and tokens.vocab_size != fields["vocab_size"]:
        raise DataError(f"{folder} has a vocabulary of {tokens.vocab_size:,}, {base.label} of {fields['vocab_size']:,}")
    if (wanted := fields.pop("vocab_size", None)) is not None and wanted != tokens.vocab_size:
        raise UsageError(f"--vocab-size {wanted} is not the tokenizer's {tokens.vocab_size}", fix="leave it out")
    plan = plan_run(
        shape.model,
        shape.size,
        fields,
        train,
        vocab_size=tokens.vocab_size,
        train_tokens=len(tokens.train),
        val_tokens=len(tokens.val),
        device=device,
        precision=precision,
        sources=sources,
        epoch_tokens=tokens.epoch_tokens,
        ranks=ranks,
        from_scratch=base is None,
        may_halve=tokens.mask is None,
    )
    return tokens, plan
