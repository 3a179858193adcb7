"""The tokenizer that `--tokenizer` names: trained, published or loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from nnx_cli.config import check_tokenizer
from nnx_cli.data.tokenizers import bpe
from nnx_cli.data.tokenizers.base import Tokenizer
from nnx_cli.data.tokenizers.byte import ByteTokenizer
from nnx_cli.data.tokenizers.char import CharTokenizer
from nnx_cli.data.tokenizers.hf_json import load_tokenizer
from nnx_cli.errors import UsageError


def build_tokenizer(
    kind_or_file: str, *, vocab_size: int | None = None, sample: Iterator[str] | None = None
) -> Tokenizer:
    """The tokenizer of that name, trained on `sample` (pieces of text) where it is `char` or `bpe`.

    UsageError for a name that is no kind and no file, or a `vocab_size` that the tokenizer cannot have;
    MissingFeature where an extra or a vocabulary is not on this machine; DataError for a damaged file.
    """
    check_tokenizer(kind_or_file)
    if kind_or_file == "char":
        return CharTokenizer.train(sample or iter(()), vocab_size)
    if kind_or_file == "bpe":
        return bpe.train(sample or iter(()), bpe.DEFAULT_VOCAB_SIZE if vocab_size is None else vocab_size)
    tokenizer: Tokenizer
    if kind_or_file == "byte":
        tokenizer = ByteTokenizer()
    elif kind_or_file in bpe.PUBLISHED:
        tokenizer = bpe.published(kind_or_file)
    else:
        tokenizer = load_tokenizer(Path(kind_or_file))
    if vocab_size is not None and vocab_size != tokenizer.vocab_size:
        raise UsageError(f"--vocab-size is {vocab_size}; {kind_or_file} has {tokenizer.vocab_size} tokens")
    return tokenizer


def needs_training(kind_or_file: str) -> bool:
    """Whether `build_tokenizer` reads a sample: char and bpe."""
    return kind_or_file in ("char", "bpe")
