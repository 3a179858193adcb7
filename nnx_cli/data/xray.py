"""An X-ray of a token folder that is being made: what a person would want to know of a text before training on it.

It looks at a part of bounded size, spread evenly, and ends before a deadline, with None for what it did not come to.
"""

from __future__ import annotations

import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nnx_cli.data.duplicates import count_repeats
from nnx_cli.data.ngram import TRAIN_BYTES, VAL_BYTES, bits_per_byte
from nnx_cli.data.sample import histogram, spread_ids, text_of
from nnx_cli.data.split import MIN_DOCUMENTS
from nnx_cli.data.token_file import START_DTYPE, read_ids
from nnx_cli.data.tokenizers.base import Tokenizer

# That an X-ray may take: the larger of 10 seconds and a tenth of what preparing took, less what is under way at its end
LEAST_SECONDS, SHARE = 8, 0.08
LINE_BYTES = 40  # of a line that is no copy by chance
BLOCK_BYTES = 2**20  # decoded at once
MOST_NAMED = 5  # odd characters
N_LINES, LINE_TOKENS, LOOKED_AT = 5, 32, 4096  # shown as tokens; ids among which they are looked for
IN_ORDER = "\n\r\t"  # control characters that belong in a text
ODD = "\ufffd\ufeff\u200b"  # a replacement, a byte order mark, a space without width: traces of how a text was made
ODD_CATEGORIES = {"Cc", "Cn", "Co", "Cs"}  # control, unassigned, private use


def xray(
    folder: Path,
    tokenizer: Tokenizer,
    meta: Mapping[str, Any],
    prepared_s: float,
    on_progress: Callable[[float], None] = lambda done: None,
) -> dict[str, Any]:
    """The X-ray of the written files of a token folder, of which `meta` is known; preparing has taken `prepared_s`.
    `on_progress` hears how much of its longest part is done, 0 to 1."""
    deadline = time.perf_counter() + max(LEAST_SECONDS, SHARE * prepared_s)
    mapped = {split: np.memmap(folder / f"{split}.bin", tokenizer.dtype, "r") for split in ("train", "val")}
    ids = spread_ids(mapped["train"], tokenizer, TRAIN_BYTES)
    train = text_of(ids, tokenizer)[:TRAIN_BYTES]
    val = text_of(spread_ids(mapped["val"], tokenizer, VAL_BYTES), tokenizer)[:VAL_BYTES]
    counts_in_full = not (folder / "val.mask").exists()
    bits = bits_per_byte(train, val, on_progress) if counts_in_full else None
    odd = _odd_characters(train) if time.perf_counter() < deadline else None
    documents = {split: (folder / f"{split}.documents").stat().st_size // START_DTYPE.itemsize for split in mapped}
    if sum(documents.values()) >= MIN_DOCUMENTS:
        copies = _repeated_documents(folder, tokenizer, documents, meta["val_documents_in_train"], deadline)
    else:
        copies = _repeated_lines(train, val) if time.perf_counter() < deadline else {}
    named = {f"U+{ord(char):04X}": n for char, n in (odd or Counter()).most_common(MOST_NAMED)}
    used = np.count_nonzero(histogram(ids, tokenizer.vocab_size))
    return {
        **dict.fromkeys(("duplicate_share", "overlap_share", "compared", "n_compared")),
        **copies,
        "odd_characters": None if odd is None else sum(odd.values()),
        "odd_characters_named": named,
        "vocabulary_used": used / tokenizer.vocab_size,
        "ngram_bits_per_byte": bits,
        "train_bytes": meta["text_bytes"]["train"],
        "sampled_bytes": len(train),
        "documents": documents,
    }


def _repeated_documents(
    folder: Path, tokenizer: Tokenizer, documents: dict[str, int], n_copies: int, deadline: float
) -> dict[str, Any]:
    """Of the training documents, the share that stand earlier among them; of the validation documents, the share that
    are among them."""
    repeats = count_repeats(folder / "train.bin", tokenizer, deadline)
    return {
        "duplicate_share": repeats.n_repeated / repeats.n_documents if repeats.n_documents else None,
        "overlap_share": n_copies / documents["val"],
        "compared": "documents",
        "n_compared": repeats.n_documents,
    }


def _repeated_lines(train: np.ndarray, val: np.ndarray) -> dict[str, Any]:
    """The same of lines, where there are too few documents to tell; nothing of fewer than two that are long enough."""
    lines, held_out = _line_hashes(train), _line_hashes(val)
    if len(lines) < 2:
        return {}
    different = np.unique(lines)
    return {
        "duplicate_share": 1 - len(different) / len(lines),
        "overlap_share": float(np.isin(held_out, different).mean()) if len(held_out) else None,
        "compared": "lines",
        "n_compared": len(lines),
    }


def _line_hashes(text: np.ndarray) -> np.ndarray:
    """Hashes of the lines that have LINE_BYTES or more, without the white space around them: int64."""
    content = text.tobytes()
    ends = np.append(np.flatnonzero(text == ord("\n")), len(text))
    begins = np.append(0, ends[:-1] + 1)
    long = np.flatnonzero(ends - begins >= LINE_BYTES)
    lines = (content[a:b].strip() for a, b in zip(begins[long].tolist(), ends[long].tolist(), strict=True))
    return np.array([hash(line) for line in lines if len(line) >= LINE_BYTES], np.int64)


def _odd_characters(text: np.ndarray) -> Counter[str]:
    """Characters that seldom belong in a text, and how often they occur."""
    counts: Counter[str] = Counter()
    for start in range(0, len(text), BLOCK_BYTES):
        block = text[start : start + BLOCK_BYTES]
        if block.max() < 0x80:
            values, numbers = np.unique(block, return_counts=True)
        else:  # a character that a block or a sample cuts is left out
            codes = block.tobytes().decode("utf-8", "ignore").encode("utf-32-le")
            values, numbers = np.unique(np.frombuffer(codes, "<u4"), return_counts=True)
        for value, n in zip(values.tolist(), numbers.tolist(), strict=True):
            if (char := chr(value)) in ODD or (unicodedata.category(char) in ODD_CATEGORIES and char not in IN_ORDER):
                counts[char] += n
    return counts


def first_lines(path: Path, tokenizer: Tokenizer) -> list[list[str]]:
    """The tokens of the first lines of a .bin file that are not empty; of long ones, those that they begin with.
    End-of-text ends a line too."""
    names = {token_id: name for name, token_id in tokenizer.specials.items()}
    lines: list[list[str]] = [[]]
    ids = next(read_ids(path, tokenizer.dtype), np.empty(0, tokenizer.dtype))[:LOOKED_AT]
    for number in ids.tolist():
        said = names.get(number) or tokenizer.tokens[number].decode("utf-8", "backslashreplace")
        for nth, piece in enumerate(("\n" if number == tokenizer.eot_id else said).split("\n")):
            if nth and lines[-1]:
                lines.append([])
            if piece and len(lines[-1]) < LINE_TOKENS:
                lines[-1].append(piece)
        if len(lines) > N_LINES:
            break
    return [line for line in lines if line][:N_LINES]
