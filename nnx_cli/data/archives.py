"""Archives: the text files inside a zip, one after the other."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from functools import partial
from typing import BinaryIO

from nnx_cli.data.compression import Stream, brief
from nnx_cli.data.formats import FORMATS, format_of
from nnx_cli.errors import DataError


def zip_members(file: BinaryIO, name: str) -> Iterator[Stream]:
    """The text files of the zip archive `name`, told by their suffixes. DataError where there is none."""
    try:
        archive = zipfile.ZipFile(file)
        members = [member for member in archive.infolist() if format_of(member.filename)]
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise DataError(f"{name} is damaged: {brief(error)}") from error
    if not members:
        raise DataError(f"{name} holds no {' '.join(FORMATS)} file")
    for member in members:
        label = f"{name}/{member.filename}"
        try:
            raw = archive.open(member)
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError) as error:
            raise DataError(f"{label} cannot be read: {brief(error)}") from error
        with raw:
            stream = Stream(raw, label, (zipfile.BadZipFile, EOFError, zlib.error))
            stream.n_stored = partial(getattr, member, "compress_size")
            yield stream
