"""Which documents are held out for validation, decided while they stream by.

From the 100th document on, whole documents are held out, evenly spread, and the first 99 are sorted in afterwards.
With fewer documents the end of the text is held out, cut at a line.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from nnx_cli.data.token_file import MASK_DTYPE, START_DTYPE, TokenFile, read_ids
from nnx_cli.data.tokenizers.base import Tokenizer

MIN_DOCUMENTS = 100  # for holding out whole ones
SEARCH_TOKENS = 2**18  # how far from the wanted place a line may end
MILLION = 10**6


class SplitWriter:
    """Writes documents to the two splits of a folder, with separators between them. OSError passes through."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, val_fraction: float | None, masked: bool = False) -> None:
        """`val_fraction` None holds nothing out: then `add_val` is given the validation documents. With `masked` not
        all tokens count."""
        self.n_documents = 0
        self.n_separators = 0  # written as text: newlines, in both files
        self.masked = masked
        self.train = TokenFile(folder / "train.bin", tokenizer.dtype, masked)
        self.val = TokenFile(folder / "val.bin", tokenizer.dtype, masked)
        self.val_fraction = val_fraction
        self._tokenizer = tokenizer
        self._separator = tokenizer.separator
        self._share = round((val_fraction or 0.0) * MILLION)
        self._spans: list[list[int]] | None = None if val_fraction is None else []  # of the first documents
        self._file: TokenFile | None = None  # that takes the open document

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(self, *error: object) -> None:
        """Leave no file open, for some systems could not remove the folder."""
        self.train.let_go()
        self.val.let_go()

    def add(self, ids: np.ndarray, ends: bool, counts: np.ndarray | None = None) -> None:
        """The next ids of a document, and which of them count, where not all do."""
        if len(ids):
            if self._file is None:
                self._file = self._begin(self._choose())
                if self._spans is not None:
                    self._spans.append([self.train.n_tokens, 0])
            self._file.write(ids, counts)
        if ends and self._file is not None:
            if self._spans is not None:
                self._spans[-1][1] = self.train.n_tokens
            self._file = None

    def add_val(self, ids: np.ndarray, ends: bool, counts: np.ndarray | None = None) -> None:
        """The next ids of a document that was named for validation."""
        if len(ids):
            if self._file is None:
                self.n_documents += 1
                self._file = self._begin(self.val)
            self._file.write(ids, counts)
        self._file = None if ends else self._file

    def _choose(self) -> TokenFile:
        if self._spans is not None and self.n_documents == MIN_DOCUMENTS - 1:
            self._sort_in()
        held_out = self.val_fraction is not None and self._spans is None and self._held_out(self.n_documents)
        self.n_documents += 1
        return self.val if held_out else self.train

    def _begin(self, file: TokenFile) -> TokenFile:
        """Begin a document in `file`, after a separator where one is needed."""
        needed = self._tokenizer.eot_id is not None or not file.ends_with(self._separator.item(-1))
        if file.n_tokens and needed:
            file.write(self._separator)
            self.n_separators += 1
        file.begin_document()
        return file

    def _held_out(self, index: int) -> bool:
        """Document i is held out where (i + 1/2) x fraction passes an integer; in integers, so that none is missed."""
        reached = index * self._share + MILLION // 2
        return reached // MILLION < (reached + self._share) // MILLION

    def _sort_in(self) -> None:
        """Distribute the first documents, which went to train.bin, now that there are enough of them."""
        spans, self._spans = self._spans or [], None
        self.train.flush()
        self.train.let_go()
        first, dtype = self.train.path.with_name("first.bin"), self._tokenizer.dtype
        os.replace(self.train.path, first)
        if self.masked:
            os.replace(self.train.flags_path, first.with_suffix(".flags"))
        self.train = TokenFile(self.train.path, dtype, self.masked)
        self.n_separators = 0
        for index, (start, stop) in enumerate(spans):
            file = self._begin(self.val if self._held_out(index) else self.train)
            self._copy(first, file, start, stop)
        first.unlink()
        first.with_suffix(".flags").unlink(missing_ok=True)

    def finish(self) -> None:
        """Hold out the end of the text where no document was, and close both files. May leave one empty."""
        if self.val_fraction is not None and not self.val.n_tokens and self.train.n_tokens > 1:
            self._cut_tail(self.val_fraction)
        self.train.close()
        self.val.close()

    def _cut_tail(self, fraction: float) -> None:
        """Move the end of train.bin to val.bin, and the documents that begin there."""
        self.train.flush()
        n, dtype = self.train.n_tokens, self._tokenizer.dtype
        wanted = n - max(1, min(n - 1, round(n * fraction)))
        reach = min((n - wanted) // 2, SEARCH_TOKENS)
        start, stop = max(0, wanted - reach - 1), min(n, wanted + reach + 1)
        around = np.concatenate(list(read_ids(self.train.path, dtype, start, stop)))
        cut = start + _nearest_cut(around, wanted - start, self._tokenizer)
        self.val.begin_document()  # or the rest of one
        for starts in read_ids(self.train.documents_path, START_DTYPE):
            for place in starts[starts > cut].tolist():
                self.val.begin_document(place - cut)
        self._copy(self.train.path, self.val, cut, n)
        self.train.truncate(cut)

    def _copy(self, path: Path, to: TokenFile, start: int, stop: int) -> None:
        """Tokens start..stop of a .bin file, and whether they count."""
        for ids in read_ids(path, self._tokenizer.dtype, start, stop):
            end, counts = start + len(ids), None
            if self.masked:
                counts = np.concatenate([*read_ids(path.with_suffix(".flags"), MASK_DTYPE, start, end)])
            to.write(ids, counts)
            start = end


def _nearest_cut(ids: np.ndarray, wanted: int, tokenizer: Tokenizer) -> int:
    """The index next to `wanted` that begins a line, else a character; never 0."""
    ends_line = _marks(t.endswith(b"\n") for t in tokenizer.tokens)
    if tokenizer.eot_id is not None:
        ends_line[tokenizer.eot_id] = True
    places = 1 + np.flatnonzero(ends_line[ids[:-1]])
    if not len(places):
        inside = _marks(t[:1] != b"" and t[0] & 0xC0 == 0x80 for t in tokenizer.tokens)
        places = 1 + np.flatnonzero(~inside[ids[1:]])
    return int(places[np.abs(places - wanted).argmin()]) if len(places) else wanted


def _marks(flags: Iterable[bool]) -> np.ndarray:
    return np.fromiter(flags, bool)
