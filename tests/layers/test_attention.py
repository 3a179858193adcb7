"""Attention of parts of packed projections."""

import pytest
import torch

from nnx_cli.layers.attention import aligned, causal_attention
from nnx_cli.layers.segment_attention import attend
from nnx_cli.system import torch_private
from nnx_cli.system.hardware import Hardware, planned


def packed(rest, device, dtype=torch.bfloat16):
    """Queries, keys and values (B, H, T, K) as parts of rows that hold `rest` elements more."""
    torch.manual_seed(0)
    rows = torch.randn(2, 32, 3 * 64 + rest, device=device, dtype=dtype)
    parts = rows.split([64, 64, 64, rest], dim=-1)[:3]
    return [part.unflatten(-1, (4, 16)).transpose(1, 2) for part in parts]


@pytest.mark.parametrize(("rest", "copies"), [(4, True), (8, False)])
def test_rows_off_16_bytes_are_copied_for_cuda(rest, copies):
    for x in packed(rest, "meta"):
        assert aligned(x) is x
        with planned(Hardware(kind="cuda", capability=(8, 0))):
            assert (aligned(x) is not x) == copies and aligned(x).stride(-2) % 8 == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_attention_takes_parts_of_a_packed_projection():
    q, k, v = packed(4, "cuda")
    found = causal_attention(q, k, v, None, 0, scale=0.25)
    wanted = causal_attention(*(x.float() for x in (q, k, v)), None, 0, scale=0.25)
    torch.testing.assert_close(found.float(), wanted, rtol=0.02, atol=0.02)


def test_segments_need_no_private_operator_of_torch(monkeypatch):
    torch.manual_seed(0)
    q, kv = torch.randn(2, 5, 4, 8), torch.randn(3, 2, 5, 2, 4, 8)
    wanted = attend(q, kv, (1, 1, 1), None, 0, causal=True, dropout=0.0)
    monkeypatch.setattr(torch_private, "HAS_ATTENTION", False)
    for name in ("FLASH_CPU", "FLASH", "EFFICIENT"):
        monkeypatch.setattr(torch_private, name, None)
    torch.testing.assert_close(attend(q, kv, (1, 1, 1), None, 0, causal=True, dropout=0.0), wanted)
