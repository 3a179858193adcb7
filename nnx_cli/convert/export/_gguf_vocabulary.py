"""A tokenizer as llama.cpp has them, and how much of a text it cuts into other ids there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from nnx_cli.data.tokenizers import bpe
from nnx_cli.data.tokenizers.base import N_BYTES, Tokenizer
from nnx_cli.data.tokenizers.bpe import BpeTokenizer
from nnx_cli.data.tokenizers.char import CharTokenizer
from nnx_cli.data.tokenizers.hf_json import BYTE_TOKENS
from nnx_cli.errors import DataError
from nnx_cli.evaluation.held_out import held_out_text
from nnx_cli.runs.load import ModelRef

NORMAL, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 3, 4, 5, 6  # kinds of tokens: gguf.TokenType
NEVER = 0xFF  # a byte that is in no UTF-8
VERBATIM = (" ", "\u2581")  # llama.cpp takes the first for the second in vocabularies of characters, unless they are so
MEASURED_TOKENS = 2**18  # of the validation text
# what text is split by under the names of src/llama-vocab.cpp
PATTERNS = {"gpt-2": bpe.plain(bpe.GPT2_PATTERN)} | bpe.PATTERNS
ANY_CASE = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # in the files of Llama 3, for which llama.cpp spells out both cases
BOTH_CASES = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
Encode = Callable[[str], np.ndarray]


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer."""

    model: str  # gpt2: byte pairs; llama: here characters, and bytes where there are none
    pre: str  # what it splits text by
    tokens: list[str]
    kinds: list[int]
    merges: list[str]  # "a b"
    end_id: int  # of end-of-text, or of what never comes
    encode: Encode  # ids as llama.cpp gives them, by what is known of it
    is_exact: bool = True  # whether these are those of the tokenizer


def vocabulary(tokenizer: Tokenizer, n_ids: int, texts: Sequence[str]) -> Vocabulary:
    """A tokenizer for `n_ids` ids, those without a token unused.

    Where llama.cpp does not split text as it does, by the way that gives `texts` the fewest other ids. Raises DataError
    for two tokens that are written alike.
    """
    if isinstance(tokenizer, CharTokenizer):
        return _characters(tokenizer, n_ids)
    names = {i: bpe.to_visible(token) for i, token in enumerate(tokenizer.tokens) if token}
    kinds = dict.fromkeys(names, NORMAL) | dict.fromkeys(tokenizer.specials.values(), CONTROL)
    names |= {i: name for name, i in tokenizer.specials.items()}
    if isinstance(tokenizer, BpeTokenizer):
        pre, encode = _splitting(tokenizer, texts)
        merges = [f"{bpe.to_visible(a)} {bpe.to_visible(b)}" for a, b in bpe.merges(tokenizer.ranks)]
    else:  # bytes; but no vocabulary is taken without a merge
        pre, encode, merges = "gpt-2", tokenizer.encode, [f"{bpe.VISIBLE[NEVER]} {bpe.VISIBLE[NEVER]}"]
    end_id = tokenizer.tokens.index(bytes([NEVER])) if tokenizer.eot_id is None else tokenizer.eot_id
    is_exact = encode == tokenizer.encode
    return Vocabulary("gpt2", pre, *_listed(names, kinds, n_ids), merges, end_id, encode, is_exact)


def _characters(tokenizer: CharTokenizer, n_ids: int) -> Vocabulary:
    """Bytes, then characters, then special tokens."""
    names = dict(enumerate(BYTE_TOKENS + tokenizer.characters))
    if " " not in tokenizer.characters:
        names[ord(" ")] = " "
    kinds = {i: USER_DEFINED if name in VERBATIM else BYTE if i < N_BYTES else NORMAL for i, name in names.items()}
    names |= {i: name for name, i in tokenizer.specials.items()}
    kinds |= dict.fromkeys(tokenizer.specials.values(), CONTROL)
    end_id = NEVER if tokenizer.eot_id is None else tokenizer.eot_id
    return Vocabulary("llama", "default", *_listed(names, kinds, n_ids), [], end_id, tokenizer.encode)


def _listed(names: dict[int, str], kinds: dict[int, int], n_ids: int) -> tuple[list[str], list[int]]:
    tokens = [names.get(i, f"<|unused {i}|>") for i in range(n_ids)]
    if len(set(tokens)) < n_ids:
        raise DataError("two tokens of this tokenizer are written alike, which llama.cpp cannot tell apart")
    return tokens, [kinds.get(i, UNUSED) for i in range(n_ids)]


def _splitting(tokenizer: BpeTokenizer, texts: Sequence[str]) -> tuple[str, Encode]:
    """The name of what llama.cpp splits text by, and the tokenizer with that."""
    spelled = tokenizer.pattern.replace(ANY_CASE, BOTH_CASES)
    for name, pattern in PATTERNS.items():
        if pattern == spelled:
            return name, tokenizer.encode
    ways = {
        name: BpeTokenizer(tokenizer.ranks, pattern, tokenizer.specials, tokenizer.eot_id).encode
        for name, pattern in PATTERNS.items()
    }
    best = min(ways, key=lambda name: share_of_other_ids(tokenizer, ways[name], texts) or 0)
    return best, ways[best]


def share_of_other_ids(tokenizer: Tokenizer, encode: Encode, texts: Sequence[str]) -> float | None:
    """The share of the bytes of texts that are in other tokens, or in tokens that begin elsewhere, where `encode` gives
    the ids; None without a text."""
    lengths = tokenizer.token_bytes().astype(np.int64)
    n_bytes = other = 0
    for text in texts:
        both = (tokenizer.encode(text).astype(np.int64), np.asarray(encode(text), np.int64))
        # where a token begins, and which it is
        ours, theirs = ((np.cumsum(lengths[ids]) - lengths[ids]) * len(lengths) + ids for ids in both)
        n_bytes += int(lengths[both[0]].sum())
        other += int(lengths[both[0][~np.isin(ours, theirs)]].sum())
    return other / n_bytes if n_bytes else None


def validation_texts(ref: ModelRef, tokenizer: Tokenizer) -> list[str]:
    """The documents of a run's validation text, as far as they are measured on; none where it is gone."""
    try:
        with held_out_text(ref, ()) as held:
            tokens = np.array(held.tokens[:MEASURED_TOKENS])
    except DataError:
        return []
    return [text for text in _decoded(tokenizer, tokens) if text]


def _decoded(tokenizer: Tokenizer, tokens: np.ndarray) -> Iterator[str]:
    """The texts between ends of text."""
    if tokenizer.eot_id is None:
        return iter([tokenizer.decode(tokens)])
    return (tokenizer.decode(part) for part in np.split(tokens, np.flatnonzero(tokens == tokenizer.eot_id)))
