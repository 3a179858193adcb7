"""The one linear layer of the project, and its packed sibling; both may carry a low-rank adapter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnx_cli.kernels.gemm import linear, linear_by
from nnx_cli.layers.head import LinearHead


class Linear(nn.Linear):
    """`x @ weight.T`, without a bias; the weight is cast to the type of `x`, so that no autocast is needed.

    Weights stay in the type they are stored in (float32 when training) and the type of the activations decides the
    arithmetic. An adapter (Hu et al. 2021, https://arxiv.org/abs/2106.09685) adds `x @ lora_a.T @ lora_b.T` and leaves
    `weight` and its name as they are.
    """

    direct_method = "forward"
    cast: Tensor | None = None  # the weight in another type, as `weights_cast` holds it
    columns: Tensor | None = None  # the weight as a CPU's product with one row takes it, (1, in, out)
    has_adapter: bool
    lora_a: nn.Parameter | None  # (rank, in_features)
    lora_b: nn.Parameter  # (out_features, rank); None where lora_a is

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.remove_adapter()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out), in the dtype of x."""
        weight = self.weight
        y = linear(x, weight if weight.dtype == x.dtype else self.matrix(x.dtype))
        if not self.has_adapter:
            return y
        assert self.lora_a is not None
        return y + F.linear(F.linear(x, self.lora_a.to(x.dtype)), self.lora_b.to(x.dtype))

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The weight in a type."""
        weight = self.weight
        if weight.dtype == dtype:
            return weight
        return self.cast if self.cast is not None and self.cast.dtype == dtype else weight.to(dtype)

    def direct_attributes(self) -> dict[str, Any]:
        """Attributes, some in place of methods, for a while in which a CPU computes in float32 and nothing is
        replaced."""
        if type(self) not in (Linear, PackedLinear) or self.has_adapter:
            return {}
        matrix = self.matrix(torch.float32)
        multiply = linear_by(matrix)
        return {"columns": matrix.t().unsqueeze(0)} | ({} if multiply is None else {self.direct_method: multiply})

    def linear_head(self) -> LinearHead | None:
        """What this layer computes as a head; None with an adapter, or in a subclass that computes something else."""
        plain = type(self).forward is Linear.forward and self.lora_a is None
        return LinearHead(weight=self.weight) if plain else None

    def adapted_shapes(self) -> list[tuple[int, int]]:
        """Shapes of the matrices that `add_adapter` would give an adapter each."""
        return [(self.out_features, self.in_features)]

    def add_adapter(self, rank: int) -> None:
        """Begin with an adapter that changes nothing: lora_a is random with variance 1 / in_features, lora_b zero."""
        self._adapt(rank, self.out_features)

    def _adapt(self, rows: int, out_rows: int, rank: int | None = None) -> None:
        device = self.weight.device
        self.has_adapter = True
        self.lora_a = nn.Parameter(torch.randn(rows, self.in_features, device=device) * self.in_features**-0.5)
        self.lora_b = nn.Parameter(torch.zeros(out_rows, rank or rows, device=device))

    def adapter_delta(self) -> Tensor:
        """What the adapter adds to `weight`, (out_features, in_features)."""
        assert self.lora_a is not None
        return self.lora_b @ self.lora_a

    def remove_adapter(self) -> None:
        """Be the plain layer again."""
        self.has_adapter = False
        self.register_parameter("lora_a", None)
        self.register_parameter("lora_b", None)


class PackedLinear(Linear):
    """Several projections of one input in a single GEMM.

    `splits` are their output widths, in the order of the rows of `weight`; forward returns one tensor for each. Every
    projection may have an adapter of its own: those in `adapted`, whose lora_a and lora_b are stacked by rows.
    """

    direct_method = "packed"
    adapted: tuple[int, ...] = ()

    def __init__(self, in_features: int, splits: Sequence[int]) -> None:
        super().__init__(in_features, sum(splits))
        self.splits = tuple(splits)

    def packed_output(self, x: Tensor) -> Tensor | None:
        """All projections in one tensor, (..., sum of splits); None where they are not the outcome of one GEMM."""
        plain = type(self).forward is PackedLinear.forward and not self.has_adapter
        return linear(x, self.matrix(x.dtype)) if plain else None

    def packed(self, x: Tensor) -> Tensor:
        """All projections in one tensor, (..., sum of splits)."""
        y = self.packed_output(x)
        return torch.cat(self(x), dim=-1) if y is None else y

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]  # more results than its base
        """x (..., in) to one tensor for each projection."""
        outputs = linear(x, self.matrix(x.dtype)).split(self.splits, dim=-1)
        if self.lora_a is None:
            return outputs
        narrow = F.linear(x, self.lora_a.to(x.dtype)).chunk(len(self.adapted), dim=-1)
        wide = dict(zip(self.adapted, map(F.linear, narrow, self._b_of_each(self.lora_b.to(x.dtype))), strict=True))
        return tuple(y + wide[i] if i in wide else y for i, y in enumerate(outputs))

    def adapted_shapes(self, adapted: Sequence[int] | None = None) -> list[tuple[int, int]]:
        """As in Linear, of the projections `adapted`, by default of all."""
        rows = self.splits if adapted is None else [self.splits[i] for i in adapted]
        return [(n, self.in_features) for n in rows if n]

    def add_adapter(self, rank: int, adapted: Sequence[int] | None = None) -> None:
        """One adapter for each of the projections `adapted`, by default for all."""
        self.adapted = tuple(range(len(self.splits)) if adapted is None else adapted)
        self._adapt(rank * len(self.adapted), sum(self.splits[i] for i in self.adapted), rank)

    def _b_of_each(self, lora_b: Tensor) -> tuple[Tensor, ...]:
        return lora_b.split([self.splits[i] for i in self.adapted])

    def adapter_delta(self) -> Tensor:
        """As in Linear; zero rows where a projection has no adapter."""
        assert self.lora_a is not None
        parts = [self.weight.new_zeros(rows, self.in_features) for rows in self.splits]
        for i, a, b in zip(
            self.adapted, self.lora_a.chunk(len(self.adapted)), self._b_of_each(self.lora_b), strict=True
        ):
            parts[i] = b @ a
        return torch.cat(parts)


@contextmanager
def weights_cast(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Hold the matrices of a model's linear layers in `dtype` beside their own, as far as memory allows: casting them
    would take most of the time of a pass over one token. They must not be changed meanwhile."""
    layers = [module for module in model.modules() if isinstance(module, Linear) and module.weight.dtype != dtype]
    held: dict[int, Tensor] = {}
    try:
        with suppress(torch.OutOfMemoryError):
            for layer in layers:
                if id(layer.weight) not in held:
                    held[id(layer.weight)] = layer.weight.detach().to(dtype)
                layer.cast = held[id(layer.weight)]
        yield
    finally:
        for layer in layers:
            layer.cast = None
