import pytest
import torch
import torch.nn.functional as F

from nnx_cli.kernels import qkv_swiglu, qkv_swiglu_c
from nnx_cli.layers.linear import PackedLinear
from nnx_cli.layers.qkv_swiglu import swiglu
from nnx_cli.system import c_library, hardware


@pytest.fixture(autouse=True)
def on_this_machine():
    if not qkv_swiglu_c.is_available():
        pytest.skip("no C compiler, or no x86 CPU with AVX2")


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_it_is_taken_where_a_cpu_trains():
    layer = PackedLinear(16, (24, 24))
    x = draw(2, 5, 16)
    gate, up = layer(x)
    wanted = F.silu(gate) * up
    for needs in (False, True):
        found = swiglu(layer, x.requires_grad_(needs), None)
        assert ("nnx_swiglu" in found.grad_fn.name()) is needs
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    with torch.no_grad():
        assert not qkv_swiglu.takes(x)
    assert not qkv_swiglu.takes(x.double())


def test_layouts_and_numbers_of_threads_change_not_a_bit():
    packed, grad = draw(50, 3, 2 * 403), draw(50, 3, 403, seed=1)
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for x, g in ((packed, grad), (packed.mT.contiguous().mT, grad.transpose(0, 1).contiguous().transpose(0, 1))):
            found.append((qkv_swiglu_c.swiglu(x), qkv_swiglu_c.swiglu_backward(g, x)))
    assert all(a.equal(b) for pair in found[1:] for a, b in zip(pair, found[0], strict=True))


def test_large_numbers_and_what_is_not_finite():
    gate = torch.tensor([-1e30, -200.0, -88.0, -1.0, -0.0, 0.0, 1.0, 88.0, 200.0, 1e30])
    packed = torch.cat((gate, torch.full((10,), 2.0)))
    torch.testing.assert_close(qkv_swiglu_c.swiglu(packed), 2 * F.silu(gate), rtol=1e-6, atol=1e-6)
    grad = qkv_swiglu_c.swiglu_backward(torch.ones(10), packed)
    wanted = torch.ops.aten.silu_backward(torch.full((10,), 2.0), gate)
    torch.testing.assert_close(grad[:10], wanted, rtol=1e-5, atol=1e-6)
    for at in (3, 13):
        odd = packed.clone()
        odd[at] = torch.nan
        y = qkv_swiglu_c.swiglu(odd)
        assert y[3].isnan() and y.isnan().sum() == 1


@pytest.mark.parametrize("flags", [("-mavx2", "-mfma"), ("-mavx512f", "-mavx512bw"), ("-msse2",)], ids=str)
def test_other_instructions_come_to_the_same(flags, monkeypatch):
    if flags[0].startswith("-mavx512") and not hardware.cpu_flags()[0].startswith("-mavx512"):
        pytest.skip("this CPU has none of them")
    monkeypatch.setattr(c_library, "cpu_flags", lambda: flags)
    library = c_library.load_threaded.__wrapped__(*qkv_swiglu_c.SOURCES)
    wanted = qkv_swiglu_c.swiglu(draw(7, 90))
    monkeypatch.setattr(qkv_swiglu_c, "load_threaded", lambda *paths: library)
    torch.testing.assert_close(qkv_swiglu_c.swiglu(draw(7, 90)), wanted, rtol=1e-6, atol=1e-6)


def test_without_it_torch_computes(monkeypatch):
    monkeypatch.setattr(qkv_swiglu_c, "_answer", [])
    monkeypatch.setattr(qkv_swiglu_c, "load_threaded", lambda *paths: None)
    assert not qkv_swiglu.takes(draw(2, 3).requires_grad_())
