"""Neon: differential attention, and between attention and feed-forward a bank of functions or memories.

A decoder after Mistral (https://arxiv.org/abs/2310.06825): RMSNorm (https://arxiv.org/abs/1910.07467), rotary positions
(https://arxiv.org/abs/2104.09864), grouped queries (https://arxiv.org/abs/2305.13245), SwiGLU. A head's output is the
difference of two softmax maps (Differential Transformer, Ye et al. 2024, https://arxiv.org/abs/2410.05258).
`normalized` keeps weights and stream on the unit sphere (nGPT, Loshchilov et al. 2024,
https://arxiv.org/abs/2410.01131): Neon's README names it, its code never had it. (Weight decay has no effect on
matrices then.) The banks are described at `FunctionBank` and `Memory`; `linear-control` has one or two plain matrices
in their place, a control for their parameters. `bank_file` adds functions from a file of the user's to the learned ones
that all layers share: what Neon's README wishes for.

Parameters at the original's vocabulary of 32,000, of the original and of this:

    test    12,381,952    12,381,952        beam      368,352,256      368,352,256
    spark   49,887,744    49,887,744        arc     1,181,700,288    1,181,698,560
    glow   166,157,568   166,157,568        nova    2,750,040,000    2,750,035,968

`arc` and `nova` cannot run there, 20 and 24 heads not dividing their width; they have 24 and 32 here. Differs from the
original further: position p is rotated by p, not p // 2; both maps of a query read the two maps of one key head; the
lambda vectors of the differential feed-forward start small enough not to overflow; functions are chosen without noise
in evaluation. Variant `original` keeps the rotation, the pairing and the noise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnx_cli.errors import UsageError
from nnx_cli.kernels.dropout import dropout as drop
from nnx_cli.kernels.qkv_swiglu import rotate, turn
from nnx_cli.layers.attention import causal_attention
from nnx_cli.layers.differential_attention import Lambda, differential_attention, repeat_as_original
from nnx_cli.layers.function_bank import KINDS, FunctionBank, GumbelNoise
from nnx_cli.layers.insides import Insides
from nnx_cli.layers.kv_cache import KVCache
from nnx_cli.layers.linear import Linear, PackedLinear
from nnx_cli.layers.memory_slots import Memory
from nnx_cli.layers.norm import RMSNorm
from nnx_cli.layers.outside_functions import Outside, TokenCache, contexts_of
from nnx_cli.layers.rope import rotary_tables, tables_of
from nnx_cli.layers.unit_norm import Interpolation, ScaledHead, normalize_matrices, unit
from nnx_cli.models._bank_file import check_bank_file, load_functions
from nnx_cli.models._base import DERIVED, LanguageModel, ModelConfig, Recipe
from nnx_cli.models.insides.neon import insides as insides_of_neon

MAPS = {"expressive": 2, "constrained": 2, "off": 1}  # softmax maps of a head
BANKS = {  # what a decoder's layers have a number of, and how many by default
    "regular": (None, 0),
    "memory": ("memories", 64),
    "function": ("functions", 4),
    "linear-control": ("functions", 1),
}
LAMBDA_SPREAD = 0.08  # standard deviation of q·k at the start: 0.1**2 * sqrt(64), as in the paper's heads
WRITERS = (".attention.out.", ".mlp.down.", ".functions.", ".bank.0.", ".bank.1.")  # matrices with the stream's rows


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    """Shape of Neon."""

    n_kv_heads: int = DERIVED  # key-value heads; default as many as query heads
    ffn_dim: int = DERIVED  # width of the feed-forward; default 3 x dim
    rope_theta: float = 10_000.0  # base of the rotary frequencies
    norm_eps: float = 1e-6  # value added to the mean square in norms
    tie_embeddings: bool = True  # the head is the embedding, transposed
    diff_attention: str = "expressive"  # two maps of full width: expressive; of half width: constrained; one: off
    diff_mlp: bool = False  # the feed-forward is the difference of two
    paper_lambda: bool = False  # the first layer's lambda starts at 0.2, as in the paper, not at the second's 0.36
    decoder: str = "regular"  # kind of layer: regular, or with a sub-layer more: memory, function, linear-control
    n_global_functions: int = DERIVED  # functions that all layers share; default 4 (linear-control: 1)
    n_layer_functions: int = DERIVED  # functions of each layer's own; default 4 (linear-control: 1)
    n_global_memories: int = DERIVED  # memory slots that all layers share; default 64
    n_layer_memories: int = DERIVED  # memory slots of each layer's own; default 64
    bank_file: str | None = None  # file of yours with further functions, torch.nn.Modules; default none
    function_temperature: float = 1.0  # temperature of the random choice of functions in training
    function_min_temperature: float = 0.1  # temperature where annealing ends
    function_anneal_steps: int | None = None  # optimizer steps until then; default no annealing
    function_balance: float = 0.0  # weight of the loss that evens out the choice of functions; often 0.01
    normalized: bool = False  # unit weights and stream as in nGPT, no norms before sub-layers

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in (("diff_attention", MAPS), ("decoder", BANKS)):
            if getattr(self, name) not in choices:
                value, option = getattr(self, name), name.replace("_", "-")
                raise UsageError(f"--{option} is {value!r}; choose from {', '.join(choices)}")
        self.check_head_dim()
        if self.diff_attention == "constrained" and self.head_dim % 2:
            raise UsageError(
                f"--diff-attention constrained needs heads that halve: --dim {self.dim}, {self.n_heads} heads"
            )
        self.derive(n_kv_heads=self.n_heads, ffn_dim=3 * self.dim)
        if self.n_kv_heads < 1 or self.n_heads % self.n_kv_heads:
            raise UsageError(f"--n-kv-heads {self.n_kv_heads} must divide --n-heads {self.n_heads}")
        if self.ffn_dim < 1 or not self.rope_theta > 0 or not self.norm_eps > 0:
            raise UsageError("--ffn-dim must be at least 1, --rope-theta and --norm-eps above 0")
        if not self.function_min_temperature > 0 or not self.function_temperature > 0 or self.function_balance < 0:
            raise UsageError(
                "--function-temperature and --function-min-temperature must be above 0, --function-balance at least 0"
            )
        if self.function_anneal_steps is not None and self.function_anneal_steps < 1:
            raise UsageError(f"--function-anneal-steps is {self.function_anneal_steps}; it must be at least 1")
        self.count_banks()
        if self.bank_file is not None and self.decoder == "function":
            check_bank_file(self.bank_file)

    def code_file(self) -> str | None:
        """As in the base."""
        return self.bank_file

    def count_banks(self) -> None:
        """Fill in how many functions and memories there are. Raises UsageError where the decoder has no use for some,
        or needs one."""
        used, default = BANKS[self.decoder]
        for what in ("functions", "memories"):
            names = [f"n_{kind}_{what}" for kind in KINDS]
            for name in names:
                self.derive(**{name: default if what == used else 0})
                count, option = getattr(self, name), "--" + name.replace("_", "-")
                if count < 0:
                    raise UsageError(f"{option} is {count}; it must be at least 0")
                if count and what != used:
                    raise UsageError(f"{option} has no meaning with --decoder {self.decoder}")
            if what == used and not any(getattr(self, name) for name in names):
                raise UsageError(f"--decoder {self.decoder} needs {what}, of the layers or shared by them")

    def unread(self) -> dict[str, str]:
        """Fields that change nothing beside the values of others, each with the option that it needs."""
        found = {}
        if self.function_anneal_steps is None:
            found["function_min_temperature"] = "--function-anneal-steps"
        if self.decoder != "function":
            names = ("temperature", "min_temperature", "anneal_steps", "balance")
            found |= dict.fromkeys(("bank_file", *(f"function_{name}" for name in names)), "--decoder function")
        if self.diff_attention == "off" and not self.diff_mlp:
            found["paper_lambda"] = "--diff-attention expressive"
        if self.normalized:
            found["norm_eps"] = "--no-normalized"
        return found

    @property
    def n_maps(self) -> int:
        """Softmax maps of a head."""
        return MAPS[self.diff_attention]

    @property
    def head_dim(self) -> int:
        """Width of the queries and keys of one map; values are `n_maps` times as wide."""
        return self.dim // self.n_heads // (2 if self.diff_attention == "constrained" else 1)

    def lambda_init(self, device: torch.device) -> Tensor:
        """Where the lambda of every layer starts, (L,). The paper counts layers from 0, the original starts with 1."""
        numbers = torch.arange(self.n_layers, device=device) + (0 if self.paper_lambda else 1)
        return 0.8 - 0.6 * torch.exp(-0.3 * numbers)


SIZES: dict[str, dict[str, Any]] = {
    "nano": dict(dim=128, n_layers=3, n_heads=4, ffn_dim=320, seq_len=256),
    "test": dict(dim=256, n_layers=4, n_heads=4, ffn_dim=680, seq_len=128),
    "tiny": dict(dim=320, n_layers=6, n_heads=5, seq_len=256),
    "small": dict(dim=512, n_layers=7, n_heads=8, ffn_dim=1408, seq_len=1024),
    "spark": dict(dim=512, n_layers=8, n_heads=4, ffn_dim=1360, seq_len=2048),
    "base": dict(dim=768, n_layers=12, n_heads=12, seq_len=1024),
    "glow": dict(dim=768, n_layers=12, n_heads=12, ffn_dim=3072, seq_len=2048),
    "beam": dict(dim=1024, n_layers=16, n_heads=16, ffn_dim=4096, seq_len=2048),
    "large": dict(dim=1024, n_layers=20, n_heads=16, seq_len=1024),
    "xl": dict(dim=1536, n_layers=25, n_heads=24, seq_len=1024),
    "arc": dict(dim=1536, n_layers=24, n_heads=24, ffn_dim=6144, seq_len=2048),
    "nova": dict(dim=2048, n_layers=32, n_heads=32, ffn_dim=8192, seq_len=2048),
}


class Attention(nn.Module):
    """Differential attention, normalised head by head; with one map, plain attention."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.layer, self.n_heads, self.dropout = layer, config.n_heads, config.dropout
        self.n_maps, self.head_dim, self.scale = config.n_maps, config.head_dim, config.head_dim**-0.5
        inner, kv_dim = (heads * config.n_maps * config.head_dim for heads in (config.n_heads, config.n_kv_heads))
        self.qkv = PackedLinear(config.dim, (inner, kv_dim, kv_dim))
        self.out = Linear(inner, config.dim)
        self.mixed_pairs = config.variant == "original" and config.n_kv_heads < config.n_heads
        self.lambda_ = self.qk_scale = None
        if config.n_maps == 2:
            self.lambda_ = Lambda(config.head_dim, std=0.1)
            self.norm = RMSNorm(2 * config.head_dim, eps=1e-5)
        self.normalized = config.normalized
        if config.normalized:
            self.qk_scale = nn.Parameter(torch.full((config.n_maps * config.head_dim,), config.dim**-0.5))
            self.qk_gain, self.scale = config.dim**0.5, config.head_dim**0.5

    def forward(self, x: Tensor, tables: Sequence[Tensor], start: Tensor, cache: KVCache | None) -> Tensor:
        """x (B, T, D) to the same; `start` is the layer's `lambda_init`, a tensor so that all layers share their
        code."""
        B, T, D = x.shape
        M, K = self.n_maps, self.head_dim
        q, k, v = (y.view(B, T, -1, M * K).transpose(1, 2) for y in self.qkv(x))  # (B, H or G, T, M·K)
        turned = rotate if cache is None else turn
        q, k = (turned(y.unflatten(-1, (M, K)), *tables) for y in (q, k))  # (B, H or G, T, M, K)
        if self.qk_scale is not None:
            gain = self.qk_scale.view(M, K) * self.qk_gain
            q, k = ((unit(y) * gain).to(x.dtype) for y in (q, k))
        if self.mixed_pairs:
            k, v = repeat_as_original(k, v, self.n_heads)
        options = dict(scale=self.scale, dropout=self.dropout if self.training else 0.0)
        if self.lambda_ is None:
            return self.out(causal_attention(q.flatten(-2), k.flatten(-2), v, cache, self.layer, **options))
        y = differential_attention(q, k, v, self.lambda_(start), cache, self.layer, **options)  # (B, T, H, 2K)
        y = self.norm(y)
        return self.out((y if self.normalized else y * (1 - start).to(y.dtype)).flatten(-2))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, https://arxiv.org/abs/2002.05202); with `diff_mlp` the difference of two, normalised."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        n_streams = 2 if config.diff_mlp else 1
        self.gate_up = PackedLinear(config.dim, (config.ffn_dim,) * 2 * n_streams)  # gate, up, gate, up
        self.down = Linear(config.ffn_dim, config.dim)
        self.dropout = config.dropout
        self.lambda_ = self.norm = self.scale = None
        if config.diff_mlp:
            self.lambda_ = Lambda(config.ffn_dim, std=(LAMBDA_SPREAD / config.ffn_dim**0.5) ** 0.5)
            if not config.normalized:
                self.norm = nn.LayerNorm(config.dim, eps=1e-5)
        if config.normalized:
            self.scale = nn.Parameter(torch.ones(2 * n_streams * config.ffn_dim))
            self.gains = (config.dim**0.5, 1.0)  # of gate and up

    def forward(self, x: Tensor, start: Tensor) -> Tensor:
        """x (B, T, D) to the same; `start` is the layer's `lambda_init`."""
        parts = self.gate_up(x)  # (B, T, F) each
        if self.scale is not None:
            scales = zip(parts, self.scale.chunk(len(parts)), cycle(self.gains), strict=False)
            parts = [part * (scale * gain).to(x.dtype) for part, scale, gain in scales]
        y = F.silu(parts[0]) * parts[1]
        if self.lambda_ is not None:
            y = y - self.lambda_(start) * (F.silu(parts[2]) * parts[3])
        y = self.down(drop(y, self.dropout, self.training))
        return y if self.norm is None else (self.norm(y.float()) * (1 - start)).to(x.dtype)


class Sum(nn.Module):
    """The residual stream x plus a sub-layer's output u."""

    def forward(self, x: Tensor, u: Tensor) -> Tensor:
        """x + u."""
        return x + u


class Block(nn.Module):
    """Attention, a bank where the decoder has one, feed-forward."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        dim = config.dim
        self.attention_norm, self.attention, self.attention_join = norm(config), Attention(config, layer), join(config)
        self.bank: nn.Module | None = None
        if config.decoder == "function":
            self.bank = FunctionBank(
                dim, config.n_global_functions, config.n_layer_functions, balanced=config.function_balance > 0
            )
        elif config.decoder == "memory":
            self.bank = Memory(dim, config.n_global_memories, config.n_layer_memories)
        elif config.decoder == "linear-control":
            kinds = (config.n_global_functions, config.n_layer_functions)
            self.bank = nn.Sequential(*(Linear(dim, dim) for n in kinds if n))
        if self.bank is not None:
            self.bank_norm, self.bank_join = norm(config), join(config)
            self.adds_input = config.decoder != "linear-control" and not config.normalized
        self.mlp_norm, self.mlp, self.mlp_join = norm(config), MLP(config), join(config)

    def forward(
        self, x: Tensor, tables: Sequence[Tensor], start: Tensor, cache: KVCache | None, **shared: Any
    ) -> Tensor:
        """x (B, T, D) to the same; `start` is where the layer's lambda starts; `shared` is what the bank is given
        besides its input."""
        x = self.attention_join(x, self.attention(self.attention_norm(x), tables, start, cache))
        if self.bank is not None:
            h = self.bank_norm(x)
            u = self.bank(h, **shared)
            x = self.bank_join(x, h + u if self.adds_input else u)
        return self.mlp_join(x, self.mlp(self.mlp_norm(x), start))


def norm(config: Config) -> nn.Module:
    """The norm before a sub-layer: none on the unit sphere."""
    return nn.Identity() if config.normalized else RMSNorm(config.dim, config.norm_eps)


def join(config: Config) -> nn.Module:
    """How a sub-layer's output joins the residual stream."""
    return Interpolation(config.dim) if config.normalized else Sum()


class Model(LanguageModel):
    """Embedding, blocks, functions or memories that all layers share, a last norm, a head."""

    config: Config
    head: ScaledHead | Linear
    recipe = Recipe(lr_factor=0.5, gpu_half_width=3500)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.functions = self.memories = None
        self.outside: Any = None  # functions from a file, in a ModuleList
        if config.decoder == "function":
            self.functions = nn.ModuleList(Linear(config.dim, config.dim) for _ in range(config.n_global_functions))
            self.noise = GumbelNoise(
                config.function_temperature, config.function_min_temperature, config.function_anneal_steps
            )
        if config.n_global_memories:
            self.memories = nn.Parameter(torch.zeros(config.n_global_memories, config.dim))
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = norm(config)
        self.head = (ScaledHead if config.normalized else Linear)(config.dim, config.vocab_size)
        matrix = self.head.linear if isinstance(self.head, ScaledHead) else self.head
        if config.tie_embeddings:
            matrix.weight = self.embedding.weight
        self.syncs_in_eval = config.decoder == "function"  # every function takes the rows that chose it
        self.init_weights()
        if config.bank_file is not None and config.decoder == "function":
            self.add_outside(config.bank_file)

    def add_outside(self, path: str) -> None:
        """Let tokens choose among the functions of a file too."""
        config = self.config
        outside = load_functions(path, dim=config.dim, vocab_size=config.vocab_size, seq_len=config.seq_len)
        self.capturable = False
        for _, bank in self.banks():
            sizes = (config.n_global_functions + len(outside), config.n_layer_functions)
            bank.scorer = PackedLinear(config.dim, sizes)
            nn.init.normal_(bank.scorer.weight, std=0.02)
        self.outside = outside
        if config.normalized:
            self.normalize_weights()

    def init_weights(self) -> None:
        """N(0, 0.02) for matrices, as in the original; lambda vectors so that both exponents start near 0 ± 0.08."""
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, Lambda):
                for vector in module.parameters():
                    nn.init.normal_(vector, std=module.std)
        if self.config.normalized:
            self.normalize_weights()

    def normalize_weights(self) -> None:
        """Unit length along the axis of the stream: columns where a matrix writes to it, rows where it reads."""
        normalize_matrices(
            (parameter, 0 if any(part in f".{name}" for part in WRITERS) else 1)
            for name, parameter in self.named_parameters()
            if parameter.dim() == 2 and ".lora_" not in name and not name.startswith("outside.")
        )

    @torch.no_grad()
    def post_optim_step(self) -> None:
        """Anneal the temperature of the choice of functions; put matrices back onto the sphere."""
        if self.config.decoder == "function":
            self.noise.post_optim_step()
        if self.config.normalized:
            self.normalize_weights()

    def trunk(self, input_ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """As in the base."""
        config = self.config
        tables = [table.unsqueeze(-2) for table in tables_of(self.rotary_tables, input_ids, cache)]  # for both maps
        x = self.embedding(input_ids)  # (B, T, D)
        x = (unit(x) if config.normalized else x).to(self.compute_dtype)
        starts = self.config.lambda_init(input_ids.device)
        for layer, block in enumerate(self.blocks):
            x = block(x, tables, starts[layer], cache, **self.shared(layer, input_ids, cache))
        if cache is not None:
            cache.advance(input_ids.shape[1])
        return self.norm(x)

    def rotary_tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of `positions`."""
        angles = positions // 2 if self.config.variant == "original" else positions
        return rotary_tables(angles, self.config.head_dim, self.config.rope_theta)

    def shared(self, layer: int, input_ids: Tensor, cache: KVCache | None) -> dict[str, Any]:
        """What a layer's bank is given besides its input: functions or memories of all layers, and noise."""
        if self.config.decoder == "memory":
            return {"slots": self.memories}
        if self.config.decoder == "function":
            return {"functions": self.functions} | self.drawn(layer, input_ids, cache)
        return {}

    def drawn(self, layer: int, input_ids: Tensor, cache: KVCache | None) -> dict[str, Any]:
        """Noise and temperature of the choice of functions, and those from outside with what they may ask for."""
        draws = self.training or self.config.variant == "original"
        B, T = input_ids.shape
        positions = torch.arange(T, device=input_ids.device) if cache is None else cache.positions(T)
        noise = self.noise(layer, self.bank_sizes(), B, positions) if draws else None
        given = {"noise": noise, "temperature": self.noise.temperature()}
        if self.outside is None:
            return given
        length = max(function.context for function in self.outside)
        return given | {"outside": Outside(self.outside, *contexts_of(input_ids, length, cache))}

    def bank_sizes(self) -> dict[str, int]:
        """Number of functions that a token chooses one of, by kind."""
        n_shared = self.config.n_global_functions + (0 if self.outside is None else len(self.outside))
        counts = zip(KINDS, (n_shared, self.config.n_layer_functions), strict=True)
        return {kind: n for kind, n in counts if n and self.config.decoder == "function"}

    def active_parameters(self) -> int:
        """Without the learned functions that no token uses: it takes one of a layer's own, and of the shared ones at
        most one in each layer."""
        config, sizes = self.config, self.bank_sizes()
        idle = config.n_layers * (sizes.get("layer", 1) - 1)
        idle += max(0, config.n_global_functions - config.n_layers) if sizes else 0
        return super().active_parameters() - idle * config.dim**2

    def set_noise(self, noise: Mapping[str, Tensor]) -> None:
        """As in the base: Gumbel noise of every bank, by LAYER/KIND."""
        wanted = {f"{layer}/{kind}" for layer in range(self.config.n_layers) for kind in self.bank_sizes()}
        if not wanted:
            super().set_noise(noise)
        if odd := sorted(wanted ^ noise.keys()):
            raise UsageError(f"noise of this model is {', '.join(sorted(wanted))}; {odd[0]} does not match")
        self.noise.recorded = dict(noise)

    def banks(self) -> Iterator[tuple[int, FunctionBank]]:
        """Layers that choose among functions, and their banks."""
        for layer, block in enumerate(self.blocks):
            if isinstance(block.bank, FunctionBank):
                yield layer, block.bank

    def selection_counts(self) -> dict[str, Tensor]:
        """How many tokens of the latest forward pass chose each function, (n,) by "LAYER/KIND"."""
        return {f"{layer}/{kind}": counts for layer, bank in self.banks() for kind, counts in bank.counts.items()}

    def aux_loss(self) -> Tensor | None:
        """Mean balance loss of all banks, 1 where every function is chosen equally often, times its weight."""
        if not self.config.function_balance or self.config.decoder != "function":
            return None
        losses = [loss for _, bank in self.banks() for loss in bank.balance]
        return self.config.function_balance * torch.stack(losses).mean() if losses else None

    def insides(self, input_ids: Tensor) -> Insides:
        """As in the base, with what is Neon's own."""
        return insides_of_neon(self, input_ids)

    def make_cache(self, batch_size: int, max_seq_len: int) -> KVCache:
        """As in the base."""
        config = self.config
        n_heads = config.n_heads if config.variant == "original" else config.n_kv_heads
        shape = (config.n_layers, batch_size, n_heads, max_seq_len, config.n_maps * config.head_dim)
        kind = KVCache if self.outside is None else TokenCache
        return kind(shape, self.device, self.compute_dtype)
