"""An original's checkpoint to a model folder, without running anything that is in it."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnx_cli import models
from nnx_cli.config import check_tokenizer
from nnx_cli.convert.checkpoint_file import NONSENSE, CheckpointFile, read_checkpoint
from nnx_cli.data.tokenizers.build import build_tokenizer, needs_training
from nnx_cli.errors import CheckpointError, NnxError, UsageError, quoted
from nnx_cli.models._base import LanguageModel
from nnx_cli.runs.manifest import describe_model, read_verified_config, write_model_folder
from nnx_cli.runs.tensors import check_finite
from nnx_cli.system.files import new_folder, refuse_existing, sha256_file

MAX_REPEATS = 4  # how often a file may use the same elements: tied matrices and views do, bombs do more
MOST_COMPARED = 1000  # names of tensors, in search of a misnomer
NO_TOKENIZER = "none"
AVERAGED = re.compile(r"ema|swa|averag|shadow|teacher|best", re.IGNORECASE)  # weights, but not the newest ones
NO_WEIGHTS = re.compile(r"optim|grad|exp_avg|moment", re.IGNORECASE)  # as large as the weights, under their names


def import_checkpoint(
    name: str, path: Path, out: Path, tokenizer: str | None = None, variant: str | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Write the model folder `out` from an original's checkpoint; returns its config.json, and notes on what was taken
    of the file and what was left.

    The original's constructor arguments are read off the shapes of its weights. Without `tokenizer`: bytes where the
    vocabulary is 256, else bare ids, which "none" asks for. Raises UsageError for an architecture without an original,
    a tokenizer or a variant there is not, CheckpointError, OutputError.
    """
    models.original(name)
    if variant is not None:
        models.make_config(name, variant=variant)
    check_ready(tokenizer)
    refuse_existing(out)
    model, notes = _load_original(name, read_checkpoint(path), variant)
    chosen = tokenizer or ("byte" if model.config.vocab_size == 256 else NO_TOKENIZER)
    known = None if chosen == NO_TOKENIZER else build_tokenizer(chosen)
    if known is not None and known.vocab_size != model.config.vocab_size:
        raise CheckpointError(
            f"{path} has a vocabulary of {model.config.vocab_size:,}, {chosen} of {known.vocab_size:,}"
        )
    n_parameters = sum(p.numel() for p in model.parameters())
    origin = {"imported_from": path.name, "imported_sha256": sha256_file(path)}
    config = describe_model(name, None, model.config, n_parameters, known) | origin
    with new_folder(out) as folder:
        write_model_folder(folder, config, known, model.state_without_ties())
    return config, notes


def check_ready(tokenizer: str | None) -> None:
    """Raise UsageError for a tokenizer that there is not, or that would have to be made from a text."""
    if tokenizer not in (None, NO_TOKENIZER):
        check_tokenizer(tokenizer)
        if needs_training(tokenizer):
            raise UsageError(f"--tokenizer {tokenizer} is made from a text", fix="name its file: --tokenizer FILE.json")


def place_of_import(path: Path, folder: Path) -> Path:
    """`folder`, or with -2, -3, … behind it: the first that this file was imported to, or that is free."""
    place, number = folder, 1
    while os.path.lexists(place):
        with suppress(CheckpointError, OSError):  # of something else
            if read_verified_config(place).get("imported_sha256") == sha256_file(path):
                break
        number += 1
        place = folder.with_name(f"{folder.name}-{number}")
    return place


def _load_original(name: str, found: CheckpointFile, variant: str | None) -> tuple[LanguageModel, list[str]]:
    """The model that an original's weights make, whose shape is read off theirs, and what there is to say. They may
    stand anywhere in the file. Raises CheckpointError where there are none."""
    places, refusal = _places(name, found.tensors), None
    for place in places:
        weights = {key.removeprefix(place): x for key, x in found.tensors.items() if key.startswith(place)}
        try:
            arguments, weights = _own_weights(name, weights, variant)
            _check_weights(weights, found.path)
            model = models.load_reference(name, arguments, weights, variant=variant)
        except (NnxError, *NONSENSE) as error:
            refusal = refusal or CheckpointError(_refusal(found, place, error))
            continue
        return model, _notes(found, places, place, weights)
    raise refusal or _no_weights(name, found)


def _places(name: str, tensors: Iterable[str]) -> list[str]:
    """What stands before an original's names in a file, from wrappers of every kind (`model.module.`): where the
    weights are, the newest first."""
    ends = tuple(models.original(name).EMBEDDINGS)
    before = (tensor.removesuffix(end) for tensor in tensors for end in ends if tensor.endswith(end))
    places = dict.fromkeys(place for place in before if not place or place.endswith("."))
    return sorted(places, key=lambda place: (bool(NO_WEIGHTS.search(place)), bool(AVERAGED.search(place))))


def _own_weights(
    name: str, weights: dict[str, Tensor], variant: str | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The original's constructor arguments and the tensors that are its own: not those of modules that it does not
    have, nor counters and masks. Raises CheckpointError where the others do not make a model."""
    arguments = models.infer_reference(name, weights)
    with torch.device("meta"):  # names and shapes, before they take any memory
        known = models.reference_names(name, arguments, variant=variant)
        modules = {key.partition(".")[0] for key in known}
        own = {
            key: tensor
            for key, tensor in weights.items()
            if key in known or (key.partition(".")[0] in modules and tensor.is_floating_point())
        }
        for key, tensor in own.items():
            if key not in known:
                raise CheckpointError(f"{key} {tuple(tensor.shape)} has no place in this {name}")
            if not tensor.is_floating_point():
                raise CheckpointError(f"{key} is of {tensor.dtype}, no floating-point numbers")
        models.load_reference(name, arguments, {key: x.to("meta") for key, x in own.items()}, variant=variant)
    return arguments, own


def _check_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """Raise CheckpointError where tensors have more elements than their file, or such as are not finite."""
    if sum(tensor.numel() * tensor.element_size() for tensor in weights.values()) > MAX_REPEATS * path.stat().st_size:
        raise CheckpointError("it is damaged: its tensors are larger than the file")
    check_finite(weights, path)


def _refusal(found: CheckpointFile, place: str, error: BaseException) -> str:
    """Why the tensors at a place of a file make no model."""
    odd = next((key for key in found.odd if key.removeprefix(place) in str(error)), None)
    why = f"{odd} is {found.odd[odd]}" if odd else str(error)
    if isinstance(error, UsageError):  # nobody gave these values: they are read off the shapes
        why = f"the shapes of these tensors fit no model ({why.replace('--', '')})"
    if (missing := re.search(r"'(\S+)' is missing$", why)) is not None:
        wanted, digits = place + missing[1], re.compile(r"\d+")  # that of another layer is no misnomer
        names = [
            key for key in found.tensors if key.startswith(place) and digits.sub("", key) != digits.sub("", wanted)
        ]
        alike = difflib.get_close_matches(wanted, names[:MOST_COMPARED], n=1) or names[:1]
        why += "".join(f"; the most like it is {name} {tuple(found.tensors[name].shape)}" for name in alike)
    text = str(found.path)
    return why if why.startswith(text) else f"{text}{f', at {place}*' if place else ''}: {why}"


def _no_weights(name: str, found: CheckpointFile) -> CheckpointError:
    """What to say of a file in which no tensor has the name of the original's embedding."""
    wanted = models.original(name).EMBEDDINGS[0]
    for key, kind in found.odd.items():
        if key.endswith(wanted):
            return CheckpointError(f"{found.path}: {key} is {kind}")
    first = next(((key, tuple(x.shape)) for key, x in found.tensors.items()), None)
    has = "it has none that is whole" if first is None else f"the first is {first[0] or 'without a name'} {first[1]}"
    like = (other for other in models.names() if models.has_original(other) and _is_of(other, found))
    fix = next((f"nnx import --model {other} {quoted(found.path)}" for other in like), None)
    return CheckpointError(f"{found.path} is no checkpoint of {name}: no tensor is called {wanted}; {has}", fix=fix)


def _is_of(name: str, found: CheckpointFile) -> bool:
    """Whether a file has the weights of an original."""
    with suppress(CheckpointError):
        return bool(_places(name, found.tensors) and _load_original(name, found, None))
    return False


def _notes(found: CheckpointFile, places: list[str], place: str, taken: Mapping[str, Tensor]) -> list[str]:
    """What was taken where there was a choice, and what was left."""
    notes = []
    if len(places) > 1:
        others = ", ".join(f"{other}*" for other in places if other != place)
        notes.append(f"{found.path} has weights more than once: those at {place}* are taken, not {others}")
    said = tuple(other for other in places if other not in (place, ""))
    left = [key for key in found.tensors if not (key.startswith(place) and key.removeprefix(place) in taken)]
    left = [key for key in left if not key.startswith(said)]
    kinds = [f"{len(left)} tensors ({left[0]}, …)" if len(left) > 1 else f"the tensor {key}" for key in left[:1]]
    kinds += [f"{key}, which is {kind}" for key, kind in list(found.odd.items())[:1]]
    kinds += [f"objects of {', '.join(found.objects[:3])}"] if found.objects else []
    if kinds:
        notes.append(f"left out of {found.path}: {'; '.join(kinds)}")
    return notes
