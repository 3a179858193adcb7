"""Files of the user's, with an architecture or with functions: read as text until one is named to run, and then run as
that very text."""

from __future__ import annotations

import ast
import hashlib
import importlib.abc
import importlib.util
import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

from nnx_cli.config import Field, fields_in
from nnx_cli.errors import UsageError

SUFFIX = ".py"
MAX_BYTES = 2**20
TYPES = {"int", "float", "str", "bool"}  # of the fields that the command line can set
RESERVED = {"name", "size", "file", "sha256"}  # what config.json says of a model besides its fields


def is_file(name: str) -> bool:
    """Whether an architecture is named by its file."""
    return name.endswith(SUFFIX)


def stem(name: str) -> str:
    """What an architecture is called: its name, or that of its file."""
    return Path(name).stem if is_file(name) else name


def read_source(path: str, option: str = "--model") -> bytes:
    """The text of a file that an option names. Raises UsageError where it is none, or too long for a program."""
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"cannot read {option} {path}: {error.strerror}") from error
    if len(text) > MAX_BYTES:
        raise UsageError(f"{option} {path} is longer than {MAX_BYTES:,} bytes")
    return text


def sha256_source(path: str) -> str:
    """SHA-256 of a file. Raises UsageError as `read_source` does."""
    return hashlib.sha256(read_source(path)).hexdigest()


def fields_of(path: str) -> tuple[Field, ...]:
    """The own fields of the `Config` in a file, read without running it. Raises UsageError where it has none."""
    source = read_source(path)
    try:
        fields = fields_in(source.decode("utf-8-sig"), "Config")
    except (LookupError, SyntaxError, ValueError, AttributeError) as error:
        raise UsageError(f"--model {path} has no Config of plain fields: {error}") from error
    for field in fields:
        if field.type not in TYPES or field.name in RESERVED:
            raise UsageError(f"--model {path}: a field {field.name}: {field.type} cannot be an option")
    return fields


def check_file(path: str) -> None:
    """Raise UsageError unless a file has a `Config` and `SIZES` that can be read without running it."""
    fields_of(path)
    try:
        found = sizes_in(read_source(path))
    except (SyntaxError, ValueError) as error:
        raise UsageError(f"--model {path} cannot be read: {error}") from error
    if not found:
        raise UsageError(f"--model {path} has no SIZES, a dict that is written out")


@cache
def sizes_in(source: bytes) -> tuple[str, ...]:
    """The keys of `SIZES` in the source of an architecture."""
    for node in ast.parse(source).body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            if isinstance(target, ast.Name) and target.id == "SIZES" and isinstance(node.value, ast.Dict):
                return tuple(str(ast.literal_eval(key)) for key in node.value.keys if key is not None)
    return ()


def load_file(path: str) -> ModuleType:
    """Run the file of an architecture and return its module. Raises UsageError where that fails."""
    module = run_file(path, "--model")
    if missing := sorted({"Config", "SIZES", "Model"} - vars(module).keys()):
        raise UsageError(f"--model {path} fails: it defines no {missing[0]}")
    return module


def run_file(path: str, option: str) -> ModuleType:
    """Run the file that an option names and return its module, once for every text. Raises UsageError where that
    fails."""
    text = read_source(path, option)
    digest = hashlib.sha256(text).hexdigest()
    called = re.sub(r"\W", "_", stem(path))
    name = f"nnx_cli.models.file_{digest[:16]}.{called}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_loader(name, _Text(path, text), origin=path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UsageError(f"{option} {path} fails: {type(error).__name__}: {error}", fix="see where: --debug") from error
    return module


class _Text(importlib.abc.SourceLoader):
    """Runs the text whose SHA-256 was taken; without a time stamp no bytecode is read or written."""

    def __init__(self, path: str, text: bytes) -> None:
        self.path = path
        self.text = text

    def get_filename(self, fullname: str) -> str:
        """Where the text came from, for tracebacks."""
        return self.path

    def get_data(self, path: bytes | str) -> bytes:
        """The text, whatever the file holds by now."""
        return self.text
