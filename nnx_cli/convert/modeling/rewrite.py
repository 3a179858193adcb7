"""A definition of a model's source as a finished model needs it: fast paths, dropout, noise, adapters and initial
values are left out, and conditions that are known then are decided.
"""

from __future__ import annotations

import ast
import copy
import re
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from nnx_cli.convert.modeling.known import Known
from nnx_cli.convert.modeling.source import Definition, Edit, Module, apply_edits, tidy

FAST = {"cached", "step"}  # methods that do what forward does, for one token, in few operations
GONE = {  # what is assigned to these names, or to attributes of these names
    "": {"dropout", "ignore_index", "recipe", "stores_int8", "syncs_in_eval", "turned"},
    "nnx_cli.layers.function_bank": {"balance", "balanced", "counts", "kind"},
    "nnx_cli.models.neon": {"noise", "outside"},
    "nnx_cli.models.tape": {"_entropy", "entropies", "entropy", "rewarded"},
}
PARAMETERS = {
    "balanced",
    "ctx",
    "dropout",
    "noise",
    "outside",
    "temperature",
}  # of functions, and arguments of their calls
CALLS = ("self.init_weights(", "nn.init.", "ctx.", "entropies.append(")  # with which statements begin that do nothing
AUTOGRAD = "torch.autograd.Function"
INHERITED = "As in the base"  # with which docstrings begin that stand there


def snake(name: str) -> str:
    """ScaledHead as scaled_head."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def first_paragraph(docstring: str) -> str:
    """What a docstring says before it goes into details."""
    return docstring.strip().split("\n\n")[0]


class Editor(ast.NodeVisitor):
    """Collects what is to be edited in definitions of a module, innermost last."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.edits: list[Edit] = []

    def text_of(self, node: ast.AST) -> str:
        """The text of a node, edited."""
        return self.within(self.module.span(node), lambda: self.visit(node))

    def within(self, span: tuple[int, int], visit: Callable[[], None]) -> str:
        """The text of a span, with the edits that `visit` makes."""
        outer, self.edits = self.edits, []
        try:
            visit()
            return apply_edits(self.module.text, *span, self.edits)
        finally:
            self.edits = outer

    def replace(self, node: ast.AST, text: str) -> None:
        """Put a text where a node stands."""
        self.edits.append((*self.module.span(node), text))


class Expressions(Editor):
    """Decides what is known in expressions, and replaces calls that choose a fast path by what they do without one."""

    def __init__(self, module: Module, config: Any) -> None:
        super().__init__(module)
        self.known = Known(config)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        """The value that is taken, where that is known."""
        taken = self.known.truth(node.test)
        if taken is None:
            self.generic_visit(node)
        else:
            self.replace(node, self.text_of(node.body if taken else node.orelse))

    def visit_BinOp(self, node: ast.BinOp) -> None:
        """Without what is drawn at random."""
        if isinstance(node.op, ast.BitOr) and ast.unparse(node.right).startswith("self.drawn("):
            self.replace(node, self.text_of(node.left))
        else:
            self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        """A function by what it does without a fast path."""
        name, arguments = ast.unparse(node.func), node.args
        if name == "drop":
            self.replace(node, self.text_of(arguments[0]))
        elif name == "in_type":
            value, kind = map(self.text_of, arguments)
            simple = isinstance(arguments[0], (ast.Name, ast.Attribute, ast.Call, ast.Subscript))
            self.replace(node, f"{value if simple else f'({value})'}.to({kind})")
        elif name == "grouped_projections":
            self.replace(node, f"{self.text_of(arguments[0])}({self.text_of(arguments[1])})")
        elif name.endswith(".apply") and name[0].isupper():
            self.replace(node.func, snake(name.removesuffix(".apply")))
            self._arguments(node, arguments)
        else:
            if isinstance(node.func, ast.IfExp) and self.known.truth(node.func.test) is not None:
                start, end = self.module.span(node)[0], self.module.span(node.func)[1]
                function = node.func.body if self.known.truth(node.func.test) else node.func.orelse
                self.edits.append((start, self.module.text.index(")", end) + 1, self.text_of(function)))
            elif self.module.ours.get(name) == ("nnx_cli.kernels.gemm", "linear"):
                self.replace(node.func, "F.linear")
            else:
                self.visit(node.func)
            self._arguments(node, arguments[:3] if name == "tables_of" else arguments)

    def _arguments(self, node: ast.Call, kept: list[ast.expr]) -> None:
        """The arguments of a call, without those that say how to train."""
        keywords = [word for word in node.keywords if word.arg not in PARAMETERS]
        if len(kept) == len(node.args) and len(keywords) == len(node.keywords):
            for each in (*kept, *keywords):
                self.visit(each)
            return
        start, end = self.module.span(node.func)[1], self.module.span(node)[1]
        self.edits.append((start, end, f"({', '.join(map(self.text_of, [*kept, *keywords]))})"))

    def visit_Name(self, node: ast.Name) -> None:
        """`turned` is `rotate`, or `turn` for a cache that has tables of full width."""
        if node.id == "turned":
            self.replace(node, "rotate")

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """Weights have the type of what is computed with."""
        if ast.unparse(node) == "self.compute_dtype":
            self.replace(node, "self.dtype")
        else:
            self.generic_visit(node)


class Rewriter(Expressions):
    """Collects what is to be edited in definitions of one module, for a model of one configuration; `keeps` says which
    methods and attributes stay, `inherited` what the base says of one."""

    def __init__(
        self, module: Module, config: Any, keeps: Callable[[str], bool], inherited: Callable[[str], str]
    ) -> None:
        super().__init__(module, config)
        self.keeps, self.inherited = keeps, inherited
        self.gone = GONE[""] | GONE.get(module.name, set())

    def definition(self, node: Definition) -> str:
        """The text of a definition, of a function where it is one of autograd's."""
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base) == AUTOGRAD for base in node.bases):
            (forward,) = (x for x in node.body if isinstance(x, ast.FunctionDef) and x.name == "forward")
            about = ast.get_docstring(node) or ""
            return tidy(textwrap.dedent("    " + self._function(forward, snake(node.name), about)))
        return tidy(self.text_of(node))

    def plain(self, node: ast.FunctionDef, fast: ast.FunctionDef) -> str:
        """The text of the plain version of a function, under that one's name."""
        return tidy(self._function(node, fast.name, ast.get_docstring(fast) or ""))

    def method(self, node: ast.FunctionDef) -> str:
        """The text of a method, as a function stands."""
        return tidy(textwrap.dedent("    " + self.text_of(node)))

    def _function(self, node: ast.FunctionDef, name: str, docstring: str) -> str:
        """The text of a function under another name, without decorators."""
        node = copy.copy(node)
        node.decorator_list = []

        def visit() -> None:
            self._signature(node, name)
            self._docstring(node, first_paragraph(docstring))
            self._statements(node.body[1:])

        return self.within(self.module.span(node), visit)

    def _block(self, statements: list[ast.stmt]) -> str:
        """The lines of statements, edited."""
        return self.within(self.module.lines(statements), lambda: self._statements(statements))

    def _statements(self, statements: Sequence[ast.stmt]) -> None:
        ended = False
        for statement in statements:
            if ended or self._is_gone(statement):
                self.edits.append((*self.module.lines([statement]), ""))
                continue
            self.visit(statement)
            if isinstance(statement, ast.If) and (taken := self.known.truth(statement.test)) is not None:
                branch = statement.body if taken else statement.orelse
                ended = bool(branch) and isinstance(branch[-1], ast.Return)

    def _is_gone(self, node: ast.stmt) -> bool:
        """Whether a statement does nothing in a finished model."""
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            bare = isinstance(node, ast.AnnAssign) and node.value is None
            return bare or all(map(self._is_dropped, targets)) or all(map(self._is_decided, targets))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            return ast.unparse(node).startswith(CALLS)
        if isinstance(node, ast.If) and not node.orelse:
            if self.known.truth(node.test) is not None:
                return not self.known.truth(node.test)
            return all(map(self._is_gone, node.body)) or _is_fast(node)
        return False

    def _is_decided(self, target: ast.expr) -> bool:
        """Whether an attribute is known, so that nothing asks for it any more."""
        return isinstance(target, ast.Attribute) and self.known.decides(target.attr) and not self.keeps(target.attr)

    def _is_dropped(self, target: ast.expr) -> bool:
        """Whether what is assigned to a target serves training alone."""
        if isinstance(target, ast.Tuple):
            return all(map(self._is_dropped, target.elts))
        if isinstance(target, ast.Subscript):
            target = target.value
        name = target.attr if isinstance(target, ast.Attribute) else getattr(target, "id", None)
        return name in self.gone

    def _serves_training(self, node: ast.expr) -> bool:
        """Whether a result, if it is there at all, is one that training alone wants."""
        decides = node.test if isinstance(node, ast.IfExp) else node
        return isinstance(decides, ast.Name) and decides.id in self.gone

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        """Without the methods that nothing calls."""
        docstring = ast.get_docstring(node, clean=False)
        self._docstring(node, first_paragraph(docstring or ""))
        self.known.enter(node)
        for part in node.body[docstring is not None :]:
            if isinstance(part, ast.FunctionDef) and not (part.name.startswith("__") or self.keeps(part.name)):
                self.edits.append((*self.module.lines([part]), ""))
            else:
                self._statements([part])

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        """Without the parameters that say how to train."""
        names = {arg.arg for arg in (*node.args.args, *node.args.kwonlyargs)}
        if names & PARAMETERS or self._shrinks(node):
            self._signature(node, node.name)
        docstring = ast.get_docstring(node, clean=False)
        if docstring is not None:
            told = self.inherited(node.name) if docstring.startswith(INHERITED) else docstring
            self._docstring(node, first_paragraph(told))
        self._statements(node.body[docstring is not None :])

    def _shrinks(self, node: ast.FunctionDef) -> bool:
        """Whether a function returns something beside its result that training alone wants."""
        returns = [x.value for x in ast.walk(node) if isinstance(x, ast.Return)]
        return any(isinstance(x, ast.Tuple) and any(map(self._serves_training, x.elts)) for x in returns)

    def _signature(self, node: ast.FunctionDef, name: str) -> None:
        """Write the head of a function anew."""
        arguments, returns = copy.copy(node.args), node.returns
        arguments.args = [arg for arg in arguments.args if arg.arg not in PARAMETERS]
        kept = [arg.arg not in PARAMETERS for arg in arguments.kwonlyargs]
        arguments.kwonlyargs = [arg for arg, stays in zip(arguments.kwonlyargs, kept, strict=True) if stays]
        arguments.kw_defaults = [value for value, stays in zip(arguments.kw_defaults, kept, strict=True) if stays]
        if self._shrinks(node) and isinstance(returns, ast.Subscript) and isinstance(returns.slice, ast.Tuple):
            returns = returns.slice.elts[0]
        told = "" if returns is None else f" -> {ast.unparse(returns)}"
        start, first = self.module.span(node)[0], self.module.lines([node.body[0]])[0]
        self.edits.append((start, first, f"def {name}({ast.unparse(arguments)}){told}:\n"))

    def _docstring(self, node: ast.ClassDef | ast.FunctionDef, text: str) -> None:
        """Put a docstring in the place of the one that is there."""
        old = node.body[0]
        if text and isinstance(old, ast.Expr) and isinstance(old.value, ast.Constant):
            indent = " " * old.col_offset
            lines = textwrap.wrap(f'"""{" ".join(text.split())}"""', 120 - len(indent), break_long_words=False)
            self.replace(old, f"\n{indent}".join(lines))

    def visit_If(self, node: ast.If) -> None:
        """Only the branch that is taken, where that is known."""
        taken, rest = self.known.truth(node.test), node.orelse
        is_elif = len(rest) == 1 and isinstance(rest[0], ast.If) and rest[0].col_offset == node.col_offset
        if taken is None:
            self.visit(node.test)
            self._statements(node.body)
            assert not (is_elif and isinstance(rest[0], ast.If) and self.known.truth(rest[0].test)), (
                "an else is missing"
            )
            self._statements(rest)
            return
        text = self._block(node.body if taken else rest)
        if is_elif and not taken:
            text = re.sub(r"^( *)elif", r"\1if", text)
        else:
            text = re.sub(r"^    ", "", text, flags=re.MULTILINE)
        self.edits.append((*self.module.lines([node]), f"{text}\n" if text else ""))

    def visit_For(self, node: ast.For) -> None:
        """Without the names that serve training alone, and what they run over."""
        if (
            isinstance(node.target, ast.Tuple)
            and isinstance(node.iter, ast.Call)
            and ast.unparse(node.iter.func) == "zip"
        ):
            pairs = zip(node.target.elts, node.iter.args, strict=True)
            kept = [(name, values) for name, values in pairs if not self._is_dropped(name)]
            words = [*(values for _, values in kept), *node.iter.keywords]
            self.replace(node.target, ", ".join(self.text_of(name) for name, _ in kept))
            self.replace(node.iter, f"zip({', '.join(map(self.text_of, words))})")
        else:
            self.visit(node.target)
            self.visit(node.iter)
        self._statements(node.body)

    def visit_Assign(self, node: ast.Assign) -> None:
        """Without the names, of several, that serve training alone."""
        target = node.targets[0]
        gone = [self._is_dropped(x) for x in target.elts] if isinstance(target, ast.Tuple) else []
        if not any(gone) or not isinstance(target, ast.Tuple) or len(node.targets) > 1:
            self.generic_visit(node)
            return
        names = [self.text_of(x) for x, drop in zip(target.elts, gone, strict=True) if not drop]
        value = self.text_of(node.value)
        if isinstance(node.value, ast.Tuple):
            kept = zip(node.value.elts, gone, strict=True)
            value = ", ".join(self.text_of(x) for x, drop in kept if not drop)
        self.replace(node, f"{', '.join(names)} = {value}")

    def visit_Return(self, node: ast.Return) -> None:
        """Without results that training alone wants."""
        if isinstance(node.value, ast.Tuple) and any(map(self._serves_training, node.value.elts)):
            kept = [self.text_of(x) for x in node.value.elts if not self._serves_training(x)]
            self.replace(node.value, ", ".join(kept))
        else:
            self.generic_visit(node)


def _is_fast(node: ast.If) -> bool:
    """Whether a branch only hands over to a fast path."""
    if len(node.body) != 1 or not isinstance(node.body[0], ast.Return):
        return False
    call = node.body[0].value
    return isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in FAST
