"""The compiler that runs in earnest, on two architectures; the others take part with `aot_eager` in the zoo's tests."""

import shutil

import pytest
import torch

from nnx_cli.layers.blocks import compile_blocks
from nnx_cli.layers.loss import LossModule


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="compiling needs a C++ compiler")
@pytest.mark.parametrize("name", ["llama", "nyx"])
def test_compiled_blocks_equal_eager(tiny, name):
    model = tiny(name)
    ids = torch.randint(64, (2, 17))

    def step():
        model.zero_grad()
        loss, count = LossModule(model)(ids[:, :-1], ids[:, 1:])
        (loss / count).backward()
        return loss / count, [p.grad.clone() for p in model.parameters()]

    torch._dynamo.reset()
    eager_loss, eager_grads = step()
    compile_blocks(model)
    loss, grads = step()
    assert abs(loss - eager_loss) / eager_loss < 1e-4
    for ours, wanted in zip(grads, eager_grads, strict=True):
        assert (ours - wanted).abs().max() <= 1e-5 + 1e-3 * wanted.abs().max()
