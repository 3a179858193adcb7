"""Bytes to text: finds out the encoding, decodes block by block, and counts what could not be decoded."""

from __future__ import annotations

import codecs
import io
from collections.abc import Callable, Iterator
from typing import NoReturn

from nnx_cli.data.charset_guess import Guess, guess_encoding, guess_wide
from nnx_cli.data.compression import BLOCK_BYTES, Stream, unpack
from nnx_cli.errors import DataError, counted

PROBE_BYTES = 2**16
BEFORE_BYTES = 64  # of plain ASCII before what is guessed
ENOUGH_BYTES, GUESS_BYTES = 1000, 2**22  # a block with fewer bytes beyond ASCII is guessed by so much more of the text
MANY_CHARS = 12  # of UTF-8, beyond ASCII, in a row
MIN_CONFIDENCE = 0.6  # of a guess that is taken
MAX_NUL_SHARE = 0.001
MAX_CONTROL_SHARE = 0.05
CONTROLS = bytes(b for b in range(32) if b not in b"\t\n\v\f\r\b\x1b")
AS_TEXT, UNPACK, AS_ROWS = "save it as plain text", "unpack it first", "write its rows as parquet or JSON lines"
LFS_POINTER = b"version https://git-lfs"
NO_TEXT = {  # how files begin that are none: what they are, and what makes text of them
    LFS_POINTER: ("a pointer of Git LFS to it", "get it: git lfs pull"),
    b"%PDF-": ("a PDF", AS_TEXT),
    b"%!PS-": ("a PostScript document", AS_TEXT),
    b"{\\rtf": ("a rich text document", AS_TEXT),
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": ("an office document", AS_TEXT),
    b"PK\x03\x04": ("a zip archive", UNPACK),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", UNPACK),
    b"Rar!\x1a\x07": ("a RAR archive", UNPACK),
    b"MSCF\0": ("a cabinet archive", UNPACK),
    b"\x04\x22\x4d\x18": ("compressed by lz4", UNPACK),
    b"\x5d\0\0\x80": ("compressed by lzma", UNPACK),
    b"\x1f\x9d": ("compressed by compress", UNPACK),
    b"PAR1": ("a parquet table", AS_ROWS),
    b"ARROW1\0": ("an Arrow table", AS_ROWS),
    b"FEA1": ("a Feather table", AS_ROWS),
    b"Obj\x01": ("an Avro table", AS_ROWS),
    b"SQLite format 3\0": ("an SQLite database", AS_ROWS),
    b"\x7fELF": ("an ELF program", None),
    b"MZ\x90\0": ("a Windows program", None),
    b"\xcf\xfa\xed\xfe": ("a macOS program", None),
    b"\0asm": ("a WebAssembly module", None),
    b"\x89PNG\r\n\x1a\n": ("a PNG image", None),
    b"\xff\xd8\xff": ("a JPEG image", None),
    b"GIF8": ("a GIF image", None),
    b"OggS": ("an Ogg file", None),
    b"ID3\x03": ("an MP3 file", None),
    b"ID3\x04": ("an MP3 file", None),
    b"\x93NUMPY": ("a NumPy array", None),
    b"\x89HDF\r\n\x1a\n": ("an HDF5 file", None),
    b"GGUF\x03": ("a GGUF model", None),
}
BOMS = {  # the longer ones first: UTF-32 begins like UTF-16
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
MARKS = (*BOMS, *NO_TEXT)
ESCAPES = b"\x1b$", b"\x1b(J", b"\x1b(I"  # what ISO-2022 switches character sets with
ESCAPED = "iso2022_jp_ext", "iso2022_jp_2", "iso2022_jp_3", "iso2022_kr"
ASCII, BEYOND_ASCII = bytes(range(128)), bytes(range(128, 256))
MARKED = "nnx.marked"
INVALID, MORE_INVALID = "\udcff", "\udcfe"  # stand for a run of invalid bytes: its first one, each further one


class TextReader:
    """Text of one file in blocks of at most 1 MiB of bytes. After the last: `encoding`, `n_replaced` (bytes)."""

    def __init__(
        self,
        stream: Stream,
        *,
        strict: bool,
        encoding: str | None = None,
        likely: Callable[[], Guess] | None = None,
        controls: bool = False,
    ) -> None:
        """`encoding` is what the user says that unmarked text is in; without it that is found out. What is not UTF-8 is
        in the `likely` one, where it is known from other text of the same kind. Text with many control characters is
        taken for binary data, but where `controls` are allowed."""
        self.encoding = encoding or "utf-8"
        self.guess: Guess | None = None
        self.n_replaced = 0
        self._known = encoding is not None
        self._likely = likely
        self._controls = controls
        self._stream = stream
        self._strict = strict

    @property
    def notes(self) -> list[str]:
        """What the user should know, once all is read."""
        notes = []
        if self.n_replaced:
            notes.append(f"{self._stream.name}: {counted(self.n_replaced, 'invalid byte')} became U+FFFD")
        if self.guess is not None:
            notes.append(guess_note(self._stream.name, self.guess))
        return notes

    def __iter__(self) -> Iterator[str]:
        self._detect()
        decoder = None
        while True:
            data = self._stream.read(BLOCK_BYTES)
            if decoder is None and not self._known:
                self._decide(data)
            if decoder is None and self._known:
                decoder = codecs.getincrementaldecoder(self.encoding)("strict" if self._strict else MARKED)
            text = data.decode("ascii") if decoder is None else self._decode(decoder, data)
            if text:
                yield text
            if not data:
                return

    def _detect(self) -> None:
        """Look at the beginning: a mark, binary data, UTF-16 and UTF-32 by what no other text has."""
        head = self._stream.peek(PROBE_BYTES)
        begins = next(filter(head.startswith, MARKS), None) if head.startswith(MARKS) else None
        if begins in BOMS:
            self.encoding, self._known = BOMS[begins], True
            self._stream.read(len(begins))
            return
        if begins in NO_TEXT:
            what, fix = NO_TEXT[begins]
            raise DataError(f"{self._stream.name} is not text but {what}", fix=fix)
        if self._known or not _has_controls(head) or _escaped(head):
            return
        wide = _latin_utf16(head) or guess_wide(head)
        if wide.confidence < MIN_CONFIDENCE and self._controls:
            return
        if wide.confidence < MIN_CONFIDENCE:
            raise DataError(
                f"{self._stream.name} is binary, not text", fix="if it is text, name its encoding: --encoding NAME"
            )
        self._take(wide)

    def _decide(self, data: bytes) -> None:
        """Settle the encoding with the first block that is not plain ASCII: before it all of them read alike."""
        if data.isascii():
            if encoding := _escaped(data):
                self._take(Guess(encoding, 0.99))
            return
        self._known = True
        try:
            codecs.getincrementaldecoder("utf-8")().decode(data)
        except UnicodeDecodeError as error:
            offset = self._stream.n_read - len(data)
            guess = None if _is_mostly_utf8(data, error.start) else self._guess(data)
            if self._strict:
                self._refuse(error, offset, guess)
            if guess is not None:
                self._take(guess)

    def _guess(self, data: bytes) -> Guess:
        """The likeliest encoding of text that is not UTF-8."""
        if self._likely is not None:
            return self._likely()
        wide = guess_wide(data) if self._stream.n_read == len(data) else None
        n_beyond = len(data) - len(data.translate(None, BEYOND_ASCII))
        data = data[max(0, len(data) - len(data.lstrip(ASCII)) - BEFORE_BYTES) :]
        guess = guess_encoding(data if n_beyond >= ENOUGH_BYTES else data + self._stream.peek(GUESS_BYTES))
        return guess if wide is None or wide.confidence < max(guess.confidence, MIN_CONFIDENCE) else wide

    def _take(self, guess: Guess) -> None:
        if guess.confidence < MIN_CONFIDENCE:
            raise DataError(
                f"{self._stream.name} is not UTF-8, and its encoding cannot be told: at best {_described(guess)}",
                fix="name it: --encoding NAME, such as cp1252, gb18030 or utf-16",
            )
        self.encoding, self.guess, self._known = guess.encoding, guess, True

    def _decode(self, decoder: codecs.IncrementalDecoder, data: bytes) -> str:
        held = decoder.getstate()[0] if self._strict else b""
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            self._refuse(error, self._stream.n_read - len(data) - len(held))
        if INVALID in text:
            self.n_replaced += text.count(INVALID) + text.count(MORE_INVALID)
            text = text.replace(MORE_INVALID, "").replace(INVALID, "\ufffd")
        return text

    def _refuse(self, error: UnicodeDecodeError, offset: int, guess: Guess | None = None) -> NoReturn:
        likely = guess is not None and guess.confidence >= MIN_CONFIDENCE
        raise DataError(
            f"{self._stream.name} is not {_shown(self.encoding)}: invalid byte 0x{error.object[error.start]:02x} "
            f"at offset {offset + error.start}" + (f"; it reads like {_described(guess)}" if guess and likely else ""),
            fix=f"take --encoding {guess.encoding if guess and likely else 'NAME'}, or --errors replace",
        ) from error


def read_text(stream: Stream, limit: int, encoding: str | None = None) -> tuple[str, list[str]]:
    """All text of a small file, which is read as training text is, and what the user should know of that.

    Raises DataError where it is no text, or has more than `limit` bytes (or no end, as /dev/zero).
    """
    content = unpack(stream)
    data = content.read(limit + 1)
    if len(data) > limit:
        raise DataError(f"{stream.name} has more than {limit >> 10:,} KiB")
    reader = TextReader(Stream(io.BytesIO(data), stream.name), strict=False, encoding=encoding, controls=True)
    return "".join(reader), reader.notes


def guess_note(name: str, guess: Guess) -> str:
    """What the user should know of text whose encoding was guessed."""
    return f"{name}: read as {_described(guess)}; --encoding NAME chooses another"


def _described(guess: Guess) -> str:
    return f"{_shown(guess.encoding)} (confidence {100 * guess.confidence:.0f} %)"


def _shown(encoding: str) -> str:
    """The name of an encoding as people write it, and as --encoding takes it."""
    return encoding if encoding.startswith(("cp", "mac")) else encoding.upper().replace("_", "-")


def _mark_invalid(error: UnicodeError) -> tuple[str, int]:
    """An error handler of codecs: marks that can be counted, and never stand in what was decoded."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return INVALID + MORE_INVALID * (error.end - error.start - 1), error.end


codecs.register_error(MARKED, _mark_invalid)


def _is_mostly_utf8(data: bytes, first_error: int) -> bool:
    """Whether text that is not UTF-8 from `first_error` on is so by mistake: damaged, or joined from several files. In
    other encodings hardly a sequence of bytes passes for UTF-8 by chance, and no dozen at the beginning."""
    before = data[:first_error].decode()
    if len(before) - len(data[:first_error].translate(None, BEYOND_ASCII)) >= MANY_CHARS:
        return True
    text = data.decode("utf-8", "replace")
    n_bad = text.count("\ufffd") - data.count(b"\xef\xbf\xbd")
    n_good = sum(not char.isascii() for char in text) - text.count("\ufffd")
    return n_good >= n_bad


def _has_controls(head: bytes) -> bool:
    """Whether the beginning of a file has more control characters than text in one byte a character has."""
    n_nul, n_control = head.count(0), len(head) - len(head.translate(None, CONTROLS))
    return n_nul > MAX_NUL_SHARE * len(head) or n_control > MAX_CONTROL_SHARE * len(head)


def _escaped(data: bytes) -> str | None:
    """The ISO-2022 encoding whose escape sequences are in a text of ASCII bytes, if any."""
    if b"\x1b" not in data or not any(escape in data for escape in ESCAPES):  # the first is found at memory speed
        return None
    whole = data[: data.rfind(b"\n") + 1] or data
    for encoding in ESCAPED:
        try:
            if not whole.decode(encoding).isascii():
                return encoding
        except UnicodeDecodeError:
            continue
    return None


def _latin_utf16(head: bytes) -> Guess | None:
    """UTF-16 of mostly Latin text: every other byte is zero."""
    even, odd = head[0::2], head[1::2]
    if len(head) < 4 or b"\x00\x00" * 2 in head:
        return None
    if odd.count(0) > 0.4 * len(odd) and even.count(0) < 0.01 * len(even) + 1:
        return Guess("utf-16-le", 0.99)
    if even.count(0) > 0.4 * len(even) and odd.count(0) < 0.01 * len(odd) + 1:
        return Guess("utf-16-be", 0.99)
    return None
