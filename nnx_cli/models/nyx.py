"""NYX: parallel blocks, one key-value head, xPos rotary, SwiGLU, tied head.

The block adds attention and feed-forward of one shared norm (PaLM, Chowdhery et al. 2022,
https://arxiv.org/abs/2204.02311); all query heads share one key and value head (Shazeer 2019,
https://arxiv.org/abs/1911.02150); the feed-forward is gated (Shazeer 2020, https://arxiv.org/abs/2002.05202); rotary
positions decay with distance (xPos, Sun et al. 2022, https://arxiv.org/abs/2212.10554) unless they are to be plain
(Su et al. 2021, https://arxiv.org/abs/2104.09864); queries and keys may be normalised (Henry et al. 2020,
https://arxiv.org/abs/2010.04245).

`small` is the size that NYX's author publishes: 30,020,096 parameters. Differs from the original: normalised queries
and keys are scaled by 8, as intended there and never applied; target 0 counts in the loss (variant `original` keeps
both defects); the xPos exponent is centred at the middle of the context, a constant, so that cached keys stay valid
(only differences of positions matter, and the factors stay within 16 bits for contexts of up to 8192).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnx_cli.errors import UsageError
from nnx_cli.kernels.dropout import dropout as drop
from nnx_cli.kernels.one_token import Gate
from nnx_cli.kernels.qkv_swiglu import qkv_rope_swiglu, rotate
from nnx_cli.layers.attention import cached_rotary_attention, causal_attention
from nnx_cli.layers.insides import Insides
from nnx_cli.layers.kv_cache import KVCache
from nnx_cli.layers.linear import Linear, PackedLinear
from nnx_cli.layers.norm import LayerNorm
from nnx_cli.layers.one_token import add_linear, norm_gated
from nnx_cli.layers.qkv_swiglu import packed_for_kernel
from nnx_cli.layers.rope import rotary_tables, tables_of
from nnx_cli.layers.unit_norm import unit
from nnx_cli.models._base import DERIVED, LanguageModel, ModelConfig, Recipe
from nnx_cli.models.insides.nyx import insides as insides_of_nyx

LONGEST_IN_BASES = 128  # a context in scale bases: its ends are 64 off the centre, where factors are 1e-35 and 1e35


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    """Shape of NYX."""

    head_dim: int = DERIVED  # width of a head; default dim / n_heads
    ffn_dim: int = DERIVED  # width of the feed-forward; default 4 x dim
    qk_norm: bool = False  # normalise queries and keys, with a learned gain each
    qk_norm_scale: float = 8.0  # softmax scale with qk-norm
    xpos: bool = True  # rotary positions that decay with distance; off: plain ones
    xpos_scale_base: float = 512.0  # positions after which the slowest pair has lost a factor 3.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_dim is DERIVED:
            self.check_head_dim()
        self.derive(head_dim=self.dim // self.n_heads, ffn_dim=4 * self.dim)
        if self.head_dim < 2 or self.head_dim % 2 or self.ffn_dim < 1:
            raise UsageError(
                f"--head-dim {self.head_dim} must be even and at least 2, --ffn-dim {self.ffn_dim} at least 1"
            )
        if not self.qk_norm_scale > 0:
            raise UsageError(f"--qk-norm-scale is {self.qk_norm_scale:g}; it must be above 0")
        base, least = self.xpos_scale_base, self.seq_len / LONGEST_IN_BASES
        if self.xpos and base < least:
            raise UsageError(
                f"--xpos-scale-base is {base:g}; for --seq-len {self.seq_len} it must be at least {least:g}",
                fix=f"take --xpos-scale-base {least:g}, or --no-xpos for plain rotary positions",
            )

    def unread(self) -> dict[str, str]:
        """Fields that change nothing beside the values of others, each with the option that it needs."""
        unread = {} if self.xpos else {"xpos_scale_base": "--xpos"}
        if not self.qk_norm or self.variant != "sound":
            unread["qk_norm_scale"] = "--variant sound" if self.qk_norm else "--qk-norm"
        return unread


SIZES: dict[str, dict[str, Any]] = {
    "nano": dict(dim=128, n_layers=4, n_heads=4, ffn_dim=384, seq_len=256),
    "tiny": dict(dim=384, n_layers=5, n_heads=6, seq_len=256),
    "small": dict(dim=512, n_layers=8, n_heads=8, seq_len=1024),
    "base": dict(dim=896, n_layers=11, n_heads=14, seq_len=1024),
    "large": dict(dim=1280, n_layers=15, n_heads=20, seq_len=1024),
    "xl": dict(dim=2048, n_layers=17, n_heads=16, seq_len=1024),
}


def xpos_tables(
    positions: Tensor, head_dim: int, scale_base: float, centre: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rotary tables (T, K/2) with the xPos decay: (cos, sin) for queries, (cos, sin) for keys, float32.

    The decay is 1 at position `centre`.
    """
    cos, sin = rotary_tables(positions, head_dim)
    pair = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    zeta = (pair + 0.4 * head_dim) / (1.4 * head_dim)
    decay = zeta ** ((positions.float().unsqueeze(-1) - centre) / scale_base)
    return cos * decay, sin * decay, cos / decay, sin / decay


class Block(nn.Module):
    """x + attention(norm(x)) + feedforward(norm(x)): one GEMM in, one out of each branch."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        inner = config.n_heads * config.head_dim
        self.layer, self.n_heads, self.head_dim, self.dropout = layer, config.n_heads, config.head_dim, config.dropout
        self.norm = LayerNorm(config.dim)
        self.in_proj = PackedLinear(
            config.dim, (inner, config.head_dim, config.head_dim, config.ffn_dim, config.ffn_dim)
        )  # query, key, value, feed-forward value, feed-forward gate
        self.attn_out = Linear(inner, config.dim)
        self.ffn_out = Linear(config.ffn_dim, config.dim)
        self.scale = config.head_dim**-0.5
        self.q_norm_weight = self.k_norm_weight = None
        if config.qk_norm:
            self.q_norm_weight = nn.Parameter(torch.ones(config.head_dim))
            self.k_norm_weight = nn.Parameter(torch.ones(config.head_dim))
            if config.variant == "sound":
                self.scale = config.qk_norm_scale

    def forward(self, x: Tensor, tables: Sequence[Tensor], cache: KVCache | None) -> Tensor:
        """x (B, T, D) to the same."""
        if cache is not None:
            return self.cached(x, tables, cache)
        dropout = self.dropout if self.training else 0.0
        q, k, v, hidden = self.inner(self.norm(x), tables)
        attended = causal_attention(q, k, v, cache, self.layer, scale=self.scale, dropout=dropout)
        return x + self.attn_out(attended) + self.ffn_out(drop(hidden, dropout, self.training))

    def cached(self, x: Tensor, tables: Sequence[Tensor], cache: KVCache) -> Tensor:
        """`forward` with a cache; of one token of every sequence in few operations."""
        qkv, hidden = norm_gated(self.norm, self.in_proj, x, Gate(self.in_proj.splits[-1], first=False))
        if self.q_norm_weight is not None:
            inner, width, *_ = self.in_proj.splits
            q, k, v = qkv.split_with_sizes((inner, width, width), -1)
            q, k = self.normalised(q.unflatten(-1, (-1, self.head_dim)), k)
            qkv = torch.cat((q.flatten(-2), k, v), dim=-1)
        attended = cached_rotary_attention(qkv, tables, cache, self.layer, self.n_heads, scale=self.scale)
        return add_linear(x, (self.attn_out, attended), (self.ffn_out, hidden))

    def normalised(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys (..., K) with qk-norm, if there is one."""
        if self.q_norm_weight is None or self.k_norm_weight is None:
            return q, k
        return (unit(q) * self.q_norm_weight).to(q.dtype), (unit(k) * self.k_norm_weight).to(k.dtype)

    def inner(self, x: Tensor, tables: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries (B, H, T, K), key and value (B, 1, T, K), one head for all queries, and hidden layer (B, T, F)."""
        plain = self.q_norm_weight is None
        q_cos, q_sin, k_cos, k_sin = tables
        if plain and (packed := packed_for_kernel(self.in_proj, x, None)) is not None:
            return qkv_rope_swiglu(
                packed, q_cos, q_sin, k_cos, k_sin, self.n_heads, 1
            )  # all of the following in one kernel
        B, T, D = x.shape
        q, k, v, value, gate = self.in_proj(x)
        q = q.view(B, T, -1, self.head_dim).transpose(1, 2)
        k, v = k.unsqueeze(1), v.unsqueeze(1)
        q, k = self.normalised(q, k)
        return rotate(q, q_cos, q_sin), rotate(k, k_cos, k_sin), v, F.silu(gate) * value


class Model(LanguageModel):
    """Embedding, parallel blocks, a last norm, a tied head."""

    config: Config
    recipe = Recipe(gpu_half_width=600)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = LayerNorm(config.dim)
        self.head = Linear(config.dim, config.vocab_size)
        self.head.weight = self.embedding.weight
        nn.init.normal_(self.embedding.weight, std=0.02)  # linear layers keep torch's uniform ±1/sqrt(fan_in)
        if config.variant == "original":
            self.ignore_index = 0  # the original drops token 0 from its loss

    def trunk(self, input_ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """As in the base."""
        tables = tables_of(self.rotary_tables, input_ids, cache, self.config.n_heads, 1, 1)
        x = self.embedding(input_ids).to(self.compute_dtype)  # (B, T, D)
        for block in self.blocks:
            x = block(x, tables, cache)
        if cache is not None:
            cache.advance(input_ids.shape[1])
        return self.norm(x)

    def rotary_tables(self, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rotary tables of `positions` (S,), as `xpos_tables` has them; without the decay where there is none."""
        config = self.config
        if not config.xpos:
            tables = rotary_tables(positions, config.head_dim)
            return *tables, *tables
        return xpos_tables(positions, config.head_dim, config.xpos_scale_base, config.seq_len // 2)

    def insides(self, input_ids: Tensor) -> Insides:
        """As in the base, with what is NYX's own."""
        return insides_of_nyx(self, input_ids)

    def make_cache(self, batch_size: int, max_seq_len: int) -> KVCache:
        """As in the base."""
        shape = (self.config.n_layers, batch_size, 1, max_seq_len, self.config.head_dim)
        return KVCache(shape, self.device, self.compute_dtype)

    def adapter_layers(self) -> Iterator[tuple[Linear, dict[str, Any]]]:
        """Query, key, value and attention output, as in the original."""
        for block in self.blocks:
            assert isinstance(block, Block)
            yield block.in_proj, {"adapted": (0, 1, 2)}
            yield block.attn_out, {}
