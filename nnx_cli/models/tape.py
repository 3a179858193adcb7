"""Tape: a coda whose two streams meet in a soft XOR, a recurrent prophet, and critics that read both.

Function, in the order data passes: embeddings e; the coda, levels of self-attention in a left and a right stream that
are merged by the two-argument soft XOR (Yoon et al. 2021, https://arxiv.org/abs/2110.06871); the prophet, a two-layer
recurrent network on e; critics in sequence, each starting from the coda's output and reading what the critic before it
said, the last one being the moderator; distances under a Student-t kernel in place of a linear head (after the
harmonic loss, Baek et al. 2025, https://arxiv.org/abs/2502.01628), so that `forward` returns log-probabilities.
Positions are absolute: a sinusoid is added to a level's tokens and the sum is rotated as in RoPE (Su et al. 2021,
https://arxiv.org/abs/2104.09864), before the projections. Blocks are post-norm. `entropy_weight` rewards attention for
entropy (Attanasio et al. 2022, https://arxiv.org/abs/2203.09192). Each part can be left out, to see what it brings:
`n_critics` 0 predicts from the coda, `prophet` and `moderator` are switches, and `tails` makes the kernel's degrees of
freedom a parameter, or takes its limit for infinitely many: a normal distribution around every centre.

Variants:

- `tape` (default): every level but the very first, which has its tokens alone, attends causally to three segments: the
  previous embedding (the prophet's in the first level of a critic, else the level's own again), the level's embedded
  tokens and the hidden state, which also asks.
- `sound`: the original with a causal mask. It cuts two of the three segments off again, so that no critic reads
  anything but the coda: critics before the last, and the prophet, cannot influence the output and are left out here.
- `original`: the same without the mask, as the original trains. With a cache it is causal, as its sampling is.

The original's author publishes 49,879,553 parameters for vocabulary 65, dim 256 and 4 critics, a figure of an earlier
revision; the present one has 49,862,913, of which 49,337,088 are those of `tape` here, 15,811,072 those of `sound`; the
rest is six modules that are never called. Differs from the original besides: positions count on while decoding, widths
and depths are options, the head is always computed in float32. Kept: the embedding is drawn from N(0, 1), the head's
centres by the vocabulary's size instead of the width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnx_cli.errors import UsageError
from nnx_cli.kernels.dropout import dropout as drop
from nnx_cli.kernels.precision import widened
from nnx_cli.kernels.soft_xor import Activation, recurrence, soft_xor
from nnx_cli.layers.head import LinearHead
from nnx_cli.layers.insides import Insides
from nnx_cli.layers.kv_cache import KVCache
from nnx_cli.layers.linear import Linear
from nnx_cli.layers.norm import LayerNorm
from nnx_cli.layers.rope import rotary_tables
from nnx_cli.layers.segment_attention import attend, attention_entropy
from nnx_cli.models._base import DERIVED, MAX_LAYERS, LanguageModel, ModelConfig, Recipe
from nnx_cli.models.insides.tape import insides as insides_of_tape

TAILS = ("fixed", "learned", "normal")


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    """Shape of Tape."""

    dim: int = 256  # width of the residual stream
    n_layers: int = 4  # levels of a critic, each of two blocks side by side
    n_heads: int = 4  # query heads of a block
    variant: str = "tape"  # function computed: tape; sound, the original made causal; original
    coda_layers: int = 2  # levels of the coda
    n_critics: int = 2  # critics, one after the other; the last one is the moderator; 0: the coda predicts
    prophet: bool = True  # a recurrent network over the embeddings, which every critic reads
    moderator: bool = True  # critics hear the one before, the last one decides; without: none does, their mean counts
    ffn_dim: int = DERIVED  # width of the feed-forward; default 8 x dim
    student_df: float = 2.718281828459  # degrees of freedom of the head's Student-t kernel: lower is heavier-tailed
    tails: str = "fixed"  # of that kernel: fixed; learned, from --student-df on; normal, the limit of infinite freedom
    entropy_weight: float = 0.0  # reward for the entropy of attention, in nats of loss per nat; 0: none

    VARIANTS: ClassVar[tuple[str, ...]] = ("tape", "sound", "original")
    LEAST: ClassVar[dict[str, int]] = {"n_critics": 0}

    def __post_init__(self) -> None:
        if self.student_df == math.inf:
            raise UsageError("--student-df is inf; it must be a finite number", fix="take its limit: --tails normal")
        super().__post_init__()
        if self.tails not in TAILS:
            raise UsageError(f"--tails is {self.tails!r}; choose from {', '.join(TAILS)}")
        self.check_head_dim(even=False)
        if self.dim % 2:
            raise UsageError(f"--dim is {self.dim}; it must be even: positions turn pairs of features")
        self.derive(ffn_dim=8 * self.dim)
        if self.ffn_dim < 1 or not self.student_df > 0 or self.entropy_weight < 0:
            raise UsageError("--ffn-dim must be at least 1, --student-df above 0, --entropy-weight at least 0")
        if self.coda_layers + self.n_critics * self.n_layers > MAX_LAYERS:
            raise UsageError(f"--coda-layers + --n-critics x --n-layers must be at most {MAX_LAYERS}")

    def unread(self) -> dict[str, str]:
        """Fields that change nothing beside the values of others, each with the option that it needs."""
        if self.variant != "tape":
            found = dict.fromkeys(("n_critics", "prophet", "moderator"), "--variant tape")
        elif self.n_critics == 0:
            found = dict.fromkeys(("n_layers", "prophet", "moderator"), "--n-critics 1 or more")
        else:
            found = {"moderator": "--n-critics 2 or more"} if self.n_critics == 1 else {}
        return found | ({"student_df": "--tails fixed or learned"} if self.tails == "normal" else {})

    @property
    def n_segments(self) -> int:
        """Segments that a level with a hidden state attends to."""
        return 3 if self.variant == "tape" else 1

    @property
    def live_critics(self) -> int:
        """Critics that the output depends on."""
        return self.n_critics if self.variant == "tape" else 1

    @property
    def has_prophet(self) -> bool:
        """Whether a critic reads a prophet."""
        return self.variant == "tape" and self.prophet and self.n_critics > 0


SIZES: dict[str, dict[str, Any]] = {
    "nano": dict(dim=64, n_heads=4, n_layers=1, n_critics=2, seq_len=256),
    "tiny": dict(dim=192, n_heads=6, n_layers=2, n_critics=2, ffn_dim=1664, seq_len=256),
    "small": dict(dim=320, n_heads=5, n_layers=2, n_critics=2, ffn_dim=2816, seq_len=1024),
    "base": dict(dim=512, n_heads=8, n_layers=3, n_critics=3, seq_len=1024),
    "large": dict(dim=768, n_heads=12, n_layers=4, n_critics=3, seq_len=1024),
    "xl": dict(dim=1152, n_heads=18, n_layers=4, n_critics=4, seq_len=1024),
}


class Affine(nn.Module):
    """A `Linear` and a bias."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.linear = Linear(in_features, out_features)
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: Tensor) -> Tensor:
        """x @ weight.T + bias."""
        return self.linear(x) + self.bias.to(x.dtype)


class BiasedLayerNorm(LayerNorm):
    """Layer normalisation with gain and bias, in float32."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D), normalised over its last axis, in its own dtype."""
        y = F.layer_norm(x.float(), self.weight.shape, self.weight.float(), self.bias.float(), self.eps)
        return y.to(x.dtype)


def embed_positions(tokens: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Add the sinusoid to `tokens` (B, T, D) and turn every pair of neighbouring features by its angle, in float32.

    cos and sin are (T, D/2) or (B, T, D/2), and serve both, whose frequencies are the same.
    """
    even, odd = tokens.float().unflatten(-1, (-1, 2)).unbind(-1)  # (B, T, D/2) each
    even, odd = even + sin, odd + cos
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(tokens.dtype)


class Stream(nn.Module):
    """What a block does after attention: x = norm(x + attention), x = norm(x + mlp(x))."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.out = Affine(config.dim, config.dim)
        self.attention_norm = BiasedLayerNorm(config.dim)
        self.up = Affine(config.dim, config.ffn_dim)
        self.down = Linear(config.ffn_dim, config.dim)
        self.mlp_norm = BiasedLayerNorm(config.dim)
        self.dropout = config.dropout

    def forward(self, x: Tensor, attended: Tensor) -> Tensor:
        """x and what attention read, (B, T, D) each, to the same shape."""
        x = self.attention_norm(x + self.out(attended))
        hidden = Activation.apply(self.up(x))  # (B, T, F)
        return self.mlp_norm(x + drop(self.down(hidden), self.dropout, self.training))


class Level(nn.Module):
    """Two blocks side by side, which read the same and project it in one GEMM; their outputs are merged."""

    def __init__(self, config: Config, layer: int, is_critic: bool) -> None:
        super().__init__()
        self.config, self.is_critic = config, is_critic
        self.is_first, self.row = layer == 0, max(0, layer - 1)  # which store of a cache, and where in it
        self.q = Affine(config.dim, 2 * config.dim)  # left, right
        self.kv = Affine(config.dim, 4 * config.dim)  # keys left, right, values left, right
        self.left, self.right = Stream(config), Stream(config)

    def forward(
        self, tokens: Tensor, h: Tensor | None, previous: Tensor | None, cache: TapeCache | None
    ) -> tuple[Tensor, Tensor | None]:
        """`tokens` with positions, hidden state, previous embedding (None: the tokens again), (B, T, D) each.

        Returns the new hidden state, and the entropy of attention where training rewards it.
        """
        config = self.config
        B, T, D = tokens.shape
        x, segments = tokens, [tokens]
        times: tuple[int, ...] = (1,)
        if h is not None:
            x = h
            if config.n_segments == 1:
                segments = [h]
            elif previous is None:
                segments, times = [tokens, h], (2, 1)
            else:
                segments, times = [previous, tokens, h], (1, 1, 1)
        kv = self.kv(torch.stack(segments)).unflatten(-1, (2, 2 * config.n_heads, -1))  # (G, B, T, 2, 2 H, K)
        q = self.q(x).view(B, T, 2 * config.n_heads, -1)  # (B, T, 2 H, K)
        store = None if cache is None else cache.first if self.is_first else cache.others
        causal, dropout = config.variant != "original", config.dropout if self.training else 0.0
        y = attend(q, kv, times, store, self.row, causal=causal, dropout=dropout)
        y_left, y_right = y.reshape(B, T, 2, D).unbind(2)
        left, right = self.left(x, y_left), self.right(x, y_right)
        if self.is_critic:
            merged = right + (left - right) * torch.sigmoid(left - right)  # softmax over the pair, of each feature
        else:
            merged = soft_xor(torch.sigmoid(left), torch.sigmoid(right))
        rewarded = self.training and config.entropy_weight > 0
        return merged, attention_entropy(q, kv, times, causal) if rewarded else None


class ProphetLayer(nn.Module):
    """Left and right cell, stacked. The recurrent matrix is no `Linear`: its errors would feed on themselves, so it is
    computed with in floating point, and in 8 bits at least where it is stored."""

    stores_int8 = True

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.input = Affine(in_dim, 2 * dim)
        self.weight = nn.Parameter(torch.empty(2 * dim, dim))
        self.bias = nn.Parameter(torch.empty(2 * dim))

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        """x (T, B, D) and the first state (B, P) to the states (T, B, P)."""
        return recurrence(self.input(x) + self.bias.to(x.dtype), self.weight.to(x.dtype), state)


class Prophet(nn.Module):
    """Two recurrent layers of width P = 2 D over the embeddings, and a projection back."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.first, self.second = ProphetLayer(dim, 2 * dim), ProphetLayer(2 * dim, 2 * dim)
        self.out = Affine(2 * dim, dim)

    def forward(self, x: Tensor, cache: TapeCache | None) -> Tensor:
        """Embeddings (B, T, D) to the same shape; the states after every position go to the cache."""
        x = x.transpose(0, 1)  # (T, B, D): a step's elements lie together
        start = x.new_zeros(2, x.shape[1], 2 * x.shape[2]) if cache is None else cache.prophet_states()
        first = self.first(x, start[0])  # (T, B, P)
        second = self.second(first, start[1])
        if cache is not None:
            cache.prophet.update(0, *(states.transpose(0, 1)[:, None] for states in (first, second)))
        return self.out(second).transpose(0, 1)


class StudentT(nn.Module):
    """log p(v) ∝ −(ν + D)/2 · ln(1 + d²/ν), d the distance to the centre of v, or −d²/2, its limit for ν to infinity.
    In float32: half-precision distances would be nats off, for D multiplies their error."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.dim))
        self.df, self.is_normal = config.student_df, config.tails == "normal"
        self.log_df = nn.Parameter(torch.empty(1)) if config.tails == "learned" else None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) to log-probabilities (..., V). Of ln(1 + d²/ν) the smallest is taken off before it is rounded: its
        factor would make nats of it."""
        x, centres = widened(x), self.weight.to(torch.promote_types(x.dtype, torch.float32))
        if self.is_normal:  # without |x|², of which the softmax is independent
            return (F.linear(x, centres) - centres.square().sum(-1) / 2).log_softmax(-1)
        df = self.df if self.log_df is None else self.log_df.to(x.dtype).exp()
        beyond = centres.square().sum(-1) - 2 * F.linear(x, centres)  # d² but for |x|²
        least = beyond.amin(-1, keepdim=True)
        nearest = (x.square().sum(-1, keepdim=True) + least).clamp(min=1e-12)
        scores = torch.log1p((beyond - least) / (df + nearest)) * (-(df + x.shape[-1]) / 2)
        return scores.log_softmax(-1)  # (..., V)

    def linear_head(self) -> LinearHead | None:
        """The head as the fused loss takes it, which has no gradient for the degrees of freedom."""
        if self.log_df is not None:
            return None
        if self.is_normal:
            return LinearHead(weight=self.weight, bias=widened(self.weight).square().sum(1) / -2, wide=True)
        return LinearHead(weight=self.weight, df=self.df)


class TapeCache:
    """Keys and values of the first level, of all others with their segments side by side, and the prophet's states.

    The states of both of the prophet's layers are kept for every position, as if they were a key and a value, so that
    `truncate` finds them: 4 D elements a token, beside 4 D of the first level and 12 D of every other level (2 % at 18
    levels). Recomputing them instead would take a pass over the whole text.
    """

    def __init__(self, first: KVCache, others: KVCache, prophet: KVCache) -> None:
        self.first, self.others, self.prophet = self.stores = first, others, prophet

    @property
    def lengths(self) -> Tensor:
        """Positions that every row holds, (B,)."""
        return self.first.lengths

    @property
    def n_bytes(self) -> int:
        """Bytes held by keys, values and states."""
        return sum(store.n_bytes for store in self.stores)

    def prophet_states(self) -> Tensor:
        """The states after the last position of every row, (2, B, P); zero where there is none."""
        rows, last = torch.arange(self.lengths.shape[0], device=self.lengths.device), (self.lengths - 1).clamp(min=0)
        states = torch.stack([store[0, rows, 0, last] for store in (self.prophet.keys, self.prophet.values)])
        return states * (self.lengths > 0)[:, None]

    def advance(self, n_new: int) -> None:
        """Count `n_new` more positions in every row."""
        for store in self.stores:
            store.advance(n_new)

    def note_advance(self, n_new: int) -> None:
        """As in KVCache."""
        for store in self.stores:
            store.note_advance(n_new)

    @property
    def span(self) -> int | None:
        """As in KVCache."""
        return self.first.span

    @span.setter
    def span(self, value: int | None) -> None:
        for store in self.stores:
            store.span = value

    def truncate(self, lengths: Tensor | int) -> Self:
        """Forget what lies beyond `lengths`, (B,) or one number for all rows."""
        for store in self.stores:
            store.truncate(lengths)
        return self

    def repeat(self, n: int) -> Self:
        """Make `n` copies of every row, side by side: row b becomes rows b·n … b·n + n − 1."""
        for store in self.stores:
            store.repeat(n)
        return self

    def take(self, rows: Tensor) -> Self:
        """Keep these rows, in this order."""
        for store in self.stores:
            store.take(rows)
        return self

    def reset(self) -> Self:
        """Forget everything."""
        for store in self.stores:
            store.reset()
        return self

    def put(self, rows: Tensor, other: Self) -> Self:
        """Replace rows by those of another cache."""
        for store, new in zip(self.stores, other.stores, strict=True):
            store.put(rows, new)
        return self


class Model(LanguageModel):
    """Embedding, coda, critics and prophet, and a Student-t head."""

    config: Config
    recipe = Recipe(gpu_half_width=6100)
    head: StudentT

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        n_critic_levels = config.live_critics * config.n_layers
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.prophet = Prophet(config.dim) if config.has_prophet else None
        self.blocks = nn.ModuleList(
            Level(config, layer, is_critic=layer >= config.coda_layers)
            for layer in range(config.coda_layers + n_critic_levels)
        )
        self.norm = nn.Identity()  # levels end with one
        self.head = StudentT(config)
        self._entropy: Tensor | None = None
        self.init_weights()

    def init_weights(self) -> None:
        """As the original: embeddings N(0, 1), matrices uniform within ±1/sqrt(fan_in), attention's within Xavier's
        bound for query, key and value stacked and with zero biases, the head's centres within ±1/sqrt(V)."""
        config = self.config
        for module in self.modules():
            if isinstance(module, Affine):
                bound = module.linear.in_features**-0.5
                nn.init.uniform_(module.bias, -bound, bound)
            elif isinstance(module, ProphetLayer):
                bound = module.weight.shape[1] ** -0.5
                nn.init.uniform_(module.weight, -bound, bound)
                nn.init.uniform_(module.bias, -bound, bound)
        for level in self.blocks:
            assert isinstance(level, Level)
            bound = (6 / (4 * config.dim)) ** 0.5  # fan-in D, fan-out 3 D
            for affine in (level.q, level.kv):
                nn.init.uniform_(affine.linear.weight, -bound, bound)
            for affine in (level.q, level.kv, level.left.out, level.right.out):
                nn.init.zeros_(affine.bias)
        nn.init.uniform_(self.head.weight, -(config.vocab_size**-0.5), config.vocab_size**-0.5)
        if self.head.log_df is not None:
            nn.init.constant_(self.head.log_df, math.log(config.student_df))

    def trunk(self, input_ids: Tensor, cache: TapeCache | None = None) -> Tensor:
        """As in the base."""
        config, T = self.config, input_ids.shape[1]
        if cache is None:
            cos, sin = self.rotary_tables(torch.arange(T, device=input_ids.device))  # (T, D/2)
        else:
            cos, sin = cache.first.lookup(self.rotary_tables, T)  # (T, D/2) or (B, T, D/2)
        embedded = self.embedding(input_ids).to(self.compute_dtype)  # (B, T, D)
        prophecy = None if self.prophet is None else self.prophet(embedded, cache)
        tokens, h, entropies = embed_positions(embedded, cos, sin), None, []
        for level in self.blocks[: config.coda_layers]:
            h, entropy = level(tokens, h, None, cache)
            entropies.append(entropy)
        assert h is not None  # a coda has a level at least
        coda = h
        voices = []  # of critics whom nobody hears, but the last one's
        for number, level in enumerate(self.blocks[config.coda_layers :]):
            is_first = number % config.n_layers == 0
            if is_first and number > 0:  # the critic before has spoken
                if config.moderator:
                    tokens = embed_positions(h, cos, sin)
                else:
                    voices.append(h)
            h, entropy = level(tokens, coda if is_first else h, prophecy if is_first else None, cache)
            entropies.append(entropy)
        if not config.moderator:
            h = torch.stack([*voices, h]).mean(0)
        if cache is not None:
            cache.advance(T)
        self._entropy = None if entropies[0] is None else torch.stack(entropies).mean()
        return self.norm(h)

    def rotary_tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of `positions`."""
        return rotary_tables(positions, self.config.dim)

    def aux_loss(self) -> Tensor | None:
        """Minus the mean entropy of attention, weighted, where `entropy_weight` asks for it."""
        return None if self._entropy is None else -self.config.entropy_weight * self._entropy

    def insides(self, input_ids: Tensor) -> Insides:
        """As in the base, with what is Tape's own."""
        return insides_of_tape(self, input_ids)

    def make_cache(self, batch_size: int, max_seq_len: int) -> TapeCache:
        """As in the base."""
        config = self.config

        def store(n_layers: int, n_heads: int, width: int) -> KVCache:
            return KVCache((n_layers, batch_size, n_heads, max_seq_len, width), self.device, self.compute_dtype)

        H, K = 2 * config.n_heads, config.dim // config.n_heads
        return TapeCache(
            store(1, H, K),
            store(len(self.blocks) - 1, H, config.n_segments * K),
            store(0 if self.prophet is None else 1, 1, 2 * config.dim),
        )
