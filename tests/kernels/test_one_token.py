"""A pass over one token as fused kernels: on a GPU, or anywhere under Triton's interpreter (TRITON_INTERPRET=1)."""

import os

import pytest
import torch

from nnx_cli.kernels import one_token
from nnx_cli.kernels.one_token import Gate, Matrix, Norm
from nnx_cli.layers import one_token as layers

pytest.importorskip("triton")
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a GPU")
TYPES = [torch.float32, torch.bfloat16, torch.float16]
MATMUL_TYPES = (
    TYPES if DEVICE == "cuda" else [torch.float32, torch.float16]
)  # the interpreter has no matmul of bfloat16


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def close(found, wanted):
    eps = torch.finfo(wanted.dtype).eps
    torch.testing.assert_close(found, wanted, rtol=4 * eps, atol=max(8 * eps, 2e-6) * wanted.abs().max().item())


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize(("B", "D"), [(1, 96), (3, 33), (5, 640)])
def test_normalise(dtype, centred, B, D):
    from nnx_cli.kernels import one_token_triton

    x, norm = (3 * draw(B, 1, D) + 1).to(dtype), Norm(draw(D), 1e-5, centred)
    close(one_token_triton.normalise(x, *norm), one_token.plain_normalise(x, norm))


def matrix(rows, columns, dtype, stored, more=0):
    """A matrix (rows, columns) as activations have it, a part of one with `more` columns, or in int8."""
    if stored == "int8":
        codes = torch.randint(-127, 128, (rows, columns), device=DEVICE, dtype=torch.int8)
        return Matrix(codes, torch.rand(rows, device=DEVICE) / (64 * columns**0.5))
    return Matrix((draw(rows, columns + more) / columns**0.5).to(dtype)[:, :columns])


@pytest.mark.parametrize("stored", ["plain", "int8"])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("B", "D", "n_plain", "gate"),
    [
        (1, 96, 48, Gate(0, True)),
        (2, 96, 0, Gate(50, True)),
        (1, 160, 64, Gate(200, False)),
        (4, 33, 16, Gate(7, True)),
        (1, 640, 1040, Gate(0, False)),
    ],
)
@pytest.mark.parametrize("centred", [True, False])
def test_project(dtype, B, D, n_plain, gate, centred, stored):
    from nnx_cli.kernels import one_token_triton

    x, norm = draw(B, 1, D, dtype=dtype), Norm(draw(D), 1e-5, centred)
    weights = matrix(n_plain + 2 * gate.n, D, dtype, stored, more=8)
    for found, wanted in zip(
        one_token_triton.project(x, *norm, *weights, *gate),
        one_token.plain_project(x, norm, weights, gate),
        strict=True,
    ):
        assert found.shape == wanted.shape
        if wanted.numel():
            close(found, wanted)


@pytest.mark.parametrize("stored", ["plain", "int8"])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("B", "D", "widths"), [(1, 96, (64,)), (2, 50, (1500, 70)), (4, 640, (2688,))])
def test_add_products(dtype, B, D, widths, stored):
    from nnx_cli.kernels import one_token_triton

    x = draw(B, 1, D, dtype=dtype)
    factors = [(draw(B, 1, K, dtype=dtype), matrix(D, K, dtype, stored)) for K in widths]
    wanted = x
    for y, weights in factors:
        wanted = wanted + torch.nn.functional.linear(y, weights.plain(dtype))
    close(one_token_triton.add_products(x, *factors), wanted)


@pytest.mark.parametrize("dtype", MATMUL_TYPES)
@pytest.mark.parametrize(
    ("H", "G", "K", "kinds", "span", "lengths"),
    [
        (4, 1, 32, 3, 128, [0, 63, 100]),
        (4, 2, 16, 2, 64, [5]),
        (6, 6, 48, 2, 300, [299, 0, 64, 127, 128]),
        (20, 1, 64, 3, 1000, [700, 3]),
        (40, 2, 16, 2, 200, [199]),
    ],
)
def test_attend(dtype, H, G, K, kinds, span, lengths):
    from nnx_cli.kernels import one_token_triton

    B, S = len(lengths), span + 20
    qkv, tables = draw(B, 1, (H + 2 * G) * K, dtype=dtype), draw(B, 1, 2, kinds, K)
    lengths = torch.tensor(lengths, device=DEVICE)
    stored = draw(B, 2 * G, S, K, dtype=dtype)
    stored[:, :, span:] = torch.nan  # never read
    twin = stored.clone()
    for _ in range(2):  # counters are as they were
        found = one_token_triton.attend(qkv, tables, twin, lengths, span, H, K**-0.5)
        wanted = one_token.plain_attend(qkv, tables, stored, lengths, span, H, K**-0.5)
        close(found, wanted)
        close(twin[:, :, :span], stored[:, :, :span])
        lengths = (lengths + 1).clamp(max=span - 1)


@pytest.mark.parametrize("dtype", MATMUL_TYPES)
@pytest.mark.parametrize(("H", "G", "K", "S"), [(4, 4, 32, 70), (8, 2, 64, 513), (12, 1, 16, 30)])
def test_attend_stored(dtype, H, G, K, S):
    from nnx_cli.kernels import one_token_triton

    q = draw(3, 2 * H, 1, K, dtype=dtype)[:, :H]  # a part of what a packed layer makes
    k, v = draw(3, 2 * G, S + 5, K, dtype=dtype)[:, :, :S].chunk(2, dim=1)
    lengths = torch.tensor([S - 1, 0, S // 2], device=DEVICE)
    found = one_token_triton.attend_stored(q, k, v, lengths, 0.3)
    close(found, one_token.plain_attend_stored(q, k, v, lengths, 0.3))


@pytest.fixture
def by_kernels(monkeypatch):
    """Switches between kernels and operations of torch; the interpreter's tensors are taken for some of a GPU."""
    if DEVICE == "cpu":
        from nnx_cli.kernels import one_token_triton

        monkeypatch.setattr(one_token_triton, "PROGRAMS", 8)  # which run one after the other there

    def switch(on):
        monkeypatch.setattr(one_token, "takes_triton", lambda x: on)
        monkeypatch.setattr(
            layers, "read_once", lambda layer, x: Matrix(layer.matrix(x.dtype)) if x.shape[1] == 1 else None
        )

    return switch


@pytest.mark.parametrize("n_sequences", [1, 3, 6])
@pytest.mark.parametrize("case", [("llama", {}), ("llama", dict(n_heads=4, n_kv_heads=1)), ("nyx", {})], ids=str)
@torch.no_grad()
def test_decoding_steps(tiny, case, n_sequences, by_kernels):
    name, fields = case
    model = tiny(name, **(dict(dim=64, seq_len=100) | fields)).eval().to(DEVICE)
    ids = torch.randint(64, (n_sequences, 40), device=DEVICE)
    found = []
    for on in (True, False):
        by_kernels(False)
        cache = model.make_cache(n_sequences, 100)
        model(ids[:, :30], cache=cache)
        cache.truncate(torch.tensor([30, 3, 9, 1, 29, 8][:n_sequences], device=DEVICE))
        cache.span = 100
        by_kernels(on)
        logits = []
        for t in range(30, 33):
            logits.append(model(ids[:, t : t + 1], cache=cache))
            cache.note_advance(1)
        found.append(torch.cat(logits, dim=1))
    assert (found[0] - found[1]).abs().max() < 1e-5
