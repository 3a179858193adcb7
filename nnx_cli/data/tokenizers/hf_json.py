"""tokenizer.json in the format of Hugging Face's `tokenizers`, written and read without that library.

What is not a byte-level vocabulary that tiktoken can run with the same ids is refused by name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nnx_cli.data.tokenizers import bpe
from nnx_cli.data.tokenizers.base import N_BYTES, Tokenizer, end_of_text
from nnx_cli.data.tokenizers.byte import ByteTokenizer
from nnx_cli.data.tokenizers.char import CharTokenizer
from nnx_cli.errors import DataError
from nnx_cli.system.files import read_json

MAX_VOCAB_SIZE = 2**24
MAX_SPECIALS = 2**12
MAX_TOKEN_BYTES = 256
PATTERN_TIMEOUT_S = 1.0
HF_GPT2 = bpe.plain(bpe.GPT2_PATTERN)  # what ByteLevel splits by on its own
PROBE = (
    "It's 12 o'clock (or 13:45), we'd say; a_b + c == 'd' \u2014 \u00e9t\u00e9 \u6211\u3002 x\n\n  then  3.14\tEND! "
)
PROBE += "\x00\t$1 \u20ac\u00b2 e\u0301 \U0001f600 \u0915\u094d \u0665 \u00ad\n"
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
BYTE_TOKENS = [f"<0x{b:02X}>" for b in range(N_BYTES)]


def to_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The contents of tokenizer.json."""
    model: dict[str, Any] = {"type": "BPE", "dropout": None, "unk_token": None}
    model |= {"continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False}
    splitter: dict[str, Any] | None
    decoder: dict[str, Any]
    if isinstance(tokenizer, CharTokenizer):
        names = BYTE_TOKENS + tokenizer.characters
        model |= {"byte_fallback": True, "ignore_merges": False}
        model |= {"vocab": {name: i for i, name in enumerate(names)} | tokenizer.specials, "merges": []}
        splitter, decoder = None, {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}
    else:
        ranks = tokenizer.ranks if isinstance(tokenizer, bpe.BpeTokenizer) else {bytes([b]): b for b in range(N_BYTES)}
        vocab = {bpe.to_visible(token): i for token, i in ranks.items()} | tokenizer.specials
        pairs = [f"{bpe.to_visible(a)} {bpe.to_visible(b)}" for a, b in bpe.merges(ranks)]
        # ignore_merges: a piece that is a token as a whole is taken so, as tiktoken does
        model |= {"byte_fallback": False, "ignore_merges": bool(pairs), "vocab": vocab, "merges": pairs}
        splitter, decoder = _splitter(tokenizer.pattern), BYTE_LEVEL
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_special(name, i) for name, i in sorted(tokenizer.specials.items(), key=lambda item: item[1])],
        "normalizer": None,
        "pre_tokenizer": splitter,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }


def _splitter(pattern: str | None) -> dict[str, Any]:
    if pattern is None:
        return BYTE_LEVEL
    if pattern == HF_GPT2:
        return BYTE_LEVEL | {"use_regex": True}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, BYTE_LEVEL]}


def _special(name: str, token_id: int) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": token_id, "content": name, **flags}


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Write a tokenizer.json. OSError passes through."""
    path.write_text(json.dumps(to_json(tokenizer), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json, ours or a foreign byte-level one.

    Raises DataError where it is missing, damaged, or of a kind that cannot be run here.
    """
    content = read_json(path, error=DataError, follow_links=True)
    try:
        return from_json(content)
    except _Unsupported as error:
        raise DataError(
            f"{path} cannot be used: {error}; supported are the tokenizers nnx writes and byte-level BPE "
            "whose merges follow its ids (GPT-2, Llama 3 and their like)"
        ) from error


class _Unsupported(Exception):
    """Says in a few words what is wrong with a tokenizer.json."""


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise _Unsupported(otherwise)


def from_json(content: Any) -> Tokenizer:
    """The tokenizer that the contents of a tokenizer.json define."""
    _require(isinstance(content, dict) and isinstance(content.get("model"), dict), "it has no model")
    model = content["model"]
    _require(model.get("type", "BPE") == "BPE", "its model is not BPE")
    _require(not content.get("normalizer"), "it normalizes text")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        _require(not model.get(name), f"its model has a {name}")
    vocab = _vocab(model.get("vocab"))
    pairs = _pairs(model.get("merges"))
    specials = _specials(content.get("added_tokens"), vocab)
    splitter = content.get("pre_tokenizer")
    if model.get("byte_fallback"):
        return _char(vocab, pairs, specials, splitter)
    ranks = _ranks({token: i for token, i in vocab.items() if token not in specials})
    if _is_byte_level(splitter, use_regex=False) and not pairs:
        in_order = [ranks[bytes([b])] for b in range(N_BYTES)] == list(range(len(ranks)))
        _require(in_order, "its ids are no bytes")
        return ByteTokenizer(_behind(specials, N_BYTES))
    last = max(ranks.values())
    _require(len(ranks) + sum(i < last for i in specials.values()) == last + 1, "its ids have gaps")
    _require(max(specials.values(), default=0) <= last + MAX_SPECIALS, "the ids of its added tokens are too large")
    pattern = _pattern(splitter)
    _check_pattern(pattern)
    tokenizer = bpe.BpeTokenizer(ranks, pattern, specials, end_of_text(specials))
    if tokenizer.kind not in bpe.PUBLISHED:
        _check_merges(ranks, pairs, bool(model.get("ignore_merges")))
        _require(tokenizer.cuts_safely(PROBE), "its regular expression does not start a piece at every word")
    return tokenizer


def _vocab(vocab: Any) -> dict[str, int]:
    _require(isinstance(vocab, dict) and bool(vocab), "it has no vocabulary")
    ids = list(vocab.values())
    _require(all(type(i) is int and 0 <= i < MAX_VOCAB_SIZE for i in ids), "its vocabulary has ids that are none")
    _require(len(set(ids)) == len(ids), "two of its tokens share an id")
    return vocab


def _pairs(merges: Any) -> list[tuple[str, str]]:
    """Merges, written as "a b" or, in newer files, as ["a", "b"]."""
    _require(isinstance(merges, list), "it has no list of merges")
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    for pair in pairs:
        is_pair = isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], str)
        _require(is_pair, "one of its merges is no pair")
    return [(a, b) for a, b in pairs]


def _specials(added: Any, vocab: dict[str, int]) -> dict[str, int]:
    specials: dict[str, int] = {}
    _require(added is None or isinstance(added, list), "its added tokens are no list")
    for token in added or []:
        _require(isinstance(token, dict), "one of its added tokens is damaged")
        name, token_id = token.get("content"), token.get("id")
        is_id = type(token_id) is int and 0 <= token_id < MAX_VOCAB_SIZE
        _require(is_id and isinstance(name, str), "one of its added tokens is damaged")
        _require(vocab.get(name, token_id) == token_id, "one of its added tokens has two ids")
        specials[name] = token_id
    taken = {i for token, i in vocab.items() if token not in specials}
    _require(len(set(specials.values()) - taken) == len(specials), "an added token has the id of another token")
    return specials


def _behind(specials: dict[str, int], n: int) -> dict[str, int]:
    """Special tokens in the order of their ids, which have to be the next behind `n` others."""
    _require(sorted(specials.values()) == list(range(n, n + len(specials))), "the ids of its added tokens have gaps")
    return dict(sorted(specials.items(), key=lambda item: item[1]))


def _char(vocab: dict[str, int], pairs: list, specials: dict[str, int], splitter: Any) -> CharTokenizer:
    names = sorted(vocab.keys() - specials.keys(), key=vocab.__getitem__)
    ours = not pairs and splitter is None and names[:N_BYTES] == BYTE_TOKENS
    characters = names[N_BYTES:]
    _require(ours and all(len(char) == 1 for char in characters), "its byte_fallback is not of single characters")
    in_order = characters == sorted(characters) and [vocab[name] for name in names] == list(range(len(names)))
    _require(in_order, "its ids have gaps or are out of order")
    _require(not any("\ud800" <= char <= "\udfff" for char in characters), "a lone surrogate is among its characters")
    return CharTokenizer(characters, _behind(specials, len(names)))


def _ranks(vocab: dict[str, int]) -> dict[bytes, int]:
    try:
        ranks = {bpe.to_bytes(token): i for token, i in vocab.items()}
    except UnicodeEncodeError as error:
        raise _Unsupported("its tokens are not written in byte-level characters") from error
    missing = [b for b in range(N_BYTES) if bytes([b]) not in ranks]
    _require(not missing, f"{len(missing)} of the 256 bytes have no token")
    _require(b"" not in ranks and max(map(len, ranks)) <= MAX_TOKEN_BYTES, "one of its tokens is empty or too long")
    return ranks


def _is_byte_level(splitter: Any, *, use_regex: bool) -> bool:
    if not isinstance(splitter, dict) or splitter.get("type") != "ByteLevel" or splitter.get("add_prefix_space"):
        return False
    return splitter.get("use_regex", True) is use_regex


def _pattern(splitter: Any) -> str:
    """The regular expression that cuts text into pieces."""
    if _is_byte_level(splitter, use_regex=True):
        return bpe.GPT2_PATTERN
    steps: Any = splitter.get("pretokenizers") if isinstance(splitter, dict) else None
    _require(
        isinstance(steps, list)
        and len(steps) == 2
        and isinstance(steps[0], dict)
        and steps[0].get("type") == "Split"
        and steps[0].get("behavior") == "Isolated"
        and not steps[0].get("invert")
        and isinstance(steps[0].get("pattern"), dict)
        and isinstance(steps[0]["pattern"].get("Regex"), str)
        and _is_byte_level(steps[1], use_regex=False),
        "its pre_tokenizer is neither ByteLevel nor Split by a regular expression and ByteLevel",
    )
    pattern = steps[0]["pattern"]["Regex"]
    _require("(?<" not in pattern, "its regular expression looks behind")
    return pattern


def _check_pattern(pattern: str) -> None:
    """Try a regular expression here before tiktoken does, which aborts loudly on a piece of no length."""
    import regex  # what tiktoken itself depends on

    try:
        found = regex.finditer(pattern.replace(r"\z", r"\Z"), PROBE, timeout=PATTERN_TIMEOUT_S)
        pieces = [match.group() for match in found]
    except (regex.error, TimeoutError) as error:
        raise _Unsupported("its regular expression cannot be used") from error
    _require("".join(pieces) == PROBE and "" not in pieces, "its regular expression leaves out text")


def _check_merges(ranks: dict[bytes, int], pairs: list[tuple[str, str]], ignore_merges: bool) -> None:
    """tiktoken merges in the order of ids: so must the file. It may list other pairs too, which never come up."""
    try:
        listed = [(bpe.to_bytes(a), bpe.to_bytes(b)) for a, b in pairs]
    except UnicodeEncodeError as error:
        raise _Unsupported("its merges are not written in byte-level characters") from error
    ids = [ranks.get(a + b, -1) for a, b in listed]
    needed = list(bpe.merges(ranks))
    in_order = -1 not in ids and ids == sorted(ids) and set(needed) <= set(listed)
    _require(in_order, "its merges do not follow its ids")
    _require(ignore_merges or len(needed) == sum(len(token) > 1 for token in ranks), "some of its tokens have no merge")
