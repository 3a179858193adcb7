"""The operations of `one_token` as Triton kernels. Needs Triton, which whoever imports this has looked for.

From Hopper on a kernel starts while the one before it is still at work, and reads its first weights meanwhile: they do
not depend on that. Before it reads or writes anything else it waits for that one's end (programmatic dependent launch,
https://docs.nvidia.com/cuda/cuda-programming-guide/04-special-topics/programmatic-dependent-launch.html).
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # weights that a program holds at a time
PROGRAMS = 256  # at least, where that leaves rows enough: a GPU's processors should all have some
WARPS = 4  # of a program that reads a matrix
CHUNK_BYTES = 8192  # of keys, and of values, that a program reads at a time
MAX_CHUNK = 64  # positions
HOPPER = (9, 0)  # compute capability from which on kernels may overlap


def normalise(x: Tensor, gain: Tensor, eps: float, centred: bool) -> Tensor:
    """x (B, 1, D) normalised, in its type."""
    D = x.shape[-1]
    x, out = x.contiguous(), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        width, early = triton.next_power_of_2(D), _early(x.device)
        _normalise[(x.numel() // D,)](x, gain, out, D, eps, CENTRED=centred, WIDTH=width, **early)
    return out


def project(
    x: Tensor,
    gain: Tensor,
    eps: float,
    centred: bool,
    weight: Tensor,
    scale: Tensor | None,
    n_hidden: int,
    gate_first: bool,
) -> tuple[Tensor, Tensor]:
    """As `one_token.project`."""
    B, _, D = x.shape
    n_plain = len(weight) - 2 * n_hidden
    plain, hidden = x.new_empty(B, 1, n_plain), x.new_empty(B, 1, n_hidden)
    width = triton.next_power_of_2(D)
    rows = _rows(n_plain + n_hidden, width)
    with torch.cuda.device_of(x):
        _project[(triton.cdiv(n_plain + n_hidden, rows), B)](
            x.contiguous(),
            gain,
            weight,
            gain if scale is None else scale,
            plain,
            hidden,
            D,
            n_plain,
            n_hidden,
            eps,
            weight.stride(0),
            SCALED=scale is not None,
            CENTRED=centred,
            GATE_FIRST=gate_first,
            ROWS=rows,
            WIDTH=width,
            num_warps=WARPS,
            **_early(x.device),
        )
    return plain, hidden


def add_products(x: Tensor, *factors: tuple[Tensor, tuple[Tensor, Tensor | None]]) -> Tensor:
    """As `one_token.add_products`."""
    (a, (a_weight, a_scale)), (b, (b_weight, b_scale)) = factors[0], factors[-1]
    B, _, D = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    width = min(1024, triton.next_power_of_2(max(a.shape[-1], b.shape[-1])))
    rows = _rows(D, width)
    with torch.cuda.device_of(x):
        _add_products[(triton.cdiv(D, rows), B)](
            x.contiguous(),
            a.contiguous(),
            a_weight,
            x if a_scale is None else a_scale,
            b.contiguous(),
            b_weight,
            x if b_scale is None else b_scale,
            out,
            D,
            a.shape[-1],
            b.shape[-1],
            a_weight.stride(0),
            b_weight.stride(0),
            SCALED=a_scale is not None,
            TWO=len(factors) == 2,
            ROWS=rows,
            WIDTH=width,
            num_warps=WARPS,
            **_early(x.device),
        )
    return out


def _rows(n: int, width: int) -> int:
    """Rows of a matrix for a program: as many as it can hold, fewer where there would be few programs."""
    rows = max(1, min(16, TILE // width))
    while rows > 1 and n // rows < PROGRAMS:
        rows //= 2
    return rows


def attend(
    qkv: Tensor, tables: Tensor, stored: Tensor, lengths: Tensor, span: int, n_heads: int, scale: float
) -> Tensor:
    """As `one_token.attend`."""
    G, K = stored.shape[1] // 2, stored.shape[-1]
    out = qkv.new_empty(len(qkv), 1, n_heads * K)
    keys, values = stored.chunk(2, dim=1)
    _launch(qkv.contiguous(), tables.contiguous(), keys, values, lengths, out, span, n_heads, G, K, scale)
    return out


def attend_stored(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """As `one_token.attend_stored`."""
    B, H, _, K = q.shape
    out = q.new_empty(B, 1, H * K)
    _launch(q.reshape(B, H * K).contiguous(), None, k, v, lengths, out, k.shape[2], H, k.shape[1], K, scale)
    return out


def _launch(
    heads: Tensor,
    tables: Tensor | None,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    out: Tensor,
    span: int,
    H: int,
    G: int,
    K: int,
    scale: float,
) -> None:
    """Attention of every key-value head by as many programs as there are parts of the span; the last that is done
    merges what all have found."""
    B = len(out)
    rows, width = max(16, triton.next_power_of_2(H // G)), triton.next_power_of_2(K)
    chunk = max(16, min(MAX_CHUNK, CHUNK_BYTES // (width * keys.element_size())))
    part = triton.cdiv(triton.cdiv(span, max(1, PROGRAMS // (B * G))), MAX_CHUNK) * MAX_CHUNK
    n_parts = triton.cdiv(span, part)
    found = torch.empty(B * G, n_parts, rows, width + 2, dtype=torch.float32, device=out.device)
    with torch.cuda.device_of(out):
        _attend[(B * G, n_parts)](
            heads,
            out if tables is None else tables,
            keys,
            values,
            lengths,
            out,
            found,
            _counters(out.device, triton.next_power_of_2(B * G)),
            scale,
            part,
            heads.shape[-1],
            *keys.stride()[:3],
            H=H,
            G=G,
            K=K,
            KINDS=0 if tables is None else tables.shape[-2],
            ROWS=rows,
            WIDTH=width,
            CHUNK=chunk,
            num_stages=2,
            **_early(out.device),
        )


@cache
def _early(device: torch.device) -> dict[str, bool]:
    """Arguments of a kernel that is to start early, where the device and this Triton let it."""
    if torch.version.cuda is None or torch.cuda.get_device_capability(device) < HOPPER:
        return {"EARLY": False}
    if not hasattr(tl.extra.cuda, "gdc_wait") or find_spec("triton.backends.nvidia") is None:
        return {"EARLY": False}
    from triton.backends.nvidia.compiler import CUDAOptions

    return {"EARLY": True, "launch_pdl": True} if hasattr(CUDAOptions, "launch_pdl") else {"EARLY": False}


@cache
def _counters(device: torch.device, n: int) -> Tensor:
    """How many programs of each key-value head are done: 0 between launches, which come one after the other."""
    return torch.zeros(n, dtype=torch.int32, device=device)


@triton.jit
def _let_next_start(EARLY: tl.constexpr):
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _wait_for_previous(EARLY: tl.constexpr):
    if EARLY:
        tl.extra.cuda.gdc_wait()


@triton.jit
def _normalised(x, gain, k, D, eps, CENTRED: tl.constexpr):
    """A row of x, normalised and rounded, as float32."""
    inside = k < D
    row = tl.load(x + k, inside, 0.0)
    y = row.to(tl.float32)
    if CENTRED:
        y = tl.where(inside, y - tl.sum(y) / D, 0.0)
    y = y * (1 / tl.sqrt(tl.sum(y * y) / D + eps))
    y = y * tl.load(gain + k, inside, 0.0).to(tl.float32)
    return y.to(row.dtype).to(tl.float32)


@triton.jit
def _normalise(x, gain, out, D, eps, CENTRED: tl.constexpr, WIDTH: tl.constexpr, EARLY: tl.constexpr):
    _let_next_start(EARLY)
    _wait_for_previous(EARLY)
    row = tl.program_id(0).to(tl.int64) * D
    k = tl.arange(0, WIDTH)
    tl.store(out + row + k, _normalised(x + row, gain, k, D, eps, CENTRED).to(out.dtype.element_ty), k < D)


@triton.jit
def _project(
    x,
    gain,
    weight,
    scale,
    plain,
    hidden,
    D,
    n_plain,
    n_hidden,
    eps,
    weight_stride,
    SCALED: tl.constexpr,
    CENTRED: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    EARLY: tl.constexpr,
):
    _let_next_start(EARLY)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b = tl.program_id(1)
    k = tl.arange(0, WIDTH)
    dtype = plain.dtype.element_ty
    is_gated = row >= n_plain
    at = weight + row.to(tl.int64)[:, None] * weight_stride + k[None, :]
    mask = (row < n_plain + n_hidden)[:, None] & (k < D)[None, :]
    first = tl.load(at, mask, 0)
    second = tl.load(at + n_hidden.to(tl.int64) * weight_stride, mask & is_gated[:, None], 0)
    _wait_for_previous(EARLY)
    y = _normalised(x + b * D, gain, k, D, eps, CENTRED)
    a = tl.sum(first.to(tl.float32) * y[None, :], 1)
    if SCALED:
        a *= tl.load(scale + row, row < n_plain + n_hidden, 0.0)
    a = a.to(dtype)
    tl.store(plain + b * n_plain + row, a, row < n_plain)
    if tl.program_id(0) * ROWS + ROWS > n_plain:
        c = tl.sum(second.to(tl.float32) * y[None, :], 1)
        if SCALED:
            c *= tl.load(scale + row + n_hidden, is_gated & (row < n_plain + n_hidden), 0.0)
        c = c.to(dtype)
        gate, value = (a, c) if GATE_FIRST else (c, a)
        wide = gate.to(tl.float32)
        activated = (wide / (1 + tl.exp(-wide))).to(dtype)
        h = activated.to(tl.float32) * value.to(tl.float32)
        tl.store(hidden + b * n_hidden + row - n_plain, h.to(dtype), is_gated & (row < n_plain + n_hidden))


@triton.jit
def _first_weights(weight, stride, row, D, K, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """The first columns of rows of a matrix (D, K)."""
    k = tl.arange(0, WIDTH)
    at = weight + row.to(tl.int64)[:, None] * stride + k[None, :]
    return tl.load(at, (row < D)[:, None] & (k < K)[None, :], 0)


@triton.jit
def _product(y, w, weight, scale, stride, row, D, K, SCALED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """y (K,) times rows of a matrix (D, K), float32; `w` are their first weights."""
    k = tl.arange(0, WIDTH)
    at = weight + row.to(tl.int64)[:, None] * stride + k[None, :]
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(0, K, WIDTH):
        following = tl.load(at + start + WIDTH, (row < D)[:, None] & (k + start + WIDTH < K)[None, :], 0)
        total += w.to(tl.float32) * tl.load(y + start + k, k + start < K, 0.0).to(tl.float32)[None, :]
        w = following
    product = tl.sum(total, 1)
    return product * tl.load(scale + row, row < D, 0.0) if SCALED else product


@triton.jit
def _add_products(
    x,
    a,
    a_weight,
    a_scale,
    b,
    b_weight,
    b_scale,
    out,
    D,
    a_width,
    b_width,
    a_stride,
    b_stride,
    SCALED: tl.constexpr,
    TWO: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    EARLY: tl.constexpr,
):
    _let_next_start(EARLY)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1)
    dtype = out.dtype.element_ty
    a_first = _first_weights(a_weight, a_stride, row, D, a_width, ROWS, WIDTH)
    if TWO:
        b_first = _first_weights(b_weight, b_stride, row, D, b_width, ROWS, WIDTH)
    _wait_for_previous(EARLY)
    y = _product(a + n * a_width, a_first, a_weight, a_scale, a_stride, row, D, a_width, SCALED, ROWS, WIDTH)
    y = y.to(dtype).to(tl.float32)
    total = (tl.load(x + n * D + row, row < D, 0.0).to(tl.float32) + y).to(dtype)
    if TWO:
        y = _product(b + n * b_width, b_first, b_weight, b_scale, b_stride, row, D, b_width, SCALED, ROWS, WIDTH)
        y = y.to(dtype).to(tl.float32)
        total = (total.to(tl.float32) + y).to(dtype)
    tl.store(out + n * D + row, total, row < D)


@triton.jit
def _turned(heads, cos, sin, head, k, n_heads, K: tl.constexpr):
    """Heads (ROWS, WIDTH) of a row, turned by tables (K,) and rounded."""
    mask = (head < n_heads)[:, None] & (k < K)[None, :]
    partner = tl.where(k < K // 2, k + K // 2, k - K // 2)
    x = tl.load(heads + head[:, None] * K + k[None, :], mask, 0.0)
    other = tl.load(heads + head[:, None] * K + partner[None, :], mask, 0.0)
    turned = x.to(tl.float32) * tl.load(cos + k, k < K, 0.0)[None, :]
    turned += other.to(tl.float32) * tl.load(sin + k, k < K, 0.0)[None, :]
    return turned.to(x.dtype)


@triton.jit
def _new_heads(heads, tables, g, r, k, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, KINDS: tl.constexpr):
    """Queries (ROWS, WIDTH), key and value (1, WIDTH) of a key-value head; without tables queries alone."""
    if KINDS == 0:
        mask = (r < H // G)[:, None] & (k < K)[None, :]
        q = tl.load(heads + (g * (H // G) + r)[:, None] * K + k[None, :], mask, 0.0)
        new_k = tl.zeros((1, q.shape[1]), q.dtype)
        new_v = new_k
    else:
        sines = tables + KINDS * K
        kind = (KINDS - 2) * K
        q = _turned(heads + g * (H // G) * K, tables, sines, r, k, H // G, K)
        new_k = _turned(heads + (H + g) * K, tables + kind, sines + kind, tl.arange(0, 1), k, 1, K)
        new_v = tl.load(heads + (H + G + g) * K + k[None, :], (k < K)[None, :], 0.0)
    return q, new_k, new_v


@triton.jit
def _attend_to(
    q,
    new_k,
    new_v,
    keys,
    values,
    position_stride,
    start,
    end,
    newest,
    scale,
    KINDS: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Highest scores, sums of exponentials and of weighted values, of positions from `start` to before `end`."""
    k = tl.arange(0, WIDTH)
    most = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    y = tl.zeros((ROWS, WIDTH), tl.float32)
    for first in range(start, end, CHUNK):
        s = first + tl.arange(0, CHUNK)
        there = (s < newest + (KINDS == 0))[:, None] & (k < K)[None, :]
        at = s.to(tl.int64)[:, None] * position_stride + k[None, :]
        key = tl.load(keys + at, there, 0.0)
        value = tl.load(values + at, there, 0.0)
        if KINDS != 0:
            is_new = (s == newest)[:, None]
            key = tl.where(is_new, new_k, key)
            value = tl.where(is_new, new_v, value)
        scores = tl.dot(q, tl.trans(key), input_precision="tf32x3") * scale
        scores = tl.where((s <= newest)[None, :], scores, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, 1))
        shares = tl.exp(scores - higher[:, None])
        shrink = tl.exp(most - higher)
        total = total * shrink + tl.sum(shares, 1)
        y = y * shrink[:, None] + tl.dot(shares.to(value.dtype), value, input_precision="tf32x3")
        most = higher
    return most, total, y


@triton.jit
def _is_last(found, counter, part, n_parts, most, total, y, r, k, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Leave what a part has found to the program that is done last, and say whether it is this one."""
    at = found + (part * ROWS + r) * (WIDTH + 2)
    tl.store(at, most)
    tl.store(at + 1, total)
    tl.store(at[:, None] + 2 + k[None, :], y)
    tl.debug_barrier()
    n_before = tl.atomic_add(counter, 1, sem="acq_rel")
    tl.debug_barrier()
    return n_before == n_parts - 1


@triton.jit
def _merged(found, r, k, n_parts, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Sums of weighted values and of exponentials of all parts, which other programs have written."""
    most = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    y = tl.zeros((ROWS, WIDTH), tl.float32)
    for part in range(n_parts):
        at = found + (part * ROWS + r) * (WIDTH + 2)
        its_most = tl.load(at, cache_modifier=".cg")
        higher = tl.maximum(most, its_most)
        shrink, grow = tl.exp(most - higher), tl.exp(its_most - higher)
        total = total * shrink + tl.load(at + 1, cache_modifier=".cg") * grow
        y = y * shrink[:, None] + tl.load(at[:, None] + 2 + k[None, :], cache_modifier=".cg") * grow[:, None]
        most = higher
    return y, total


@triton.jit
def _attend(
    heads,
    tables,
    keys,
    values,
    lengths,
    out,
    found,
    counters,
    scale,
    n_positions,
    heads_stride,
    batch_stride,
    head_stride,
    position_stride,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    KINDS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    EARLY: tl.constexpr,
):
    _let_next_start(EARLY)
    _wait_for_previous(EARLY)
    bg, part = tl.program_id(0), tl.program_id(1)
    b, g = bg // G, bg % G
    newest = tl.load(lengths + b).to(tl.int32)
    n_parts = newest // n_positions + 1
    if part < n_parts:
        r = tl.arange(0, ROWS)
        k = tl.arange(0, WIDTH)
        heads += b.to(tl.int64) * heads_stride
        keys += b.to(tl.int64) * batch_stride + g * head_stride
        values += b.to(tl.int64) * batch_stride + g * head_stride
        mask = (r < H // G)[:, None] & (k < K)[None, :]
        q, new_k, new_v = _new_heads(heads, tables + b * 2 * KINDS * K, g, r, k, H, G, K, KINDS)
        if KINDS != 0 and part == n_parts - 1:
            at = newest.to(tl.int64) * position_stride + k[None, :]
            tl.store(keys + at, new_k, (k < K)[None, :])
            tl.store(values + at, new_v, (k < K)[None, :])
        first, end = part * n_positions, tl.minimum((part + 1) * n_positions, newest + 1)
        most, total, y = _attend_to(
            q, new_k, new_v, keys, values, position_stride, first, end, newest, scale, KINDS, K, ROWS, WIDTH, CHUNK
        )
        result = out + b * H * K + (g * (H // G) + r)[:, None] * K + k[None, :]
        if n_parts == 1:
            tl.store(result, (y / total[:, None]).to(out.dtype.element_ty), mask)
        else:
            found += bg.to(tl.int64) * tl.num_programs(1) * ROWS * (WIDTH + 2)
            if _is_last(found, counters + bg, part, n_parts, most, total, y, r, k, ROWS, WIDTH):
                y, total = _merged(found, r, k, n_parts, ROWS, WIDTH)
                tl.store(result, (y / total[:, None]).to(out.dtype.element_ty), mask)
                tl.store(counters + bg, 0)
