"""The kernels against the rules in torch: on a GPU, or on a CPU with Triton's interpreter, where there is one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import nnx_cli

pytest.importorskip("triton", reason="kernels are written in Triton, which CPU builds of torch come without")

GROUP = dict(betas=(0.9, 0.99), eps=1e-10, weight_decay=0.1)


def compare(device):
    """Every rule, stored type and way of skipping, on sizes that end within a block."""
    from nnx_cli.kernels import optimizer_step as elementwise
    from nnx_cli.kernels import optimizer_step_triton as kernels
    from nnx_cli.optim.adamw import AdamW
    from nnx_cli.optim.adamw8bit import AdamW8bit
    from nnx_cli.optim.lion import RoundedLion
    from nnx_cli.optim.wolf import Wolf

    group = GROUP | {"lr": torch.tensor(1e-2, device=device)}
    cases = [("adamw", AdamW), ("adamw", AdamW8bit), ("lion", RoundedLion), ("wolf", Wolf)]
    for rule, kind in cases:
        for dtype in (torch.float32, torch.bfloat16):
            for n in (300, 5000):
                torch.manual_seed(n)
                p = nn.Parameter(torch.randn(n, device=device).to(dtype))
                optimizer = kind([p], lr=1e-2)
                p.grad = torch.randn_like(p)
                optimizer.step()
                twin = nn.Parameter(p.detach().clone())
                p.grad = torch.randn_like(p)
                twin.grad = p.grad.clone()
                state, key = optimizer.state[p], optimizer.keys[p]
                other = {field: value.clone() for field, value in state.items()}
                share = (elementwise.WOLF_SHARE,) if rule == "wolf" else ()
                for found_inf in (None, torch.tensor(0.0, device=device), torch.tensor(1.0, device=device)):
                    before = p.detach().clone(), {field: value.clone() for field, value in state.items()}
                    with torch.no_grad():
                        getattr(kernels, rule)(p, state, group, found_inf, key, *share)
                        getattr(elementwise, f"plain_{rule}")(twin, other, group, found_inf, key, *share)
                    if found_inf is not None and found_inf == 1:
                        assert torch.equal(p, before[0])
                        assert all(torch.equal(state[field], before[1][field]) for field in state)
                        continue
                    nearly(p.detach(), twin.detach())
                    for field in state:
                        nearly(state[field], other[field])
                    with torch.no_grad():
                        twin.copy_(p)
                    for field in state:
                        other[field].copy_(state[field])
                    p.grad[: n // 2] *= 0.1
                    twin.grad = p.grad.clone()


def nearly(a, b):
    """Equal up to the order of sums; where that decides a rounding, one step of the stored type apart."""
    assert a.dtype == b.dtype
    if a.dtype == torch.uint8:
        assert (a.int() - b.int()).abs().max() <= 1 and (a != b).float().mean() < 2e-3
    elif a.dtype == torch.bfloat16:
        assert (a != b).float().mean() < 2e-3
        torch.testing.assert_close(a, b, rtol=2**-7, atol=2.1e-2)  # Lion may see another sign
    else:
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    compare("cuda")


def test_in_the_interpreter():
    """In a process of its own: Triton decides at import."""
    path = os.pathsep.join([str(Path(nnx_cli.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-3000:]


if __name__ == "__main__":
    compare("cpu")
