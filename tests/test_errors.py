"""Lines that mend what an error says."""

import importlib.util
import os
import shlex
import shutil
import sys

import pytest

from nnx_cli.errors import pip_install

BESIDE = os.path.dirname(sys.executable)


@pytest.mark.parametrize(
    ("pip_on_path", "has_pip", "begins", "ends"),
    [
        (os.path.join(BESIDE, "pip"), True, [], []),
        (os.path.join(os.sep, "usr", "bin", "pip"), True, [sys.executable, "-m"], []),
        (None, True, [sys.executable, "-m"], []),
        (None, False, ["uv"], ["--python", sys.prefix]),
        (os.path.join(os.sep, "usr", "bin", "pip"), False, ["uv"], ["--python", sys.prefix]),
    ],
)
def test_a_package_is_installed_beside_this_nnx(monkeypatch, pip_on_path, has_pip, begins, ends):
    """In an environment that is active, in one that is not, and in those that uv makes, without pip."""
    monkeypatch.setattr(shutil, "which", lambda name: pip_on_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if has_pip else None)
    assert shlex.split(pip_install("nnx-cli[bpe]")) == [*begins, "pip", "install", "nnx-cli[bpe]", *ends]
