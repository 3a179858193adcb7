"""Llama: the control that the other architectures are measured against.

Pre-norm decoder with RMSNorm, rotary positions, SwiGLU and grouped-query attention (Touvron et al. 2023,
https://arxiv.org/abs/2302.13971; Ainslie et al. 2023, https://arxiv.org/abs/2305.13245). Deliberately plain: nothing
here that the others could not have too. Differs from the paper: head and embedding are tied unless
`--no-tie-embeddings`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from nnx_cli.errors import UsageError
from nnx_cli.kernels.dropout import dropout as drop
from nnx_cli.kernels.one_token import Gate
from nnx_cli.layers.attention import cached_rotary_attention, rotary_attention
from nnx_cli.layers.kv_cache import KVCache
from nnx_cli.layers.linear import Linear, PackedLinear
from nnx_cli.layers.norm import RMSNorm
from nnx_cli.layers.one_token import add_linear, norm_gated, norm_linear
from nnx_cli.layers.qkv_swiglu import swiglu
from nnx_cli.layers.rope import rotary_tables, tables_of
from nnx_cli.models._base import DERIVED, LanguageModel, ModelConfig


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    """Shape of the control."""

    n_kv_heads: int = DERIVED  # key-value heads; default half the heads, or all where they are odd
    ffn_dim: int = DERIVED  # width of the feed-forward; default 3 x dim
    rope_theta: float = 10_000.0  # base of the rotary frequencies
    norm_eps: float = 1e-5  # value added to the mean square in norms
    tie_embeddings: bool = True  # the head is the embedding, transposed

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_head_dim()
        self.derive(n_kv_heads=self.n_heads // 2 if self.n_heads % 2 == 0 else self.n_heads, ffn_dim=3 * self.dim)
        if self.n_kv_heads < 1 or self.n_heads % self.n_kv_heads:
            raise UsageError(f"--n-kv-heads {self.n_kv_heads} must divide --n-heads {self.n_heads}")
        if self.ffn_dim < 1 or not self.rope_theta > 0 or not self.norm_eps > 0:
            raise UsageError("--ffn-dim must be at least 1, --rope-theta and --norm-eps above 0")


SIZES: dict[str, dict[str, Any]] = {
    "nano": dict(dim=128, n_layers=4, n_heads=4, seq_len=256),
    "tiny": dict(dim=384, n_layers=6, n_heads=6, seq_len=256),
    "small": dict(dim=640, n_layers=6, n_heads=10, seq_len=1024),
    "base": dict(dim=896, n_layers=13, n_heads=14, seq_len=1024),
    "large": dict(dim=1280, n_layers=18, n_heads=20, seq_len=1024),
    "xl": dict(dim=2048, n_layers=20, n_heads=16, seq_len=1024),
}


class Attention(nn.Module):
    """Causal self-attention with grouped queries and rotary positions."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.dim // config.n_heads
        self.dropout = config.dropout
        kv_dim = config.n_kv_heads * self.head_dim
        self.qkv = PackedLinear(config.dim, (config.dim, kv_dim, kv_dim))
        self.out = Linear(config.dim, config.dim)

    def forward(self, x: Tensor, tables: Sequence[Tensor], cache: KVCache | None) -> Tensor:
        """x (B, T, D) to the same."""
        how = dict(scale=self.head_dim**-0.5, dropout=self.dropout if self.training else 0.0)
        return self.out(rotary_attention(self.qkv, x, tables, cache, self.layer, **how))


class MLP(nn.Module):
    """SwiGLU. Shazeer 2020, https://arxiv.org/abs/2002.05202."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate_up = PackedLinear(config.dim, (config.ffn_dim, config.ffn_dim))
        self.down = Linear(config.ffn_dim, config.dim)
        self.dropout = config.dropout

    def forward(self, x: Tensor, cache: KVCache | None) -> Tensor:
        """x (B, T, D) to the same."""
        hidden = swiglu(self.gate_up, x, cache)  # (B, T, F)
        return self.down(drop(hidden, self.dropout, self.training))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, tables: Sequence[Tensor], cache: KVCache | None) -> Tensor:
        """x (B, T, D) to the same."""
        if cache is not None and x.shape[1] == 1:
            return self.step(x, tables, cache)
        x = x + self.attention(self.attention_norm(x), tables, cache)
        return x + self.mlp(self.mlp_norm(x), cache)

    def step(self, x: Tensor, tables: Sequence[Tensor], cache: KVCache) -> Tensor:
        """`forward` of one token of every sequence."""
        attention, mlp = self.attention, self.mlp
        qkv = norm_linear(self.attention_norm, attention.qkv, x)
        n_heads, scale = x.shape[-1] // attention.head_dim, attention.head_dim**-0.5
        attended = cached_rotary_attention(qkv, tables, cache, attention.layer, n_heads, scale=scale)
        x = add_linear(x, (attention.out, attended))
        _, hidden = norm_gated(self.mlp_norm, mlp.gate_up, x, Gate(mlp.gate_up.splits[-1], first=True))
        return add_linear(x, (mlp.down, hidden))


class Model(LanguageModel):
    """Embedding, blocks, a last norm, a tied head."""

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = Linear(config.dim, config.vocab_size)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.init_weights()

    def init_weights(self) -> None:
        """N(0, 0.02), smaller by sqrt(2L) where a branch returns to the residual stream, as in GPT-2."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                branch_end = name.endswith(("attention.out.weight", "mlp.down.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * self.config.n_layers) ** 0.5 if branch_end else 0.02)

    def trunk(self, input_ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """As in the base."""
        config = self.config
        tables = tables_of(self.rotary_tables, input_ids, cache, config.n_heads + config.n_kv_heads, config.n_kv_heads)
        x = self.embedding(input_ids).to(self.compute_dtype)  # (B, T, D)
        for block in self.blocks:
            x = block(x, tables, cache)
        if cache is not None:
            cache.advance(input_ids.shape[1])
        return self.norm(x)

    def rotary_tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of `positions`."""
        return rotary_tables(positions, self.config.dim // self.config.n_heads, self.config.rope_theta)

    def make_cache(self, batch_size: int, max_seq_len: int) -> KVCache:
        """As in the base."""
        config = self.config
        shape = (config.n_layers, batch_size, config.n_kv_heads, max_seq_len, config.dim // config.n_heads)
        return KVCache(shape, self.device, self.compute_dtype)
