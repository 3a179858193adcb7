"""Which files are meant by paths, folders and globs: every file once, whatever names and links lead to it."""

from __future__ import annotations

import glob
import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnx_cli.data.formats import FORMATS, format_of
from nnx_cli.data.sources import Source
from nnx_cli.errors import DataError, UsageError

STDIN = "-"
SEPARATORS = re.escape(os.sep + (os.altsep or ""))
ANY_DEPTH = re.compile(rf"(?<![^{SEPARATORS}])\*\*(?![^{SEPARATORS}])")  # ** that is a whole part of a path

Note = Callable[[str], None]
Identity = tuple[int, int] | str


def find_sources(paths: Sequence[str | Path], note: Note = lambda text: None) -> list[Source]:
    """The files behind paths, folders (all text files in them, sorted), globs, and `-` for standard input.

    Each file once; `note` is told which names and links are left out for that. DataError where a path leads to nothing.
    """
    sources: dict[Identity, Source] = {}
    again, circles = _Examples(), _Examples()
    for path in map(str, paths):
        found = [Source("standard input")] if path == STDIN else _files(path, circles)
        identities = [_identity(source) for source in found]
        chosen = dict(sources)
        for identity, source in sorted(zip(identities, found, strict=True), key=_is_link):
            first = chosen.setdefault(identity, source)
            if first is not source:
                named = "named twice" if first.name == source.name else f"the same file as {first.name}"
                again.add(f"{source.name} is {named}: read once")
        sources |= {i: source for i, source in zip(identities, found, strict=True) if chosen[i] is source}
    if not sources:
        raise UsageError("no text was named", fix="nnx prepare FILE")
    for examples in (again, circles):
        examples.tell(note)
    return list(sources.values())


def without(sources: list[Source], held_out: list[Source], note: Note = lambda text: None) -> list[Source]:
    """The training text without the validation text, which `note` is told of. UsageError where nothing remains."""
    identities = {_identity(source) for source in held_out}
    both = _Examples()
    for source in sources:
        if _identity(source) in identities:
            both.add(f"{source.name} is validation text: left out of training")
    if both.n == len(sources):
        raise UsageError(f"{sources[0].name} is both training and validation text", fix="leave out --val")
    both.tell(note)
    return [source for source in sources if _identity(source) not in identities]


@dataclass
class _Examples:
    """How often something happened, and the first case."""

    n: int = 0
    first: str = ""

    def add(self, case: str) -> None:
        self.n += 1
        self.first = self.first or case

    def tell(self, note: Note) -> None:
        if self.n:
            note(self.first + (f" ({self.n - 1:,} more like it)" if self.n > 1 else ""))


def _identity(source: Source) -> Identity:
    """What all names of a file have in common."""
    if source.path is None:
        return source.name
    try:
        status = os.stat(source.path)
    except OSError:  # opening it will say why
        status = None
    if status is None or not status.st_ino:
        return os.path.normcase(os.path.realpath(source.path))
    return status.st_dev, status.st_ino


def _is_link(found: tuple[Identity, Source]) -> bool:
    """A key that sorts a file's own name before those of links to it."""
    return os.path.islink(found[1].path or "")


def _files(path: str, circles: _Examples) -> list[Source]:
    """The files behind one path or glob. DataError where there is none."""
    names = [path] if os.path.lexists(path) else _matches(path, circles)
    if not names:
        raise DataError(f"there is no {path}")
    files: dict[str, None] = {}  # a set that remembers the order
    for name in names:
        files |= dict.fromkeys(_texts_below(name, circles) if os.path.isdir(name) else [name])
    if not files:
        raise DataError(f"{path} holds no {' '.join(FORMATS)} file, compressed or not")
    return [Source(file, Path(file), of_many=file != path) for file in files]


def _matches(pattern: str, circles: _Examples) -> list[str]:
    """What a glob leads to, sorted. `**` follows no link in circles, as Python's glob would."""
    wild = ANY_DEPTH.search(pattern)
    if wild is None:
        return sorted(glob.glob(pattern))
    top, tail = pattern[: wild.start()], pattern[wild.end() :]
    rest = tail.lstrip(os.sep + (os.altsep or ""))
    names = set()
    for folder in glob.glob(top) if top else [""]:
        for here, files in _folders(folder, circles):
            if rest:
                names.update(_matches(os.path.join(glob.escape(here), rest), circles))
            else:
                names.update([here] if tail else [os.path.join(here, name) for name in files])
    return sorted(names)


def _texts_below(folder: str, circles: _Examples) -> list[str]:
    """All text files in a folder and those below, in the order of names: files before folders."""
    names = [os.path.join(here, name) for here, files in _folders(folder, circles) for name in files if format_of(name)]
    return sorted(names, key=lambda name: [(1, part) for part in Path(name).parts[:-1]] + [(0, os.path.basename(name))])


def _folders(top: str, circles: _Examples) -> Iterator[tuple[str, list[str]]]:
    """`top` and all folders below it with the names of their files, each once, without what is hidden.

    Links to folders are followed after all others, but for those that lead upwards.
    """
    home = os.path.realpath(top)
    seen = set()
    waiting, links = [top], deque[str]()
    while waiting or links:
        here = waiting.pop() if waiting else links.popleft()
        identity = _identity(Source(here, Path(here)))
        if here != top and (identity in seen or _leads_up(here, home)):
            where = "to a folder that is read anyway" if identity in seen else "upwards"
            circles.add(f"{here} leads {where}: not followed")
            continue
        seen.add(identity)
        try:
            names = sorted(name for name in os.listdir(here or os.curdir) if not name.startswith("."))
        except OSError as error:
            raise DataError(f"cannot read {here}: {error.strerror}") from error
        paths = [os.path.join(here, name) for name in names]
        folders = [path for path in paths if os.path.isdir(path)]
        waiting += [path for path in reversed(folders) if not os.path.islink(path)]
        links += [path for path in folders if os.path.islink(path)]
        yield here, [name for name, path in zip(names, paths, strict=True) if os.path.isfile(path)]


def _leads_up(path: str, home: str) -> bool:
    """Whether a link leads to a folder that it lies in, or that `home` lies in."""
    target = os.path.realpath(path)
    place = os.path.realpath(os.path.dirname(path))
    return os.path.islink(path) and any(Path(inner).is_relative_to(target) for inner in (place, home))
