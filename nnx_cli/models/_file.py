"""Files of the user's, with an architecture or with functions: read as text until one is named to run, and then run as
that very text."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import importlib.abc
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

from nnx_cli.config import Field, fields_in
from nnx_cli.errors import NnxError, UsageError, is_out_of_memory, nearest_file

SUFFIX = ".py"
MAX_BYTES = 2**20
TYPES = {"int", "float", "str", "bool"}  # of the fields that the command line can set
EXAMPLE = "see a whole example: nnx_cli/models/README.md, One of yours"
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
        near = nearest_file(path) if isinstance(error, FileNotFoundError) else ""
        raise UsageError(f"cannot read {option} {path}: {error.strerror}{near}") from error
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
        raise UsageError(f"--model {path} has no Config of plain fields: {error}", fix=EXAMPLE) from error
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
        raise UsageError(f"--model {path} has no SIZES, a dict that is written out", fix=EXAMPLE)


@cache
def sizes_in(source: bytes) -> tuple[str, ...]:
    """The keys of `SIZES` in the source of an architecture."""
    table = _table_of_sizes(source)
    return () if table is None else tuple(str(ast.literal_eval(key)) for key in table.keys if key is not None)


def fields_of_sizes(source: bytes) -> set[str]:
    """The fields that sizes set in `SIZES` in the source of an architecture."""
    table = _table_of_sizes(source)
    shapes = [] if table is None else [shape for shape in table.values if isinstance(shape, ast.Call)]
    return {str(keyword.arg) for shape in shapes for keyword in shape.keywords if keyword.arg is not None}


def _table_of_sizes(source: bytes) -> ast.Dict | None:
    for node in ast.parse(source).body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            if isinstance(target, ast.Name) and target.id == "SIZES" and isinstance(node.value, ast.Dict):
                return node.value
    return None


def load_file(path: str) -> ModuleType:
    """Run the file of an architecture and return its module. Raises UsageError where that fails, or its classes are not
    made as the base asks."""
    module = run_file(path, "--model")
    if missing := sorted({"Config", "SIZES", "Model"} - vars(module).keys()):
        raise UsageError(f"--model {path} fails: it defines no {missing[0]}", fix=EXAMPLE)
    base = importlib.import_module("nnx_cli.models._base")
    for kind, parent in ((module.Config, base.ModelConfig), (module.Model, base.LanguageModel)):
        if not (isinstance(kind, type) and issubclass(kind, parent)):
            which = "Config" if parent is base.ModelConfig else "Model"
            rule = f"{which} must be a subclass of nnx_cli.models._base.{parent.__name__}"
            raise UsageError(f"--model {path}: {rule}", fix=EXAMPLE)
    if broken := _broken_rule(module):
        raise UsageError(f"--model {path}: {broken}")
    return module


def _broken_rule(module: ModuleType) -> str | None:
    """What is wrong with the fields of `Config` and the values that `SIZES` gives them, if anything is."""
    fields = {field.name: field for field in dataclasses.fields(module.Config)}
    written = inspect.get_annotations(module.Config)
    if bare := [name for name in written if name not in fields and "ClassVar" not in str(written[name])]:
        return f"Config must be a @dataclass(frozen=True, kw_only=True), or its {bare[0]} is no option"
    missing = dataclasses.MISSING
    needed = [name for name, field in fields.items() if field.default is field.default_factory is missing]
    for size, shape in module.SIZES.items():
        if not isinstance(shape, Mapping):
            return f"SIZES[{size!r}] must be a dict of fields of Config"
        if unknown := [name for name in shape if name not in fields]:
            return f"SIZES[{size!r}] has {unknown[0]!r}, which is no field of Config"
        if unset := [name for name in needed if name not in shape]:
            return (
                f"the field {unset[0]} of Config must have a default, or a value in each of SIZES ({size!r} has none)"
            )
    return None


@contextmanager
def blaming(name: str, doing: str) -> Iterator[None]:
    """Turn what the code of an architecture raises into a UsageError that names its file, where it has one; errors of
    nnx, and of memory that ran out, stay as they are."""
    try:
        yield
    except Exception as error:
        if not is_file(name) or isinstance(error, NnxError) or is_out_of_memory(error):
            raise
        what = f"{doing} raises {type(error).__name__}: {error}"
        raise UsageError(f"--model {name} fails: {what}", fix="see where: --debug") from error


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
        what, fix = f"{type(error).__name__}: {error}", "see where: --debug"
        if isinstance(error, ModuleNotFoundError) and error.name and _is_beside(path, error.name):
            what, fix = f"{what}; a file must stand alone", f"put what it needs of {error.name} into {path} itself"
        raise UsageError(f"{option} {path} fails: {what}", fix=fix) from error
    return module


def _is_beside(path: str, name: str) -> bool:
    """Whether a module or package of that name lies in the folder of a file."""
    beside = Path(path).parent / name.partition(".")[0]
    return beside.is_dir() or beside.with_suffix(SUFFIX).is_file()


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
