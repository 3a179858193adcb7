"""Everything a user can get wrong or run out of, each kind with the exit code that scripts rely on."""

from __future__ import annotations

import difflib
import errno
import importlib.machinery
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterable

NO_MEMORY = "can't allocate memory", "std::bad_alloc"  # in errors of torch and of what it is built on


class NnxError(Exception):
    """Ends a command with one line: what happened, why, and (`fix`) the command that mends it."""

    exit_code = 1

    def __init__(self, message: str, fix: str | None = None) -> None:
        super().__init__(message)
        self.fix = fix


class UsageError(NnxError):
    """Unknown option, model, size or unit; a value out of range; settings that disagree."""

    exit_code = 2


class DataError(NnxError):
    """Text or tokens that cannot be used: missing, empty, binary, too short, damaged, of another tokenizer."""

    exit_code = 3


class FunctionError(DataError):
    """A function of the user's that raises, hangs or returns something else than it is to."""


class DoesNotFit(NnxError):
    """More memory asked for than there is."""

    exit_code = 4


class CheckpointError(NnxError):
    """A model or run that is missing, damaged or incompatible; nothing to resume."""

    exit_code = 5


class QualityError(NnxError):
    """A run that diverged, a result over its tolerance."""

    exit_code = 6


class MissingFeature(NnxError):
    """An optional dependency or a feature of the machine that is not there."""

    exit_code = 7


class OutputError(NnxError):
    """The output was refused: disk full, no permission, already there, in use."""

    exit_code = 8


class Interrupted(NnxError):
    """Stopped by a signal, after saving."""

    exit_code = 130


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the machine or of a GPU."""
    torch_says = type(error).__name__ == "OutOfMemoryError"
    refused = isinstance(error, OSError) and error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or torch_says or refused or any(words in str(error) for words in NO_MEMORY)


def nearest(word: str, choices: Iterable[str]) -> str:
    """ "; did you mean X?" with the choice most like `word`, or the only one that begins with it, or nothing where none
    can be meant. The dashes of options make none alike."""
    bare, known = word.lstrip("-"), {choice.lstrip("-"): choice for choice in choices}
    found = difflib.get_close_matches(bare, list(known), n=1, cutoff=0.6) if len(bare) > 1 else []
    longer = [choice for choice in known if choice.startswith(bare)] if len(bare) > 2 else []
    found = found or longer * (len(longer) == 1)
    return f"; did you mean {known[found[0]]}?" if found else ""


def nearest_file(path: str | os.PathLike[str]) -> str:
    """ "; did you mean X?" with what lies beside a missing file or folder and has a name like its; else nothing."""
    folder, name = os.path.split(path)
    try:
        known = [found for found in os.listdir(folder or os.curdir) if found != name and not found.startswith(".")]
    except (OSError, ValueError):
        return ""
    near = nearest(name, known)
    return near.replace("mean ", f"mean {os.path.join(folder, '')}", 1) if folder else near


def counted(n: int, noun: str) -> str:
    """A number of things: 1 step, 3,780 steps."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def quoted(name: object) -> str:
    """A path or name in a command that can be pasted: one word for the shell, no option and no home of somebody's."""
    text = str(name)
    return pasteable([os.path.join(os.curdir, text) if text.startswith(("-", "~")) else text])


def pasteable(words: Iterable[str]) -> str:
    """A command line of these words for the shell of this system."""
    if os.name != "nt":
        return shlex.join(words)
    return " ".join(word if re.fullmatch(r"[\w.:\\/+=@~-]+", word) else _in_quotes(word) for word in words)


def pip_install(package: str) -> str:
    """The line that installs a package beside this nnx, be it in an environment that is not active or has no pip."""
    line = f"pip install {quoted(package)}"
    pip = shutil.which("pip")
    if pip and os.path.dirname(pip) == os.path.dirname(sys.executable):
        return line
    if importlib.machinery.PathFinder.find_spec("pip"):  # asked otherwise, setuptools leaves distutils to Python
        return f"{quoted(sys.executable)} -m {line}"
    return f"uv {line} --python {quoted(sys.prefix)}"  # which makes such environments


def _in_quotes(word: str) -> str:
    """A word as cmd, PowerShell and what Windows programs are begun with all take it."""
    inner = re.sub(r'(\\*)"', r'\1\1\\"', word)
    return '"' + re.sub(r"(\\+)$", r"\1\1", inner) + '"'
