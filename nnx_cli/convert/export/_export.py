"""A MODEL to a folder or file of another format: written beside its place, checked there, and only then put into it."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from nnx_cli import models
from nnx_cli.config import check_choice, module_names
from nnx_cli.convert.export._base import Format, Found, Source
from nnx_cli.convert.export._compare import compared_shape
from nnx_cli.errors import CheckpointError, MissingFeature, OutputError, QualityError, UsageError, pip_install
from nnx_cli.evaluation.held_out import sample_windows
from nnx_cli.layers.lora import merge_adapters
from nnx_cli.layers.quantized import dequantize_layers
from nnx_cli.models._base import LanguageModel, ModelConfig
from nnx_cli.runs.card import make_card
from nnx_cli.runs.load import ModelRef, architecture_of, load_model, model_from_config
from nnx_cli.runs.run import live_status, read_status
from nnx_cli.system.files import new_folder, refuse_existing

PACKAGE = "convert/export"


def names() -> tuple[str, ...]:
    """Formats, in alphabetical order."""
    return module_names(PACKAGE)


def load_format(name: str) -> Format:
    """The module of a format. Raises UsageError where there is none."""
    check_choice("format", name, names())
    return cast(Format, importlib.import_module(f"nnx_cli.convert.export.{name}"))


def export_model(
    ref: ModelRef,
    format_name: str,
    out: Path,
    *,
    options: Any = None,
    data_name: str | None = None,
    tell: Callable[[str, float], None] = lambda what, done: None,
) -> tuple[dict[str, Any], list[str]]:
    """Write `out` in a format; returns the receipt, and lines for the user.

    `options` are the `Options` of the format, `data_name` what the card calls the text. Raises UsageError for a format
    that cannot hold the architecture, OutputError for a place that is taken or inside the model's folder,
    CheckpointError for a run that goes on, MissingFeature without the format's library and QualityError, leaving
    nothing behind, where that computes something else.
    """
    form = load_format(format_name)
    config = ref.config
    name = architecture_of(config, ref.folder, ref.file)
    _check_held(format_name, form, name, model_from_config(config, ref.folder, ref.file).config)
    _check_idle(ref)
    _check_place(ref, out)
    _check_libraries(format_name, form)
    tell("loading", 0.0)
    model = float_model(ref)
    n_parameters = sum(tensor.numel() for tensor in model.state_without_ties().values())
    card = make_card(ref, name, model.config, n_parameters, data_name)
    ids = _text(ref, model)
    source = Source(name, model, ref.tokenizer, card, ref, ids, options, tell)
    with new_folder(out, form.FILE) as folder:
        form.write(source, folder)
        found = form.check(source, folder)
        _judge(format_name, found)
        file_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    receipt = {
        "format": format_name,
        "out": str(out),
        "file_bytes": file_bytes,
        "max_logit_difference": found.max_logit_difference,
        "same_greedy_tokens": found.same_greedy_tokens,
    }
    return receipt | found.more, found.notes


def float_model(ref: ModelRef) -> LanguageModel:
    """The model of a MODEL in float32 on the CPU, adapters merged, quantized layers as floats, nothing to train."""
    model = load_model(ref, torch.device("cpu"))
    merge_adapters(model)
    dequantize_layers(model)
    return model.requires_grad_(False)


def _text(ref: ModelRef, model: LanguageModel) -> Tensor:
    """Ids to compare on: of the run's validation split, or random ones where that is gone."""
    n, length = compared_shape(model)
    return sample_windows(ref, model.config.vocab_size, n, length)


def _check_held(format_name: str, form: Format, name: str, config: ModelConfig) -> None:
    """Raise UsageError where a format cannot hold a model, naming the architectures and the formats that go together
    with it."""
    own = models.own_file(name, config) is not None
    why = "it runs code from a file of yours" if own else form.why_not(name, config)
    if why is None:
        return
    held = [other for other in models.names() if form.why_not(other, models.make_config(other)) is None]
    others = [
        other
        for other in names()
        if other != format_name and not own and load_format(other).why_not(name, config) is None
    ]
    raise UsageError(
        f"--format {format_name} cannot hold this {models.stem(name)}, for {why}; it holds {', '.join(held)}",
        fix=f"{name} can be exported with --format {' or '.join(others)}" if others else None,
    )


def _check_idle(ref: ModelRef) -> None:
    """Raise CheckpointError for a run that is still training."""
    status: dict[str, Any] = {}
    if (ref.folder / "run.json").is_file():
        with suppress(CheckpointError):  # what is damaged there decides nothing
            status = read_status(ref.folder)
    if live_status(ref.folder, status) == "running":
        raise CheckpointError(f"{ref.label} is still training", fix="wait for it, or stop it: it saves where it is")


def _check_place(ref: ModelRef, out: Path) -> None:
    """Raise OutputError where `out` is taken, or inside the folder of the model."""
    refuse_existing(out)
    if out.resolve().is_relative_to(ref.folder.resolve()):
        raise OutputError(f"{out} is inside the folder of the model", fix="name another place: --out PATH")


def _check_libraries(format_name: str, form: Format) -> None:
    """Raise MissingFeature without what a format is written and checked with."""
    missing = [library for library in form.LIBRARIES if importlib.util.find_spec(library) is None]
    if missing:
        raise MissingFeature(
            f"--format {format_name} needs {' and '.join(missing)}, to check what it writes",
            fix=pip_install(f"nnx-cli[{format_name}]"),
        )


def _judge(format_name: str, found: Found) -> None:
    """Raise QualityError where the format's library computes something else."""
    if not found.max_logit_difference <= found.tolerance:
        raise QualityError(
            f"written as {format_name} and loaded again, the model differs by {found.max_logit_difference:.1e} in a "
            f"logit, and {found.tolerance:.0e} is allowed; nothing was kept"
        )
    if found.same_greedy_tokens < found.greedy_tokens:
        raise QualityError(
            f"written as {format_name} and loaded again, the model writes another text: {found.same_greedy_tokens} of "
            f"{found.greedy_tokens} greedy tokens are the same; nothing was kept"
        )
