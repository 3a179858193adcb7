"""What is known of conditions in a model's source, given its configuration and that it is done learning."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterable
from typing import Any

FALSE = {"self.training", "torch.compiler.is_compiling()"}
FALSE_CALLS = {"packed_for_kernel", "takes_triton"}
NONE = re.compile(
    r"(.*\.)?lora_a|noise|(self\.)?outside|\(packed := packed_for_kernel\(.*"
)  # without adapters, noise, code of the user's, fast paths
UNKNOWN, PRESENT = object(), object()  # PRESENT: something that is not None
COMPARED: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.Gt: operator.gt,
}


class Known:
    """Values of expressions, as far as the configuration, and the attributes that a class derives from it, say."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.attributes: dict[str, Any] = {}

    def enter(self, node: ast.ClassDef) -> None:
        """Learn what a class sets its attributes to."""
        methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
        self.attributes = {}
        for method in methods:
            if method.name == "__init__":
                self._read(method.body)
        for method in methods:
            changed = method.body if method.name != "__init__" else []
            for part in (x for statement in changed for x in ast.walk(statement)):
                if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store):
                    self.attributes.pop(part.attr, None)

    def _read(self, statements: Iterable[ast.stmt], certain: bool = True) -> None:
        for node in statements:
            if isinstance(node, ast.If):
                taken = self.truth(node.test)
                self._read(node.body if taken in (True, None) else [], certain and taken is not None)
                self._read(node.orelse if taken in (False, None) else [], certain and taken is not None)
            elif isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    self._assign(target, node.value, certain)

    def _assign(self, target: ast.expr, value: ast.expr, certain: bool) -> None:
        if isinstance(target, ast.Tuple):
            apart = isinstance(value, ast.Tuple)
            values = value.elts if isinstance(value, ast.Tuple) else [value] * len(target.elts)
            for each, part in zip(target.elts, values, strict=True):
                self._assign(each, part, certain and apart)
        elif isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self":
            found = PRESENT if isinstance(value, ast.Call) else self.value(value)
            is_kind = found is PRESENT or found is None or isinstance(found, bool)
            self.attributes[target.attr] = found if certain and is_kind else UNKNOWN

    def decides(self, attribute: str) -> bool:
        """Whether an attribute is True, False or None."""
        return self.attributes.get(attribute, UNKNOWN) not in (UNKNOWN, PRESENT)

    def truth(self, test: ast.expr) -> bool | None:
        """Whether a condition holds, as far as that is known."""
        found = self.value(test)
        return None if found is UNKNOWN else bool(found)

    def value(self, node: ast.expr) -> Any:
        """What an expression is, or UNKNOWN."""
        text = ast.unparse(node)
        if text in FALSE or (isinstance(node, ast.Call) and ast.unparse(node.func) in FALSE_CALLS):
            return False
        if NONE.fullmatch(text):
            return None
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Attribute):
            return self._attribute(node)
        if isinstance(node, ast.IfExp) and (taken := self.truth(node.test)) is not None:
            return self.value(node.body if taken else node.orelse)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            holds = self.truth(node.operand)
            return UNKNOWN if holds is None else not holds
        if isinstance(node, ast.BoolOp):
            holding, decides = [self.truth(each) for each in node.values], isinstance(node.op, ast.Or)
            if decides in holding:
                return decides
            return UNKNOWN if None in holding else not decides
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARED:
            left, right = self.value(node.left), self.value(node.comparators[0])
            if UNKNOWN in (left, right) or (PRESENT in (left, right) and None not in (left, right)):
                return UNKNOWN
            return COMPARED[type(node.ops[0])](left, right)
        return UNKNOWN

    def _attribute(self, node: ast.Attribute) -> Any:
        owner = ast.unparse(node.value)
        if owner == "self":
            return self.attributes.get(node.attr, UNKNOWN)
        found = getattr(self.config, node.attr, UNKNOWN) if owner in ("config", "self.config") else UNKNOWN
        return found if found is None or isinstance(found, (bool, int, str)) else UNKNOWN
