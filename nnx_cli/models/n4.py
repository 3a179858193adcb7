"""N4: attention over gated running averages of the keys, tanh in place of norms, a three-way gated feed-forward.

Follows Rikka-Botan's Nova Nox Neural Network, which has no paper. A gate decides how much of a key enters an average
that slides ever more slowly (after the selective copying of Mamba, Gu and Dao 2023, https://arxiv.org/abs/2312.00752,
but nothing is ever forgotten on purpose); these averages and the causal mask are all that tells positions apart. tanh
stands for layer normalisation (Zhu et al. 2025, https://arxiv.org/abs/2503.10622); GELU is the exact one (Hendrycks and
Gimpel 2016, https://arxiv.org/abs/1606.08415), its gating goes one further than Shazeer 2020,
https://arxiv.org/abs/2002.05202. No final norm, head and embedding are not tied.

`base` is the shape that the author publishes as "127M"; with the 32,768 tokens published it has 177,871,872 parameters
(127,540,224 without embedding and head). The original counts 177,874,176, and 120,076,032 for its example (here
120,075,264): it holds a gain of head_dim elements in every layer that nothing uses, left out here. Differs further:
positions are counted and keys summed in float32 whatever the precision (the original's bfloat16 knows no count above
256), scores are never written out, and grouped keys, a window, alpha and bias of the paper's dynamic tanh and scores
scaled by the width of a head are options. The variants are equal: none of the original's defects changes the function
in float32. A window limits attention; the averages still go back to the first position.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnx_cli.errors import UsageError
from nnx_cli.kernels.averaged_keys import averaged_keys, averages, weighted_sums
from nnx_cli.kernels.dropout import dropout as drop
from nnx_cli.kernels.gemm import linear
from nnx_cli.layers.attention import causal_attention
from nnx_cli.layers.head import LinearHead, as_linear_head
from nnx_cli.layers.insides import Insides
from nnx_cli.layers.kv_cache import KVCache
from nnx_cli.layers.latent_attention import LatentCache, latent_attention
from nnx_cli.layers.linear import Linear, PackedLinear
from nnx_cli.layers.quantized import QuantizedMatrix
from nnx_cli.models._base import DERIVED, LanguageModel, ModelConfig, Recipe
from nnx_cli.models.insides.n4 import insides as insides_of_n4


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    """Shape of N4."""

    n_kv_heads: int = DERIVED  # key-value heads, each with its gate; default n_heads
    ffn_dim: int = DERIVED  # width of the feed-forward; default 2 x dim
    kv_latent_dim: int | None = None  # width of the latent that keys and values of a token rise from; default none
    window: int | None = None  # newest positions that attention reaches, its own included; default all
    bias: bool = False  # biases in all linear layers
    dyt_alpha: bool = False  # learn a slope and a bias in every dynamic tanh
    head_scale: bool = False  # divide scores by the root of a head's width instead of the root of dim

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_head_dim(even=False)
        self.derive(n_kv_heads=self.n_heads, ffn_dim=2 * self.dim)
        if self.n_kv_heads < 1 or self.n_heads % self.n_kv_heads:
            raise UsageError(f"--n-kv-heads {self.n_kv_heads} must divide --n-heads {self.n_heads}")
        if self.ffn_dim < 1 or self.window is not None and self.window < 1:
            raise UsageError("--ffn-dim and --window must be at least 1")
        if self.kv_latent_dim is not None and not 1 <= self.kv_latent_dim <= self.dim:
            raise UsageError(
                f"--kv-latent-dim is {self.kv_latent_dim}; it must be at least 1 and at most --dim {self.dim}"
            )


SIZES: dict[str, dict[str, Any]] = {
    "nano": dict(dim=128, n_layers=4, n_heads=4, ffn_dim=224, seq_len=256),
    "tiny": dict(dim=384, n_layers=6, n_heads=6, seq_len=256),
    "small": dict(dim=640, n_layers=6, n_heads=10, seq_len=1024),
    "base": dict(dim=768, n_layers=18, n_heads=6, seq_len=1024),
    "large": dict(dim=1280, n_layers=18, n_heads=10, seq_len=1024),
    "xl": dict(dim=2048, n_layers=20, n_heads=16, seq_len=1024),
}


class AveragedKeyCache(KVCache):
    """Averaged keys and values as attention reads them, and the running sums (L, B, G, K), float32, they go on from.

    Nothing more is kept per position: a sum over j positions is j² times the average stored there. `truncate` takes it
    from there where a row gets shorter, exact to the rounding of one key in the cache's type.
    """

    def __init__(self, config: Config, batch_size: int, max_seq_len: int, device: torch.device, dtype: torch.dtype):
        head_dim = config.dim // config.n_heads
        super().__init__((config.n_layers, batch_size, config.n_kv_heads, max_seq_len, head_dim), device, dtype)
        self.window = config.window
        self.sums = torch.zeros(config.n_layers, batch_size, config.n_kv_heads, head_dim, device=device)

    def truncate(self, lengths: Tensor | int) -> Self:
        """As in KVCache; the sums of shorter rows come from the averages stored there."""
        before = self.lengths.clone()
        super().truncate(lengths)
        newest = (self.lengths - 1).clamp(min=0)[:, None, None, None].expand_as(self.keys[:, :, :, :1])
        averages = self.keys.gather(3, newest).squeeze(3).float()  # (L, B, G, K)
        sums = averages * self.lengths[:, None, None].float().square()
        self.sums.copy_(torch.where((self.lengths < before)[:, None, None], sums, self.sums))
        return self

    def repeat(self, n: int) -> Self:
        """As in KVCache, with the sums."""
        self.sums = self.sums.repeat_interleave(n, dim=1)
        return super().repeat(n)

    def take(self, rows: Tensor) -> Self:
        """As in KVCache, with the sums."""
        self.sums = self.sums[:, rows]
        return super().take(rows)

    def reset(self) -> Self:
        """As in KVCache, with the sums."""
        self.sums.zero_()
        return super().reset()

    def put(self, rows: Tensor, other: Self) -> Self:
        """As in KVCache, with the sums."""
        self.sums[:, rows] = other.sums
        return super().put(rows, other)

    @property
    def n_bytes(self) -> int:
        """Bytes held by keys, values and sums."""
        return super().n_bytes + self.sums.numel() * self.sums.element_size()


class DynamicTanh(nn.Module):
    """gain · tanh(x), or gain · tanh(alpha · x) + bias as in the paper (`learn_alpha`). No statistics.

    Multiplied by its parameters in float32.
    """

    def __init__(self, dim: int, learn_alpha: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.alpha = nn.Parameter(torch.full((1,), 0.5)) if learn_alpha else None  # 0.5: the paper's default
        self.bias = nn.Parameter(torch.zeros(dim)) if learn_alpha else None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) to the same, in its dtype."""
        if self.alpha is None or self.bias is None:
            return (self.weight * torch.tanh(x)).to(x.dtype)
        return (self.weight * torch.tanh((self.alpha * x).to(x.dtype)) + self.bias).to(x.dtype)


class Biased(nn.Module):
    """A linear layer and the bias that the project's linear layers go without."""

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self.linear = linear
        self.bias = nn.Parameter(torch.zeros(linear.out_features))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """As the linear layer, plus the bias."""
        y, bias = self.linear(x), self.bias.to(x.dtype)
        if isinstance(y, Tensor):
            return y + bias
        return tuple(part + b for part, b in zip(y, bias.split([part.shape[-1] for part in y]), strict=True))

    def linear_head(self) -> LinearHead | None:
        """The layer as a head that the fused loss takes; None where it is not linear."""
        linear = as_linear_head(self.linear)
        return None if linear is None else replace(linear, bias=self.bias)


def projection(config: Config, in_features: int, *splits: int) -> nn.Module:
    """A linear layer, packed where there are several `splits`, with a bias if `config` wants one."""
    linear = PackedLinear(in_features, splits) if len(splits) > 1 else Linear(in_features, splits[0])
    return Biased(linear) if config.bias else linear


def grouped_projections(layer: nn.Module, x: Tensor, *counts: int) -> tuple[Tensor, ...]:
    """What a packed layer computes, in GEMMs that make `counts` of its parts each.

    Gates in one GEMM with keys would leave rows that no kernel can load in wide pieces, and gradients of wide parts
    would be copied together for a GEMM of theirs. Only a plain packed layer can be told.
    """
    if type(layer) is not PackedLinear or layer.lora_a is not None:
        return layer(x)
    splits = iter(layer.splits)
    widths = [list(islice(splits, n)) for n in counts]
    matrices = layer.matrix(x.dtype).split([sum(each) for each in widths])
    parts = (linear(x, matrix).split(each, dim=-1) for matrix, each in zip(matrices, widths, strict=True))
    return tuple(chain.from_iterable(parts))


class Attention(nn.Module):
    """Causal attention to averaged keys: with positions j = 1, 2, … and gates r = tanh(.), one per key head,
    K_j = 1/j² · Σ_{m≤j} m · r_m · k_m. Values are not averaged."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.layer, self.window, self.dropout = layer, config.window, config.dropout
        self.head_dim = config.dim // config.n_heads
        kv_dim = config.n_kv_heads * self.head_dim
        self.qkvg = projection(config, config.dim, config.dim, kv_dim, kv_dim, config.n_kv_heads)
        self.out = projection(config, config.dim, config.dim)
        self.scale = (self.head_dim if config.head_scale else config.dim) ** -0.5  # the original divides by sqrt(D)

    def gates(self, x: Tensor) -> Tensor:
        """The gates of x (B, T, D), (B, T, G), float32."""
        return torch.tanh(self.qkvg(x)[-1].float())

    def forward(self, x: Tensor, counts: Tensor, cache: AveragedKeyCache | None) -> Tensor:
        """x (B, T, D) to the same; `counts` (T, 1) or (B, T, 1) are positions from 1."""
        B, T, D = x.shape
        q, k, v, gate = grouped_projections(self.qkvg, x, 3, 1)
        q, k, v = (y.view(B, T, -1, self.head_dim) for y in (q, k, v))  # (B, T, H or G, K)
        share = counts * torch.tanh(gate.float())  # (B, T, G), float32, and so are the sums
        if cache is None:
            k = averaged_keys(k, share, counts)  # (B, T, G, K)
        else:
            sums = weighted_sums(k, share) + cache.sums[self.layer].unsqueeze(1)
            cache.sums[self.layer] = sums[:, -1]
            k = averages(sums, counts).to(x.dtype)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # (B, H or G, T, K)
        how = dict(scale=self.scale, dropout=self.dropout if self.training else 0.0)
        return self.out(recent_attention(q, k, v, cache, self.layer, self.window, **how))


class LatentAttention(nn.Module):
    """`Attention` whose keys and values rise from one latent of a token. There is a gate for each key head as ever:
    averages of risen keys are what rises from averages of latents, but one gate for a latent would be one for all
    heads. Training and the first fill of a cache write keys and values out; see `layers.latent_attention`."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        assert config.kv_latent_dim is not None
        self.layer, self.window, self.dropout = layer, config.window, config.dropout
        self.head_dim, self.n_kv_heads = config.dim // config.n_heads, config.n_kv_heads
        kv_dim = config.n_kv_heads * self.head_dim
        self.qcg = projection(config, config.dim, config.dim, config.kv_latent_dim, config.n_kv_heads)
        self.rise = projection(config, config.kv_latent_dim, kv_dim, kv_dim)
        self.out = projection(config, config.dim, config.dim)
        self.scale = (self.head_dim if config.head_scale else config.dim) ** -0.5

    def gates(self, x: Tensor) -> Tensor:
        """As in Attention."""
        return torch.tanh(self.qcg(x)[-1].float())

    def forward(self, x: Tensor, counts: Tensor, cache: LatentCache | None) -> Tensor:
        """As in Attention."""
        B, T, D = x.shape
        q, c, gate = grouped_projections(self.qcg, x, 2, 1)
        q = q.view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H, T, K)
        gate = torch.tanh(gate.float())  # (B, T, G)
        if cache is not None:
            (stored,) = cache.extend(self.layer, torch.cat((c, gate.to(c.dtype)), dim=-1).unsqueeze(1))
            if not cache.is_causal(T):
                return self.out(self._absorbed(q, stored, cache.mask(T)))
        k, v = (y.view(B, T, -1, self.head_dim) for y in self.rise(c))  # (B, T, G, K)
        k = averaged_keys(k, counts * gate, counts)
        how = dict(scale=self.scale, dropout=self.dropout if self.training else 0.0)
        return self.out(recent_attention(q, k.transpose(1, 2), v.transpose(1, 2), None, self.layer, self.window, **how))

    def _absorbed(self, q: Tensor, stored: Tensor, mask: Tensor | None) -> Tensor:
        rise, bias = matrix_of(self.rise, q.dtype), getattr(self.rise, "bias", None)
        k_rise, v_rise = rise.view(2, self.n_kv_heads, self.head_dim, -1)  # (G, K, R) each
        k_bias, v_bias = (
            rise.new_zeros(2, *k_rise.shape[:2]) if bias is None else bias.to(q.dtype).view(2, *k_rise.shape[:2])
        )
        y = latent_attention(q, stored, k_rise, v_rise, k_bias, mask, self.scale)
        return y if bias is None else y + v_bias.repeat_interleave(q.shape[1] // len(v_bias), 0).flatten()


def matrix_of(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """The matrix that a linear layer multiplies with, with what an adapter adds, of codes or not."""
    linear = layer.linear if isinstance(layer, Biased) else layer
    if isinstance(linear, QuantizedMatrix):
        return linear.matrix().to(dtype)
    assert isinstance(linear, Linear)
    return linear.matrix(dtype) + linear.adapter_delta().to(dtype) if linear.has_adapter else linear.matrix(dtype)


def recent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: AveragedKeyCache | None,
    layer: int,
    window: int | None,
    *,
    scale: float,
    dropout: float,
) -> Tensor:
    """`causal_attention` to the newest `window` positions, or to all."""
    T = q.shape[2]
    is_first = cache is None or cache.is_causal(T)
    if window is None or window >= T or not is_first:
        return causal_attention(q, k, v, cache, layer, scale=scale, dropout=dropout)
    if cache is not None:
        cache.update(layer, k, v)
    return windowed_attention(q, k, v, window, scale=scale, dropout=dropout)


def windowed_attention(q: Tensor, k: Tensor, v: Tensor, window: int, *, scale: float, dropout: float) -> Tensor:
    """Attention of q (B, H, T, K) to the newest `window` < T positions of k, v (B, G, T, K), its own included; returns
    (B, T, H·K).

    In blocks of `window` queries, each over its own block and the one before: 2 · T · window scores, half of them
    masked, instead of T²; with fused kernels two copies of the keys and values and one mask (window, 2 · window) are
    all the memory it takes. Beside plain causal attention, which skips what it masks, that pays for windows well below
    T / 4.
    """
    B, H, T, K = q.shape
    if k.shape[1] != H:  # not every fused kernel takes groups and a mask at once
        k, v = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))
    q, k, v = (F.pad(x, (0, 0, 0, -T % window)).unflatten(2, (-1, window)) for x in (q, k, v))  # (B, H, N, window, K)
    first = F.scaled_dot_product_attention(q[:, :, 0], k[:, :, 0], v[:, :, 0], None, dropout, True, scale=scale)
    pairs = [torch.cat((x[:, :, :-1], x[:, :, 1:]), dim=3) for x in (k, v)]  # (B, H, N - 1, 2 · window, K)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q[:, :, 1:], *pairs))  # blocks beside the batch
    row = torch.arange(window, device=q.device)[:, None]
    column = torch.arange(2 * window, device=q.device)
    mask = (column > row) & (column <= row + window)
    rest = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale)
    rest = rest.unflatten(0, (B, -1)).transpose(1, 2).flatten(2, 3)  # (B, H, (N - 1) · window, K)
    y = torch.cat((first, rest), dim=2)[:, :, :T]
    return y.transpose(1, 2).reshape(B, T, H * K)


class MLP(nn.Module):
    """Three projections multiplied: sigmoid(gate) · gelu(inner) · value."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.up = projection(config, config.dim, config.ffn_dim, config.ffn_dim, config.ffn_dim)
        self.down = projection(config, config.ffn_dim, config.dim)
        self.dropout = config.dropout

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, D) to the same."""
        gate, inner, value = grouped_projections(
            self.up, x, *((3,) if x.shape[1] == 1 else (1, 1, 1))
        )  # (B, T, F) each
        return self.down(drop(F.gelu(inner) * torch.sigmoid(gate) * value, self.dropout, self.training))


class Block(nn.Module):
    """Both branches are squashed on their way in and on their way out."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.attention_norm = DynamicTanh(config.dim, config.dyt_alpha)
        self.attention = (Attention if config.kv_latent_dim is None else LatentAttention)(config, layer)
        self.attention_out_norm = DynamicTanh(config.dim, config.dyt_alpha)
        self.mlp_norm = DynamicTanh(config.dim, config.dyt_alpha)
        self.mlp = MLP(config)
        self.mlp_out_norm = DynamicTanh(config.dim, config.dyt_alpha)

    def forward(self, x: Tensor, counts: Tensor, cache: KVCache | None) -> Tensor:
        """x (B, T, D) to the same."""
        x = x + self.attention_out_norm(self.attention(self.attention_norm(x), counts, cache))
        return x + self.mlp_out_norm(self.mlp(self.mlp_norm(x)))


def positions_from_1(positions: Tensor) -> tuple[Tensor]:
    """Positions (T,) as the average divides by them: from 1, float32 (T, 1)."""
    return ((positions + 1).float().unsqueeze(-1),)


class Model(LanguageModel):
    """Embedding, blocks, a head of its own."""

    config: Config
    recipe = Recipe(lr_factor=1.5, muon_lr_factor=3.0, gpu_half_width=2100)  # measured: tests/bench/zoo.md

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = nn.Identity()
        self.head = projection(config, config.dim, config.vocab_size)
        self.init_weights()

    def init_weights(self) -> None:
        """N(0, 1) for the embedding, which no norm rescales; sqrt(4/3 / fan_in) for the feed-forward; torch's uniform
        ±1/sqrt(fan_in) for attention, head and all biases. The original's scales."""
        nn.init.normal_(self.embedding.weight)
        for name, module in self.named_modules():
            if isinstance(module, Linear) and ".mlp." in name:
                nn.init.kaiming_normal_(module.weight, a=0.5**0.5)
            elif isinstance(module, Biased):
                bound = module.linear.in_features**-0.5
                nn.init.uniform_(module.bias, -bound, bound)

    def trunk(self, input_ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """As in the base."""
        T = input_ids.shape[1]
        if cache is None:
            counts = positions_from_1(torch.arange(T, device=input_ids.device))[0]  # (T, 1)
        else:
            counts = cache.lookup(positions_from_1, T)[0]  # (T, 1) or (B, T, 1)
        x = self.embedding(input_ids).to(self.compute_dtype)  # (B, T, D)
        for block in self.blocks:
            x = block(x, counts, cache)
        if cache is not None:
            cache.advance(T)
        return self.norm(x)

    def insides(self, input_ids: Tensor) -> Insides:
        """As in the base, with what is N4's own."""
        return insides_of_n4(self, input_ids)

    def make_cache(self, batch_size: int, max_seq_len: int) -> KVCache:
        """As in the base."""
        config = self.config
        if config.kv_latent_dim is not None:
            shape = config.n_layers, batch_size, max_seq_len, config.kv_latent_dim + config.n_kv_heads
            return LatentCache(shape, self.device, self.compute_dtype, config.window)
        return AveragedKeyCache(self.config, batch_size, max_seq_len, self.device, self.compute_dtype)
