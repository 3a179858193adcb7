import threading

import pytest
import torch
import torch.nn.functional as F

from nnx_cli.kernels import quantized_matmul as kernels
from nnx_cli.kernels import quantized_matmul_c
from nnx_cli.kernels.quantized_matmul_c import c_matmul
from nnx_cli.system import c_library, hardware


@pytest.fixture(autouse=True)
def on_this_machine():
    if not kernels.has_c_matmul():
        pytest.skip("no C compiler, or no x86 CPU with AVX2")


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def matrix(n_rows, n_columns):
    """Codes and scales of a matrix."""
    generator = torch.Generator().manual_seed(n_columns)
    codes = torch.randint(-127, 128, (n_rows, n_columns), generator=generator, dtype=torch.int8)
    return codes, torch.rand(n_rows, generator=generator) + 0.1


@pytest.mark.parametrize("n_columns", [1, 31, 32, 63, 64, 65, 128, 200, 896, 4096, 4097, 9001])
def test_it_is_the_plain_matmul_but_for_activations_of_16_bits(n_columns):
    codes, scale = matrix(37, n_columns)
    x = draw(8, 1, n_columns, seed=1)
    y, wanted = c_matmul(codes, scale)(x), F.linear(x, codes * scale[:, None])
    assert y.shape == wanted.shape and y.dtype == torch.float32
    assert (y - wanted).norm() <= kernels.TOLERANCE_16 * wanted.norm()


def test_a_row_comes_out_the_same_beside_others_and_with_more_threads():
    codes, scale = matrix(300, 500)
    matmul, x = c_matmul(codes, scale), draw(8, 500, seed=1) * torch.logspace(-6, 6, 8)[:, None]
    together = matmul(x)
    for start in range(8):
        for end in range(start + 1, 9):
            assert torch.equal(matmul(x[start:end]), together[start:end])
    torch.set_num_threads(3)
    assert torch.equal(matmul(x), together)


@pytest.mark.parametrize("n_columns", [4096, 4160, 20_000])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_do_not_overflow(n_columns, sign):
    codes = torch.full((5, n_columns), 127 * sign, dtype=torch.int8)
    y = c_matmul(codes, torch.ones(5))(torch.full((2, n_columns), 3.0))
    assert torch.allclose(y, torch.full((2, 5), 3.0 * 127 * sign * n_columns), rtol=1e-6)


def test_zeros_gaps_and_what_is_not_finite():
    codes, scale = matrix(9, 70)
    matmul = c_matmul(codes, scale)
    assert not matmul(torch.zeros(2, 70)).any()
    for odd in (torch.nan, torch.inf):
        y = matmul(torch.cat((draw(1, 70), torch.full((1, 70), odd))))
        assert y[0].isfinite().all() and not y[1].isfinite().any()
    x = draw(70, 4).t()
    assert torch.equal(matmul(x), matmul(x.contiguous()))
    assert torch.equal(c_matmul(codes.t().contiguous().t(), scale)(x), matmul(x))
    assert matmul(torch.zeros(0, 70)).shape == (0, 9)


def test_threads_of_python_do_not_disturb_each_other():
    matmul = c_matmul(*matrix(200, 300))
    x = draw(12, 1, 300)
    wanted, found = [matmul(row) for row in x], [None] * 12

    def multiply(number):
        for _ in range(50):
            found[number] = matmul(x[number])

    threads = [threading.Thread(target=multiply, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(y, z) for y, z in zip(found, wanted, strict=True))


@pytest.mark.parametrize("flags", [("-mavx2", "-mfma"), hardware.cpu_flags()[:4]], ids=["avx2", "without VNNI"])
def test_other_instructions_come_to_the_same(flags, monkeypatch):
    if len(flags) > len(hardware.cpu_flags()):
        pytest.skip("this CPU has none of them")
    codes, scale = matrix(33, 1000)
    x = draw(3, 1000, seed=1)
    wanted = c_matmul(codes, scale)(x)
    monkeypatch.setattr(c_library, "cpu_flags", lambda: flags)
    monkeypatch.setattr(quantized_matmul_c, "load_threaded", c_library.load_threaded.__wrapped__)
    assert torch.allclose(c_matmul(codes, scale)(x), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("missing", ["compiler", "instructions"])
def test_without_it_torch_multiplies(missing, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(quantized_matmul_c, "load_threaded", c_library.load_threaded.__wrapped__)
    if missing == "compiler":
        monkeypatch.setattr(c_library.shutil, "which", lambda name: None)
    else:
        monkeypatch.setattr(c_library, "cpu_flags", lambda: ())
    assert not kernels.has_c_matmul.__wrapped__()


def test_a_library_that_is_wrong_is_passed_over(monkeypatch):
    monkeypatch.setattr(kernels, "c_matmul", lambda codes, scale: lambda x: F.linear(x, codes * scale[:, None]) * 1.001)
    assert not kernels.has_c_matmul.__wrapped__()
