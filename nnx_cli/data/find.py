"""Which files are meant by paths, folders and globs: every file once, whatever names and links lead to it."""

from __future__ import annotations

import glob
import os
import re
import stat
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnx_cli.data.formats import FORMATS, format_of
from nnx_cli.data.sources import Source
from nnx_cli.errors import DataError, UsageError, nearest_file

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
        known = [(*_identity(source), source) for source in found]
        chosen = dict(sources)
        for identity, _, source in sorted(known, key=_is_link):
            first = chosen.setdefault(identity, source)
            if first is not source:
                named = "named twice" if first.name == source.name else f"the same file as {first.name}"
                again.add(f"{source.name} is {named}: read once")
        sources |= {identity: source for identity, _, source in known if chosen[identity] is source}
    if not sources:
        raise UsageError("no text was named", fix="nnx prepare FILE")
    for examples in (again, circles):
        examples.tell(note)
    return list(sources.values())


def without(sources: list[Source], held_out: list[Source], note: Note = lambda text: None) -> list[Source]:
    """The training text without the validation text, which `note` is told of. UsageError where nothing remains."""
    identities = {_identity(source)[0] for source in held_out}
    both, kept = _Examples(), []
    for source in sources:
        if _identity(source)[0] in identities:
            both.add(f"{source.name} is validation text: left out of training")
        else:
            kept.append(source)
    if not kept:
        raise UsageError(f"{sources[0].name} is both training and validation text", fix="leave out --val")
    both.tell(note)
    return kept


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


def _identity(source: Source) -> tuple[Identity, bool]:
    """What all names of a file have in common, and whether this one is a link to it."""
    if source.path is None:
        return source.name, False
    is_link = False
    try:
        status = os.lstat(source.path)
        is_link = stat.S_ISLNK(status.st_mode)
        if is_link:
            status = os.stat(source.path)
        if status.st_ino:
            return (status.st_dev, status.st_ino), is_link
    except OSError:  # opening it will say why
        pass
    return os.path.normcase(os.path.realpath(source.path)), is_link


def _is_link(found: tuple[Identity, bool, Source]) -> bool:
    """A key that sorts a file's own name before those of links to it."""
    return found[1]


def _files(path: str, circles: _Examples) -> list[Source]:
    """The files behind one path or glob. DataError where there is none."""
    if os.path.islink(path) and not os.path.exists(path):
        raise DataError(f"cannot read {path}: it is a link to what is not there")
    names = [path] if os.path.lexists(path) else _matches(path, circles)
    if not names and "://" in path:
        raise DataError(f"{path} is an address, and nnx downloads no text", fix="save it as a file and name that")
    if not names:
        raise DataError(f"there is no {path}{nearest_file(path)}")
    files: dict[str, None] = {}  # a set that remembers the order
    for name in names:
        if name != path and not (os.path.isdir(name) or os.path.isfile(name)):
            circles.add(f"{name} is no file: left out")
            continue
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
    return sorted(names, key=_folders_last)


def _folders_last(path: str) -> list[tuple[int, str]]:
    *folders, name = path.split(os.sep)
    return [*((1, part) for part in folders), (0, name)]


def _folders(top: str, circles: _Examples) -> Iterator[tuple[str, list[str]]]:
    """`top` and all folders below it with the names of their files, each once, without what is hidden.

    Links to folders are followed after all others, but for those that lead upwards.
    """
    home = os.path.realpath(top)
    seen = set()
    waiting, links = [top], deque[str]()
    while waiting or links:
        here = waiting.pop() if waiting else links.popleft()
        identity, is_link = _identity(Source(here, Path(here)))
        if here != top and (identity in seen or (is_link and _leads_up(here, home))):
            where = "to a folder that is read anyway" if identity in seen else "upwards"
            circles.add(f"{here} leads {where}: not followed")
            continue
        seen.add(identity)
        try:
            with os.scandir(here or os.curdir) as found:
                entries = sorted((entry for entry in found if entry.name[0] != "."), key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(f"cannot read {here}: {error.strerror}") from error
        folders, files = [], []
        for entry in entries:
            path = os.path.join(here, entry.name)
            if entry.is_symlink():
                links += [path] if os.path.isdir(path) else []
                files += [entry.name] if os.path.isfile(path) else []
            elif entry.is_dir(follow_symlinks=False):
                folders.append(path)
            elif entry.is_file(follow_symlinks=False):
                files.append(entry.name)
        waiting += reversed(folders)
        yield here, files


def _leads_up(link: str, home: str) -> bool:
    """Whether a link leads to a folder that it lies in, or that `home` lies in."""
    target = os.path.realpath(link)
    place = os.path.realpath(os.path.dirname(link))
    return any(Path(inner).is_relative_to(target) for inner in (place, home))
