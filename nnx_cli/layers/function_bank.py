"""A sub-layer that sends every token through one linear map of a bank.

The choice is a Gumbel-softmax (Jang et al. 2017, https://arxiv.org/abs/1611.01144) made hard, with the straight-through
gradient (Bengio et al. 2013, https://arxiv.org/abs/1308.3432); the balance loss is that of Switch Transformers (Fedus
et al. 2022, https://arxiv.org/abs/2101.03961).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnx_cli.layers.linear import Linear, PackedLinear

KINDS = ("global", "layer")  # of functions: shared by all layers, and a layer's own


class GumbelNoise(nn.Module):
    """Gumbel noise of all banks of a model, drawn outside its blocks: compiled blocks see the same ones.

    The temperature falls geometrically over `anneal_steps` optimizer steps, counted in a buffer that is saved with the
    weights; without them it stays.
    """

    steps: Tensor | None

    def __init__(self, temperature: float, min_temperature: float, anneal_steps: int | None) -> None:
        super().__init__()
        self.start, self.end, self.anneal_steps = temperature, min_temperature, anneal_steps
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64) if anneal_steps else None)
        self.recorded: dict[str, Tensor] = {}  # (B, S, n) by "LAYER/KIND": takes the place of draws

    def forward(self, layer: int, sizes: Mapping[str, int], batch_size: int, positions: Tensor) -> dict[str, Tensor]:
        """Standard Gumbel noise (B, T, n), float32, of each kind, for positions (T,) or (B, T)."""
        noise = {}
        for kind, n in sizes.items():
            if self.recorded:
                index = positions.expand(batch_size, -1)[..., None].expand(-1, -1, n)
                noise[kind] = self.recorded[f"{layer}/{kind}"].gather(1, index)
            else:
                noise[kind] = torch.empty(batch_size, positions.shape[-1], n, device=positions.device)
                noise[kind] = -noise[kind].exponential_().log()
        return noise

    def temperature(self) -> Tensor | float:
        """The present temperature of the choice."""
        if self.steps is None or self.anneal_steps is None:
            return self.start
        return self.start * (self.end / self.start) ** (self.steps / self.anneal_steps).clamp(max=1.0)

    def post_optim_step(self) -> None:
        """Count a step of annealing."""
        if self.steps is not None:
            self.steps += 1


class StraightThrough(torch.autograd.Function):
    """W_choice h for every row; its gradient is that of sum_j p_j W_j h, taken where p is the one-hot choice.

    Equals evaluating all functions and masking their outputs, but keeps none of those: the gradient of p_j is
    (dy W_j) · h, and dy W_j is needed for h anyway. Memory does not grow with the number of functions.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, p: Tensor, choice: Tensor, *weights: Tensor) -> Tensor:
        """h (N, D) by the function that each row chose, (N, D)."""
        ctx.save_for_backward(h, choice, *weights)
        y = torch.zeros_like(h)
        for j, weight in enumerate(weights):
            y = torch.where((choice == j)[:, None], F.linear(h, weight.to(h.dtype)), y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of h, of p (N, n) and of the matrices."""
        h, choice, *weights = ctx.saved_tensors
        dh, dp, dweights = torch.zeros_like(h), [], []
        for j, weight in enumerate(weights):
            chosen = (choice == j)[:, None]
            back = dy @ weight.to(dy.dtype)  # (N, D)
            dp.append((back.float() * h.float()).sum(-1))
            dh = torch.where(chosen, back, dh)
            dweights.append(((dy * chosen).t() @ h).to(weight.dtype))
        return dh, torch.stack(dp, -1), None, *dweights


def matrix(function: nn.Module) -> Tensor:
    """What a `Linear` multiplies with, its adapter included."""
    assert isinstance(function, Linear)
    return function.weight if function.lora_a is None else function.weight + function.adapter_delta()


def dispatch(h: Tensor, choice: Tensor, functions: nn.ModuleList) -> Tensor:
    """Every row of `h` (N, D) through its function: rows are sorted by it, and each function sees its own rows only."""
    order = choice.argsort()
    if choice.is_meta:  # to be counted, not run
        pieces = h[order].tensor_split(len(functions))
    else:
        pieces = h[order].split(choice.bincount(minlength=len(functions)).tolist())  # synchronizes
    y = torch.cat([function(piece) for function, piece in zip(functions, pieces, strict=True) if len(piece)])
    return torch.empty_like(y).index_copy(0, order, y)


class MoreFunctions(Protocol):
    """Functions that stand behind the learned ones of a bank and see more than their input."""

    def apply(self, h: Tensor, p: Tensor, choice: Tensor, learned: nn.ModuleList, dense: bool) -> Tensor:
        """Every row of h (N, D) through its function; `dense` with a gradient for p (N, n)."""


class FunctionBank(nn.Module):
    """G(h) + F(h): one of the functions that all layers share, and one of this layer's own; either may be absent.

    After a forward pass `counts` holds how many tokens chose each function, by kind, and, in training, `balance` the
    balance losses, if `balanced`.
    """

    def __init__(self, dim: int, n_global: int, n_layer: int, balanced: bool) -> None:
        super().__init__()
        self.balanced = balanced
        self.scorer = PackedLinear(dim, (n_global, n_layer))
        self.functions = nn.ModuleList(Linear(dim, dim) for _ in range(n_layer))
        self.counts: dict[str, Tensor] = {}
        self.balance: list[Tensor] = []

    def forward(
        self,
        h: Tensor,
        functions: nn.ModuleList,
        noise: Mapping[str, Tensor] | None,
        temperature: Tensor | float,
        outside: MoreFunctions | None = None,
    ) -> Tensor:
        """h (B, T, D) to (B, T, D). `functions` are the shared ones, which those from `outside` follow.

        With `noise` (B, T, n) the choice is drawn from softmax(scores / temperature), so that a low temperature comes
        close to the highest score, which is what counts without noise.
        """
        rows = h.flatten(0, 1)  # (N, D)
        y = torch.zeros_like(rows)
        counts, balance = {}, []
        for kind, scores, bank in zip(KINDS, self.scorer(rows), (functions, self.functions), strict=True):
            n = scores.shape[-1]
            if n == 0:
                continue
            scores = scores.float()
            logits = scores if noise is None else scores / temperature + noise[kind].flatten(0, 1)
            choice = logits.argmax(-1)
            counts[kind] = (choice[:, None] == torch.arange(n, device=h.device)).sum(0)
            if outside is not None and kind == "global":
                dense = self.training or torch.compiler.is_compiling()
                y = y + outside.apply(rows, logits.softmax(-1), choice, bank, dense)
            elif self.training or torch.compiler.is_compiling():  # dispatch cannot be captured in a graph
                y = y + StraightThrough.apply(rows, logits.softmax(-1), choice, *map(matrix, bank))
            else:
                y = y + dispatch(rows, choice, bank)
            if self.balanced and self.training:
                balance.append(n * (counts[kind] / len(rows) * scores.softmax(-1).mean(0)).sum())
        self.counts, self.balance = counts, balance
        return y.view_as(h)
