"""The text that a model is judged on."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from nnx_cli.config import PrepareConfig
from nnx_cli.data.prepare import Progress, encode_files
from nnx_cli.data.token_folder import open_token_folder
from nnx_cli.errors import DataError
from nnx_cli.runs.load import ModelRef
from nnx_cli.system.files import follow
from nnx_cli.system.signals import half_made


@contextmanager
def held_out_tokens(
    ref: ModelRef, paths: Sequence[str], config: PrepareConfig | None = None, on_progress: Progress | None = None
) -> Iterator[np.ndarray]:
    """Token ids (N,): of text in `paths`, or of the validation split beside which the model was trained.

    `on_progress` is told what the user should know of how the text was read.
    Raises DataError where there is no such text, or where it belongs to another tokenizer.
    """
    tokenizer, fix = ref.tokenizer, "name a text: --filepath FILE"
    if not paths:
        data = ref.config.get("data")
        if data is None:
            raise DataError(f"{ref.label} names no text of its own", fix)
        folder = follow(ref.folder, data["folder"])
        if not folder.is_dir():
            raise DataError(f"the text that {ref.label} was trained on is gone: no {folder}", fix)
        tokens = open_token_folder(folder, tokenizer=tokenizer)
        if tokens.fingerprint != data["fingerprint"]:
            raise DataError(f"{folder} is not the text that {ref.label} was trained on", fix)
        yield tokens.val
        return
    if tokenizer is None:
        raise DataError(f"{ref.label} has no tokenizer: it cannot read text", fix="leave out --filepath")
    with half_made(), tempfile.TemporaryDirectory(prefix="nnx-") as spool:
        yield encode_files(paths, tokenizer, Path(spool), config or PrepareConfig(), on_progress)
