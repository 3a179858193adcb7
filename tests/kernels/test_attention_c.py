import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from nnx_cli.kernels import attention_c
from nnx_cli.kernels.attention_c import attention, attention_backward, attention_op, is_available, takes
from nnx_cli.layers.attention import causal_attention
from nnx_cli.system import c_library, hardware

SHAPES = [  # sequences, heads of queries and of keys, positions, widths of keys and of values
    (2, 4, 1, 64, 32, 32),
    (1, 4, 4, 33, 16, 16),
    (2, 6, 3, 77, 10, 23),
    (1, 2, 1, 1, 8, 8),
    (1, 1, 1, 130, 3, 70),
    (3, 4, 2, 16, 48, 24),
]


@pytest.fixture(autouse=True)
def on_this_machine():
    if not is_available():
        pytest.skip("no C compiler, or no x86 CPU with AVX2")


def draw(*shape, seed=0, dtype=torch.float32):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(dtype).requires_grad_()


def inputs(shape, dtype=torch.float32):
    """Queries, keys and values as they lie in a model: with positions before heads."""
    B, H, G, T, K, V = shape
    sizes = (H, K), (G, K), (G, V)
    return [draw(B, T, n, width, seed=n + width, dtype=dtype).transpose(1, 2) for n, width in sizes]


def exact(q, k, v, kept=1.0):
    """In float64, with probabilities multiplied by `kept`."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = 0.3 * q @ k.transpose(-1, -2)
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return ((scores.masked_fill(hidden, -torch.inf).softmax(-1) * kept) @ v).transpose(1, 2)


def mask_of(shape, p):
    """What the next call multiplies probabilities by: read off with equal ones, and a value for each position."""
    B, H, _, T, _, _ = shape
    nothing, one_each = torch.zeros(B, H, T, 4), torch.eye(T).expand(B, H, T, T)
    state = torch.get_rng_state()
    shares = attention_op(nothing, nothing, one_each, 1.0, p)[0].transpose(1, 2)
    torch.set_rng_state(state)
    return shares * torch.arange(1, T + 1)[:, None]


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_and_gradients_are_those_of_attention(shape, p):
    torch.manual_seed(3)
    kept = mask_of(shape, p)
    q, k, v = inputs(shape)
    y, wanted = attention(q, k, v, 0.3, p), exact(q, k, v, kept)
    torch.testing.assert_close(y.double(), wanted, rtol=0, atol=3e-6)
    grad = draw(*y.shape, seed=9).detach()
    found = torch.autograd.grad(y, (q, k, v), grad)
    for a, b in zip(found, torch.autograd.grad(wanted, (q, k, v), grad.double()), strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-5, atol=2e-5)


def test_large_scores_and_what_is_not_finite():
    q, k, v = inputs((1, 2, 2, 40, 16, 16))
    torch.testing.assert_close(attention(300 * q, k, v, 0.3, 0.0).double(), exact(300 * q, k, v), rtol=0, atol=1e-4)
    for number in range(3):
        odd = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        with torch.no_grad():
            odd[number][0, 1, 20, 3] = torch.nan
        y = attention(*odd, 0.3, 0.0)
        assert y[0, :, 0].isfinite().all(), "another head"
        seen = y[0, 20:21, 1] if number == 0 else y[0, 20:, 1]
        assert not seen.isfinite().all(-1).any()
        assert not torch.autograd.grad(y.sum(), odd[0])[0].isfinite().all()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.999])
def test_probabilities_are_dropped_as_often_as_asked_and_independently(p):
    torch.manual_seed(0)
    size = 4, 4, 4, 200, 8, 8
    kept = mask_of(size, p)
    below = torch.ones(200, 200, dtype=torch.bool).tril()
    assert not kept[..., ~below].any()
    dropped = (kept == 0).double()[..., below]
    spread = (p * (1 - p) / dropped.numel()) ** 0.5
    assert abs(dropped.mean().item() - p) < 5 * spread
    assert torch.allclose(kept[kept > 0], torch.tensor(1 / (1 - p)), rtol=1e-4)
    centred = (kept == 0).double() - p
    for other in (centred.roll(1, -1), centred.roll(1, -2), centred.roll(1, 0), centred.roll(1, 1)):
        together = (centred * other)[..., 1:, 1:][..., below[2:, 1:].new_ones(199, 199).tril(-1)]
        assert abs(together.mean().item()) < 5 * p * (1 - p) / together.numel() ** 0.5


def test_a_mask_follows_from_the_seed_alone():
    size = 1, 2, 2, 50, 8, 8
    masks = []
    for seed, threads in ((1, 1), (1, 3), (2, 1)):
        torch.manual_seed(seed)
        torch.set_num_threads(threads)
        masks.append(mask_of(size, 0.5))
    assert masks[0].equal(masks[1]) and not masks[0].equal(masks[2])
    state = torch.get_rng_state()
    attention(*inputs(size), 0.3, 0.0)
    assert torch.get_rng_state().equal(state), "nothing is drawn where nothing is dropped"


def test_the_number_of_threads_changes_not_a_bit():
    size = 3, 5, 1, 70, 16, 16
    found = []
    for threads in (1, 4):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        q, k, v = inputs(size)
        y = attention(q, k, v, 0.3, 0.2)
        found.append((y, *torch.autograd.grad(y.square().sum(), (q, k, v))))
    assert all(a.equal(b) for a, b in zip(*found, strict=True))


def test_it_is_taken_where_a_cpu_trains():
    q, k, v = inputs((1, 4, 2, 20, 8, 8))
    assert takes(q, k, v) and not takes(*(x.detach() for x in (q, k, v)))
    assert not takes(*(x.double() for x in (q, k, v)))
    with torch.no_grad():
        assert not takes(q, k, v)
    y = causal_attention(q, k, v, None, 0, scale=0.3)
    assert "nnx_attention" in y.grad_fn.next_functions[0][0].name()
    torch.testing.assert_close(y, causal_attention(q.detach(), k.detach(), v.detach(), None, 0, scale=0.3))
    for p in (0.0, 0.5):
        torch.manual_seed(1)
        assert causal_attention(q, k, v, None, 0, scale=0.3, dropout=p).isfinite().all()


@pytest.mark.parametrize("flags", [("-mavx2", "-mfma"), ("-mavx512f", "-mavx512bw"), ("-msse2",)], ids=str)
def test_other_instructions_come_to_the_same(flags, monkeypatch):
    if flags[0].startswith("-mavx512") and not hardware.cpu_flags()[0].startswith("-mavx512"):
        pytest.skip("this CPU has none of them")
    monkeypatch.setattr(c_library, "cpu_flags", lambda: flags)
    library = c_library.load_threaded.__wrapped__(*attention_c.SOURCES)
    torch.manual_seed(5)
    wanted = mask_of((2, 2, 2, 90, 8, 8), 0.3)
    monkeypatch.setattr(attention_c, "load_threaded", lambda *paths: library)
    torch.testing.assert_close(mask_of((2, 2, 2, 90, 8, 8), 0.3), wanted)


def test_without_it_torch_computes(monkeypatch):
    q, k, v = inputs((1, 4, 2, 20, 8, 8))
    monkeypatch.setattr(attention_c, "_answer", [])
    monkeypatch.setattr(attention_c, "load_threaded", lambda *paths: None)
    assert not takes(q, k, v) and causal_attention(q, k, v, None, 0, scale=0.3, dropout=0.5).isfinite().all()


def test_it_may_be_asked_for_where_tensors_have_no_memory(monkeypatch):
    monkeypatch.setattr(attention_c, "_answer", [])
    with FakeTensorMode():
        x = torch.randn(1, 2, 20, 8, requires_grad=True)
        assert takes(x, x, x)
        causal_attention(x, x, x, None, 0, scale=0.3, dropout=0.5).sum().backward()
        assert x.grad.shape == x.shape


def test_operators_are_ones():
    q, k, v = inputs((1, 4, 2, 20, 8, 12))
    tests = "test_schema", "test_faketensor", "test_autograd_registration"
    torch.library.opcheck(attention_op, (q, k, v, 0.3, 0.0), test_utils=tests)
    with torch.no_grad():
        y, lse, seed = attention_op(q, k, v, 0.3, 0.0)
        torch.library.opcheck(attention_backward, (y, q, k, v, y, lse, seed, 0.3, 0.0), test_utils=tests[:2])


def test_it_compiles():
    q, k, v = inputs((1, 4, 2, 20, 8, 8))
    compiled = torch.compile(causal_attention, fullgraph=True, backend="aot_eager")
    y, wanted = (how(q, k, v, None, 0, scale=0.3) for how in (compiled, causal_attention))
    assert torch.equal(y, wanted)
    grads = [torch.autograd.grad(each.square().sum(), (q, k, v)) for each in (y, wanted)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert torch.allclose(
        y,
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True).transpose(1, 2).flatten(2),
        atol=1e-5,
    )
