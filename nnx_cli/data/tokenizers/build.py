"""The tokenizer that `--tokenizer` names: trained, published or loaded; or, with `auto`, chosen by the text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from nnx_cli.config import BPE_IDS, check_tokenizer
from nnx_cli.data.tokenizers import bpe
from nnx_cli.data.tokenizers.base import N_BYTES, Tokenizer, utf8
from nnx_cli.data.tokenizers.byte import ByteTokenizer
from nnx_cli.data.tokenizers.char import CharTokenizer
from nnx_cli.data.tokenizers.hf_json import load_tokenizer
from nnx_cli.errors import UsageError

Vocabularies = Sequence[tuple[int, int]]
"""(bytes of text, ids): from so much text on, so many ids; ascending. With less than the first, `auto` is bytes."""


def build_tokenizer(
    kind_or_file: str,
    *,
    vocab_size: int | None = None,
    sample: Iterator[str] | None = None,
    vocabularies: Vocabularies = (),
) -> Tokenizer:
    """The tokenizer of that name, trained on `sample` (pieces of text) where it is `char` or `bpe`, or `auto` is.

    UsageError for a name that is no kind and no file, or a `vocab_size` that the tokenizer cannot have;
    MissingFeature where an extra or a vocabulary is not on this machine; DataError for a damaged file.
    """
    check_tokenizer(kind_or_file)
    kind = settle_auto(kind_or_file, vocab_size, vocabularies)
    if kind == "char":
        return CharTokenizer.train(sample or iter(()), vocab_size)
    if kind in ("auto", "bpe"):
        return _trained_bpe(kind == "auto", vocab_size, sample or iter(()), vocabularies)
    tokenizer: Tokenizer
    if kind == "byte":
        tokenizer = ByteTokenizer()
    elif kind in bpe.PUBLISHED:
        tokenizer = bpe.published(kind)
    else:
        tokenizer = load_tokenizer(Path(kind))
    if vocab_size is not None and vocab_size != tokenizer.vocab_size:
        raise UsageError(f"--vocab-size is {vocab_size}; {kind} has {tokenizer.vocab_size} tokens")
    return tokenizer


def settle_auto(kind_or_file: str, vocab_size: int | None, vocabularies: Vocabularies) -> str:
    """`kind_or_file`, or what `auto` is whatever the text; it stays `auto` where the text decides."""
    if kind_or_file != "auto":
        return kind_or_file
    if vocab_size is not None:
        return "byte" if vocab_size == N_BYTES else "bpe"
    return "auto" if vocabularies and bpe.is_installed() else "byte"


def needs_training(kind: str) -> bool:
    """Whether `build_tokenizer` reads a sample for a kind as `settle_auto` gives it."""
    return kind in ("auto", "char", "bpe")


def suited_ids(n_bytes: int, vocabularies: Vocabularies) -> int | None:
    """Ids that suit so many bytes of text; None: bytes do."""
    return max((ids for least, ids in vocabularies if n_bytes >= least), default=None)


def _trained_bpe(
    may_be_bytes: bool, vocab_size: int | None, sample: Iterator[str], vocabularies: Vocabularies
) -> Tokenizer:
    """Byte pairs with as many ids as suit the text, unless `vocab_size` is given; or bytes where those suit it."""
    if vocab_size is not None or not vocabularies:
        return bpe.train(sample, BPE_IDS if vocab_size is None else vocab_size)
    n_bytes = 0

    def counted() -> Iterator[str]:
        nonlocal n_bytes
        for piece in sample:
            n_bytes += len(piece) if piece.isascii() else len(utf8(piece))
            yield piece

    blocks = bpe.spread(counted(), bpe.sample_chars(max(ids for _, ids in vocabularies)))
    ids = suited_ids(n_bytes, vocabularies)
    if ids is None and may_be_bytes:
        return ByteTokenizer()
    return bpe.train(iter(blocks), ids or vocabularies[0][1])
