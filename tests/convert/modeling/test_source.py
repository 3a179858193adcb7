import ast

import pytest

from nnx_cli.convert.modeling.source import import_block, load_module, tidy

LONG = "x" * 70


def test_what_is_too_long_is_broken():
    text = tidy(f"def f({LONG}):\n    return sum([{LONG}, {LONG[:35]}])  # of both\n")
    assert max(map(len, text.splitlines())) <= 120
    assert text.splitlines()[1:3] == ["    # of both", "    return sum("]
    ast.parse(text)


def test_what_nothing_reads_goes():
    text = tidy("def f(x):\n    a = x.shape\n    b = a\n    c, d = x\n    y = g(x)\n    return c\n")
    assert text == "def f(x):\n    c, d = x\n    y = g(x)\n    return c"


def test_no_detour_before_a_return():
    assert tidy("def f(x):\n    y = g(x)\n    return y\n") == "def f(x):\n    return g(x)"


def test_imports_stand_in_their_order():
    statements = ["from torch import nn", "import torch", "from torch import Tensor", "import math"]
    statements += ["from typing import Any", "import torch.nn.functional as F", "from torch import nn"]
    ours, others = import_block(statements).split("\n\n")
    assert ours.splitlines() == ["import math", "from typing import Any"]
    assert others.splitlines() == ["import torch", "import torch.nn.functional as F", "from torch import Tensor, nn"]


@pytest.mark.parametrize("name", ["nnx_cli.models.tape", "nnx_cli.layers.norm", "nnx_cli.models.ngpt"])
def test_nodes_are_found_in_their_text(name):
    """Columns are bytes to the parser, and these files have letters of several."""
    module = load_module(name)
    for node in ast.walk(module.tree):
        if isinstance(node, (ast.Name, ast.Attribute)):
            start, end = module.span(node)
            assert ast.unparse(ast.parse(module.text[start:end].replace("\n", " "), mode="eval")) == ast.unparse(node)
