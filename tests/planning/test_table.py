"""The table of what the recipe depends on."""

import ast
import re
from pathlib import Path

from nnx_cli.planning.recipe import table

SOURCE = re.compile(r"\b\w+\.md\b|https://\S+|not raced$")
BENCH, RECIPE = Path(__file__).parents[1] / "bench", Path(table.__file__).parent


def lines_of_table():
    """What is assigned in the table, and the comment at the end of it or above it."""
    text = Path(table.__file__).read_text()
    lines = text.splitlines()
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign):
            first = node.lineno - 1
            above = first
            while lines[above - 1].startswith("# "):
                above -= 1
            comment = lines[first].partition("  # ")[2] or " ".join(line[2:] for line in lines[above:first])
            yield ast.unparse(node.targets[0]), comment


def test_every_line_says_where_it_is_from():
    found = dict(lines_of_table())
    assert len(found) > 30
    for names, comment in found.items():
        assert SOURCE.search(comment.rpartition(": ")[2]), (names, comment)
    pages = {page for comment in found.values() for page in re.findall(r"\b\w+\.md\b", comment)}
    assert pages and all((BENCH / page).exists() for page in pages)


def test_the_recipe_has_no_other_numbers():
    """But for halves and powers, and the width to which all is relative."""
    for path in RECIPE.glob("*.py"):
        if path.name == "table.py":
            continue
        numbers = {
            node.value
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant) and type(node.value) in (int, float)
        }
        assert numbers <= {0, 1, 2, 3, 0.5, 128}, path
