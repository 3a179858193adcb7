"""Starting a run leaves torch's compiler unimported: it takes a second, beside a card four, and a short run has no use
for it."""

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
    import torch
    from nnx_cli.layers import segment_attention as segments
    from nnx_cli.kernels import averaged_keys
    from nnx_cli.kernels import qkv_swiglu as unpack
    x, table = torch.ones(2, 4, 2, 8, requires_grad=True), torch.ones(4, 4)
    results = [
        *unpack.unpack(x.flatten(2).repeat(1, 1, 5), *[table] * 4, 4, 1), unpack.swiglu(x),
        averaged_keys.averaged_keys_op(x, x[..., 0], table[:, :1]), segments.attention_and_sums(*[x.detach()] * 3)[0],
    ]
    sum(result.sum() for result in results).backward()
    print("OPERATORS", "torch._dynamo" in sys.modules)
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
    assert "OPERATORS False" in lines, "those that take the place of others on a card"
