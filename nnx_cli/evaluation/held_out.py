"""The text that a model is judged on, and the one it was trained on."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nnx_cli.config import PrepareConfig
from nnx_cli.data.loader import windows_at
from nnx_cli.data.prepare import Progress, encode_files
from nnx_cli.data.token_folder import TokenFolder, open_token_folder
from nnx_cli.errors import DataError
from nnx_cli.evaluation.losses import Masked, window_starts
from nnx_cli.runs.load import ModelRef
from nnx_cli.system.files import follow
from nnx_cli.system.signals import half_made

NAME_A_TEXT = "name a text: --filepath FILE"


@dataclass(frozen=True)
class HeldOutText:
    """Token ids (N,), the first token of each document (one document where nothing tells them apart), and where not
    all tokens count the bits that say which do (`TokenFolder.mask`)."""

    tokens: np.ndarray
    documents: np.ndarray
    mask: np.ndarray | None = None

    @property
    def masked(self) -> Masked | None:
        """What of it counts; None: all."""
        return Masked.of(self.mask, self.documents)

    @property
    def n_targets(self) -> int:
        """Tokens that a model is judged on."""
        return len(self.tokens) - 1 if self.mask is None else int(np.unpackbits(self.mask).sum())


@contextmanager
def held_out_text(
    ref: ModelRef, paths: Sequence[str], config: PrepareConfig | None = None, on_progress: Progress | None = None
) -> Iterator[HeldOutText]:
    """Text in `paths`, or the validation split beside which the model was trained.

    `on_progress` is told what the user should know of how the text was read.
    Raises DataError where there is no such text, or where it belongs to another tokenizer.
    """
    tokenizer = ref.tokenizer
    if not paths:
        folder = training_folder(ref)
        yield HeldOutText(folder.val, _documents(folder.val, folder.documents["val"], ref), folder.val_mask)
        return
    if tokenizer is None:
        raise DataError(f"{ref.label} has no tokenizer: it cannot read text", fix="leave out --filepath")
    with half_made(), tempfile.TemporaryDirectory(prefix="nnx-") as spool:
        ids, documents, mask = encode_files(paths, tokenizer, Path(spool), config or PrepareConfig(), on_progress)
        yield HeldOutText(ids, _documents(ids, documents, ref), mask)


def sample_windows(ref: ModelRef, vocab_size: int, n: int, length: int) -> Tensor:
    """Token ids (N, T) to compare models on: `n` windows of the run's validation split, or of random tokens where that
    is gone."""
    try:
        with held_out_text(ref, ()) as text:
            n_tokens = len(text.tokens)
            if n_tokens > 1:
                length = min(length, n_tokens - 1)
                return windows_at(text.tokens, window_starts(n_tokens, length, n), length)[0]
    except DataError:
        pass
    return torch.randint(vocab_size, (n, length), generator=torch.Generator().manual_seed(0))


def training_folder(ref: ModelRef, fix: str = NAME_A_TEXT) -> TokenFolder:
    """The token folder that a model was trained on. Raises DataError, with `fix`, where it is not there any more."""
    data = ref.config.get("data")
    if data is None:
        raise DataError(f"{ref.label} does not say what text it was trained on", fix)
    folder = follow(ref.folder, data["folder"])
    if not folder.is_dir():
        raise DataError(f"the token folder that {ref.label} was trained on is gone: no {folder}", fix)
    tokens = open_token_folder(folder, tokenizer=ref.tokenizer)
    if tokens.fingerprint != data["fingerprint"]:
        raise DataError(f"{folder} holds other tokens than {ref.label} was trained on", fix)
    return tokens


def _documents(tokens: np.ndarray, documents: np.ndarray, ref: ModelRef) -> np.ndarray:
    """The first tokens of documents as they are known, or else what follows an end-of-text token."""
    tokenizer = ref.tokenizer
    if len(documents) > 1 or tokenizer is None or tokenizer.eot_id is None:
        return documents
    return np.concatenate((documents[:1].astype(np.int64), 1 + np.flatnonzero(tokens[:-1] == tokenizer.eot_id)))
