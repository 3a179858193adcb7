"""Text of Python modules, edited where the nodes of its syntax tree stand: comments and layout survive."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import nnx_cli

PACKAGE = Path(nnx_cli.__file__).parent
WIDTH = 120
Definition = ast.ClassDef | ast.FunctionDef | ast.Assign
Edit = tuple[int, int, str]  # from, to, and what stands there then


class Module:
    """The source of a module of this package: its definitions, and where the names it imports come from."""

    def __init__(self, name: str) -> None:
        self.name = name
        path = PACKAGE.joinpath(*name.split(".")[1:])
        self.text = path.with_suffix(".py").read_text(encoding="utf-8")
        self.tree = ast.parse(self.text)
        self.line_starts = [0, *(newline.end() for newline in re.finditer("\n", self.text))]
        self.definitions: dict[str, Definition] = {}
        self.ours: dict[str, tuple[str, str]] = {}  # a name here: module of ours, and name there
        self.foreign: dict[str, str] = {}  # a name here: its import statement
        for node in self.tree.body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                self.definitions[node.name] = node
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                self.definitions[node.targets[0].id] = node
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                self._note_imports(node)

    def _note_imports(self, node: ast.Import | ast.ImportFrom) -> None:
        for alias in node.names:
            bound = alias.asname or alias.name
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("nnx_cli."):
                self.ours[bound] = str(node.module), alias.name
            else:
                where = f"from {node.module} " if isinstance(node, ast.ImportFrom) else ""
                self.foreign[bound] = f"{where}import {ast.unparse(alias)}"

    def place(self, line: int, column: int) -> int:
        """Where a line (from 1) and a column, in bytes as `ast` counts, are in the text."""
        start = self.line_starts[line - 1]
        return start + len(self.text[start : self.line_starts[line]].encode()[:column].decode())

    def span(self, node: ast.AST) -> tuple[int, int]:
        """From where to where a node stands, decorators included."""
        assert isinstance(node, (ast.expr, ast.stmt, ast.arg, ast.keyword, ast.alias)) and node.end_lineno is not None
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        column = node.col_offset  # that of the decorators too
        return self.place(first, column), self.place(node.end_lineno, node.end_col_offset or 0)

    def lines(self, nodes: list[ast.stmt]) -> tuple[int, int]:
        """From where to where the whole lines of neighbouring statements stand."""
        end = nodes[-1].end_lineno
        assert end is not None
        first = self.span(nodes[0])[0]
        return self.text.rfind("\n", 0, first) + 1, self.line_starts[end]


@cache
def load_module(name: str) -> Module:
    """The source of a module of this package."""
    return Module(name)


def apply_edits(text: str, start: int, end: int, edits: Iterable[Edit]) -> str:
    """The part of a text from `start` to `end` with edits, which do not overlap; without the
    blanks behind it."""
    parts = []
    for first, last, new in sorted(edits):
        assert start <= first <= last, new
        parts += [text[start:first], new]
        start = last
    return "".join([*parts, text[start:end]]).rstrip()


def tidy(text: str) -> str:
    """A definition in which something was removed: no unused names, no lines that are too long, no gaps."""
    text = re.sub(r"[ \t]*# type:\signore[^\n]*", "", text)
    text = re.sub(r"(?<![\w\])])\((\w+)\)(?=\.)", r"\1", text)
    while (shorter := _without_unused(text)) != text:
        text = shorter
    text = re.sub(r"^( *)(\w+) = (.+)\n\1return \2$", r"\1return \3", text, flags=re.MULTILINE)
    text = "\n".join(_wrapped(line) for line in text.splitlines())
    return re.sub(r"\n{3,}", "\n\n", text)


def _without_unused(text: str) -> str:
    """Without the assignments to names that their function never reads."""
    lines, tree = text.splitlines(), ast.parse(text)
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        read = {node.id for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
        for node in ast.walk(function):
            if not isinstance(node, ast.Assign) or any(map(_may_do_something, ast.walk(node))):
                continue
            names = [x.id for target in node.targets for x in ast.walk(target) if isinstance(x, ast.Name)]
            stored = all(isinstance(x, (ast.Name, ast.Tuple, ast.Store)) for t in node.targets for x in ast.walk(t))
            if stored and not read & set(names):
                del lines[node.lineno - 1 : node.end_lineno]
                return "\n".join(lines)
    return text


def _may_do_something(node: ast.AST) -> bool:
    """Whether to evaluate an expression may have an effect."""
    if isinstance(node, ast.Call):
        return ast.unparse(node.func) != "isinstance"
    return isinstance(node, ast.NamedExpr)


def _wrapped(line: str) -> str:
    """A line, over several where it is too long: its comment above it, and what is in its last brackets below."""
    if len(line) <= WIDTH:
        return line
    indent = line[: len(line) - len(line.lstrip())]
    code, mark, comment = line.partition("  # ")
    if mark:
        return f"{indent}# {comment}\n{_wrapped(code)}"
    opening = _last_opening(code)
    assert opening, line
    closing = code.rindex({"(": ")", "[": "]", "{": "}"}[code[opening]])
    return "\n".join([code[: opening + 1], f"{indent}    {code[opening + 1 : closing]}", indent + code[closing:]])


def _last_opening(code: str) -> int:
    """Where the last pair of outermost brackets opens."""
    depth, found = 0, 0
    for place, letter in enumerate(code):
        if letter in "([{":
            found = place if depth == 0 else found
            depth += 1
        elif letter in ")]}":
            depth -= 1
    return found


def import_block(statements: Iterable[str]) -> str:
    """Import statements in groups, sorted, those from one module together."""
    plain = sorted(text for text in set(statements) if text.startswith("import "))
    named: dict[str, list[str]] = {}
    for text in sorted(set(statements) - set(plain)):
        module, _, name = text.removeprefix("from ").partition(" import ")
        named.setdefault(module, []).append(name)
    lines = plain + [f"from {module} import {', '.join(sorted(names, key=_order))}" for module, names in named.items()]
    foreign = ("torch", "transformers")
    groups = [[x for x in lines if (x.split()[1].split(".")[0] in foreign) is there] for there in (False, True)]
    return "\n\n".join("\n".join(group) for group in groups if group)


def _order(name: str) -> tuple[bool, bool, str]:
    """As import sorters have it: constants, classes, the rest."""
    return not name.isupper(), not name[0].isupper(), name
