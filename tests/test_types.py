"""The type checker and the linter, with their settings in pyproject.toml."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_IGNORES = 30


def check(*words):
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_types():
    pytest.importorskip("mypy")
    check("mypy", "--cache-dir", os.devnull)


def test_style():
    pytest.importorskip("ruff")
    check("ruff", "check", "--no-cache", "nnx_cli", "tests")
    check("ruff", "format", "--no-cache", "--check", "nnx_cli", "tests")


def test_what_the_type_checker_must_not_see_has_a_reason():
    lines = [line for path in (ROOT / "nnx_cli").rglob("*.py") for line in path.read_text("utf-8").splitlines()]
    ignored = [line for line in lines if "# type: ignore" in line]
    assert len(ignored) <= MAX_IGNORES
    assert all(re.search(r"# type: ignore\[[\w, -]+\]  # \w", line) for line in ignored), ignored
