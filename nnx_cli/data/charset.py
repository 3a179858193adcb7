"""Bytes to text: finds out the encoding, decodes block by block, and counts what could not be decoded."""

from __future__ import annotations

import codecs
from collections.abc import Iterator

from nnx_cli.data.compression import BLOCK_BYTES, Stream
from nnx_cli.errors import DataError

PROBE_BYTES = 2**16
MAX_NUL_SHARE = 0.001
MAX_CONTROL_SHARE = 0.05
CONTROLS = bytes(b for b in range(32) if b not in b"\t\n\v\f\r\b\x1b")
BINARY_MAGIC = {
    b"\x7fELF": "an ELF program",
    b"\x89PNG\r\n\x1a\n": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"%PDF-": "a PDF",
    b"MZ\x90\x00": "a Windows program",
    b"SQLite format 3\x00": "an SQLite database",
    b"PK\x03\x04": "a zip archive",
    b"PAR1": "a parquet table",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"\x93NUMPY": "a NumPy array",
    b"OggS": "an Ogg file",
    b"\x00asm": "a WebAssembly module",
}
BOMS = {  # the longer ones first: UTF-32 begins like UTF-16
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}


class TextReader:
    """Text of one file in blocks of at most 1 MiB of bytes. After the last: `encoding`, `n_replaced` (bytes)."""

    def __init__(self, stream: Stream, *, strict: bool) -> None:
        self.encoding = "utf-8"
        self.guessed = False  # neither UTF-8 nor marked: cp1252, or UTF-16 told by its zero bytes
        self.n_replaced = 0
        self._stream = stream
        self._strict = strict

    def __iter__(self) -> Iterator[str]:
        self._detect()
        decoder = None
        while True:
            data = self._stream.read(BLOCK_BYTES)
            if decoder is None and self.encoding == "utf-8" and not data.isascii():
                self._confirm_utf8(data)
            if decoder is None and (not data.isascii() or self.encoding != "utf-8"):
                decoder = codecs.getincrementaldecoder(self.encoding)("strict" if self._strict else "replace")
            text = data.decode("ascii") if decoder is None else self._decode(decoder, data)
            if text:
                yield text
            if not data:
                return

    def _detect(self) -> None:
        head = self._stream.peek(PROBE_BYTES)
        for bom, encoding in BOMS.items():
            if head.startswith(bom):
                self.encoding = encoding
                self._stream.read(len(bom))
                return
        _refuse_binary(head, self._stream.name)
        if guess := _utf16_without_bom(head):
            self.encoding, self.guessed = guess, True

    def _confirm_utf8(self, data: bytes) -> None:
        """Called with the first block that is not ASCII: everything before it reads alike in both encodings."""
        try:
            codecs.getincrementaldecoder("utf-8")().decode(data)
        except UnicodeDecodeError as error:
            if self._strict:
                self._refuse(error, self._stream.n_read - len(data))
            text = data.decode("utf-8", "replace")
            n_bad = text.count("\ufffd") - data.count(b"\xef\xbf\xbd")
            n_good = sum(not char.isascii() for char in text) - text.count("\ufffd")
            if n_good < n_bad:
                self.encoding, self.guessed = "cp1252", True

    def _decode(self, decoder: codecs.IncrementalDecoder, data: bytes) -> str:
        held = decoder.getstate()[0]
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            self._refuse(error, self._stream.n_read - len(data) - len(held))
        if "\ufffd" in text and not self._strict:
            raw = (held + data)[: len(held) + len(data) - len(decoder.getstate()[0])]
            n_marks = text.count("\ufffd") - raw.decode(self.encoding, "ignore").count("\ufffd")
            mark_bytes = len("\ufffd".encode(self.encoding, "ignore"))  # 0 where it cannot be written
            self.n_replaced += len(raw) - len(text.encode(self.encoding, "ignore")) + n_marks * mark_bytes
        return text

    def _refuse(self, error: UnicodeDecodeError, offset: int) -> None:
        name = "UTF-16" if self.encoding.startswith("utf-16") else self.encoding.upper()
        raise DataError(
            f"{self._stream.name} is not {name}: invalid byte 0x{error.object[error.start]:02x} "
            f"at offset {offset + error.start}",
            fix="convert the file, or take --errors replace",
        ) from error


def _refuse_binary(head: bytes, name: str) -> None:
    """Raise DataError where the beginning of a file shows that it holds no text."""
    for magic, what in BINARY_MAGIC.items():
        if head.startswith(magic):
            raise DataError(f"{name} is not text but {what}")
    if not head or _utf16_without_bom(head):
        return
    n_nul, n_control = head.count(0), len(head) - len(head.translate(None, CONTROLS))
    if n_nul > MAX_NUL_SHARE * len(head) or n_control > MAX_CONTROL_SHARE * len(head):
        raise DataError(f"{name} is binary, not text")


def _utf16_without_bom(head: bytes) -> str | None:
    """The byte order of UTF-16 whose text is mostly Latin: then every other byte is zero."""
    even, odd = head[0::2], head[1::2]
    if len(head) < 4 or b"\x00\x00" * 2 in head:
        return None
    if odd.count(0) > 0.4 * len(odd) and even.count(0) < 0.01 * len(even) + 1:
        return "utf-16-le"
    if even.count(0) > 0.4 * len(even) and odd.count(0) < 0.01 * len(odd) + 1:
        return "utf-16-be"
    return None
