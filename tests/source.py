"""The source of the package: a syntax tree for each file, parsed when a test asks for it."""

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import nnx_cli

PACKAGE = Path(nnx_cli.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


class Trees(Mapping[str, ast.Module]):
    """Trees by the paths of files, like `models/llama.py`."""

    def __init__(self) -> None:
        self.names = [path.relative_to(PACKAGE).as_posix() for path in FILES]

    @staticmethod
    @cache
    def _parsed(name: str) -> ast.Module:
        return ast.parse((PACKAGE / name).read_text(encoding="utf-8"))

    def __getitem__(self, name: str) -> ast.Module:
        return self._parsed(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


TREES = Trees()
