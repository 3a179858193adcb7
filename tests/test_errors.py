"""Lines that mend what an error says."""

import importlib.machinery
import os
import shlex
import shutil
import subprocess
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
    monkeypatch.setattr(importlib.machinery.PathFinder, "find_spec", lambda name: object() if has_pip else None)
    assert shlex.split(pip_install("nnx-cli[bpe]")) == [*begins, "pip", "install", "nnx-cli[bpe]", *ends]


def test_asking_for_pip_leaves_the_compiler_of_torch_whole():
    """setuptools, which torch compiles with on a CPU, fails in a process whose import system was asked for pip."""
    code = "from nnx_cli.errors import pip_install; pip_install('nnx-cli[bpe]'); import setuptools"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PATH": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
