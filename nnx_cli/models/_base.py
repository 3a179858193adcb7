"""What every architecture promises to training, sampling and counting."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nnx_cli.config import typed
from nnx_cli.errors import UsageError
from nnx_cli.layers.insides import AttentionRecorder, Insides, maps_of
from nnx_cli.layers.kv_cache import Cache
from nnx_cli.layers.linear import Linear

MAX_WIDTH, MAX_LAYERS = 2**24, 1024  # beyond them not even the parameters can be counted
DERIVED: Any = None  # default of a field that `derive` fills in


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Fields that all architectures share. A field is an option of the command line and a key of `build()`."""

    vocab_size: int = 256  # number of token ids
    seq_len: int = 256  # context: positions a training sample has
    dim: int = 512  # width of the residual stream
    n_layers: int = 8  # number of blocks
    n_heads: int = 8  # query heads
    dropout: float = 0.0  # probability of dropping, in attention and feed-forward
    variant: str = "sound"  # function computed: sound, or original, with the original's defects

    VARIANTS: ClassVar[tuple[str, ...]] = ("sound", "original")
    LEAST: ClassVar[Mapping[str, int]] = {}  # least values of whole numbers, where they are not 1

    def __post_init__(self) -> None:
        if self.variant == "seed":  # its older name
            object.__setattr__(self, "variant", "original")
        for field in fields(self):
            value = getattr(self, field.name)
            least = self.LEAST.get(field.name, 1)
            if field.type == "int" and field.default is not None and value < least:
                raise UsageError(f"--{field.name.replace('_', '-')} is {typed(value)}; it must be at least {least}")
            most = MAX_LAYERS if field.name == "n_layers" else MAX_WIDTH
            if isinstance(value, int) and value > most:
                raise UsageError(f"--{field.name.replace('_', '-')} is {typed(value)}; it must be at most {most:,}")
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"--{field.name.replace('_', '-')} is {value}; it must be a finite number")
        if not 0.0 <= self.dropout < 1.0:
            raise UsageError(f"--dropout is {typed(self.dropout)}; it must be at least 0 and below 1")
        if self.variant not in self.VARIANTS:
            raise UsageError(f"--variant is {self.variant!r}; choose from {', '.join(self.VARIANTS)}")

    def derive(self, **values: Any) -> None:
        """Fill fields that were left `DERIVED` with values that follow from the others."""
        for name, value in values.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    def code_file(self) -> str | None:
        """A file of the user's that the model runs besides its architecture."""
        return None

    def unread(self) -> dict[str, str]:
        """Fields that change nothing beside the values of others, each with the option that it needs."""
        return {}

    def check_head_dim(self, *, even: bool = True) -> None:
        """Raise UsageError unless `n_heads` divides `dim`, into even widths where rotary pairs are of a head."""
        if self.dim % self.n_heads or even and self.dim // self.n_heads % 2:
            raise UsageError(
                f"--dim {self.dim} cannot be divided among --n-heads {self.n_heads}"
                + (" into heads of an even width" if even else ""),
                fix=f"take --dim {max(1, round(self.dim / self.n_heads / 16)) * 16 * self.n_heads}",
            )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How an architecture differs from the others in what it learns best from."""

    optimizer: str = "muon"  # where memory suffices and the text is not read too often
    lr_factor: float = 1.0  # on the learning rate that optimizer and width suggest
    muon_lr_factor: float = 1.0  # the same with Muon, which moves all matrices by the same share
    few_steps: int = 3000  # below which Muon's rate falls less with the width: tests/bench/zoo.md
    weight_decay: float = 0.1  # at least, with AdamW and Muon; 0: none
    warmup: bool = True
    gpu_half_width: int = 1000  # at which a GPU spends as long on all else as on matmuls: tests/bench/rates.md


class LanguageModel(nn.Module):
    """A causal language model: `forward` is `head(trunk(...))`.

    Subclasses set `embedding`, `blocks`, `norm` and `head`, and define `trunk` and `make_cache`. `head` is a module
    that maps (..., dim) to (..., vocab_size) and acts on every position alone, so that the loss may call it in pieces.
    """

    config: ModelConfig
    embedding: nn.Embedding
    blocks: nn.ModuleList
    norm: nn.Module
    head: nn.Module
    recipe = Recipe()
    ignore_index = -100  # a target that does not count; -100 is never a token
    syncs_in_eval = False  # whether a pass in evaluation mode synchronizes, so that no CUDA graph can hold it

    capturable = True  # whether CUDA graphs may hold training steps: nothing but tensors decides what they compute

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32  # type of the activations; weights keep their own

    def trunk(self, input_ids: Tensor, cache: Any = None) -> Tensor:
        """Token ids (B, T) to what the head reads, (B, T, D)."""
        raise TypeError(f"{self.architecture} defines no trunk")

    def make_cache(self, batch_size: int, max_seq_len: int) -> Cache:
        """An empty cache, or recurrent state, for `batch_size` rows of up to `max_seq_len` positions.

        One that has `snapshot` (a KVCache does) may be captured in a CUDA graph: it writes into the tensors it keeps.
        """
        raise TypeError(f"{self.architecture} defines no cache")

    def forward(self, input_ids: Tensor, cache: Any = None) -> Tensor:
        """Token ids (B, T) to logits (B, T, V); a cache is read, extended by T positions and left ready for more."""
        return self.head(self.trunk(input_ids, cache))

    def insides(self, input_ids: Tensor) -> Insides:
        """What the model does inside with a text (1, T), in evaluation mode and without gradients: where it attends, if
        it calls torch's `scaled_dot_product_attention`."""
        with AttentionRecorder(self.blocks) as recorder:
            self(input_ids)
        return Insides(*maps_of(recorder.passes, input_ids.shape[1]))

    def aux_loss(self) -> Tensor | None:
        """A loss per token to add to cross-entropy, of the latest forward pass; None where there is none."""
        return None

    def post_optim_step(self) -> None:
        """Called after every optimizer step."""

    def set_noise(self, noise: Mapping[str, Tensor]) -> None:
        """Use recorded noise, by name, wherever a forward pass would draw some (dropout aside)."""
        raise UsageError(f"{self.architecture} draws no noise")

    def adapter_layers(self) -> Iterator[tuple[Linear, dict[str, Any]]]:
        """The layers that low-rank adapters go to, with the options of their `add_adapter`: all linear ones of the
        blocks."""
        for module in self.blocks.modules():
            if isinstance(module, Linear):
                yield module, {}

    @property
    def architecture(self) -> str:
        """Name of the file that defines this model."""
        return type(self).__module__.rpartition(".")[2]

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.embedding.weight.device

    def active_parameters(self) -> int:
        """Parameters that one token may use in evaluation, each tensor once: all, unless a model chooses among some."""
        return sum(p.numel() for p in {id(p): p for p in self.parameters()}.values())

    def state_without_ties(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers under their names; a tied tensor once, under its first name."""
        state, seen = {}, set()
        for name, tensor in self.state_dict(keep_vars=True).items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                state[name] = tensor.detach()
        return state
