"""Starting a run leaves torch's compiler unimported: it takes a second, and a short run on a CPU has no use for it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import nnx_cli

CODE = """
import sys
import torch
from nnx_cli import cli
from nnx_cli.commands import train

def told(*arguments):
    print("PLAN", "torch._dynamo" in sys.modules, "sympy" in sys.modules)

train.tell_plan = told
try:
    cli.main()
finally:
    print("END", "torch._dynamo" in sys.modules)
"""


@pytest.mark.parametrize("optimizer", ["muon", "adamw8bit"])
def test_a_short_run_never_imports_the_compiler(token_path, workspace, optimizer):
    words = f"train --model ngpt --n-layers 1 --dim 32 --n-heads 2 --seq-len 16 --data {token_path} --device cpu"
    words += f" --threads 1 --max-steps 2 --optimizer {optimizer} --out run"
    path = os.pathsep.join([str(Path(nnx_cli.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", CODE, *words.split()], env=os.environ | {"PYTHONPATH": path}, capture_output=True
    )
    lines = done.stdout.decode().splitlines()
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert "PLAN False False" in lines and "END False" in lines
