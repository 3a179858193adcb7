"""Elementwise steps of optimizers: AdamW (Adam with decoupled weight decay), Lion, Wolf.

Each is written out here in torch, in pieces that bound what it needs besides the parameter and its state, and again in
`optimizer_step_triton` as one kernel that a CUDA device runs instead. A parameter is float32, or bfloat16 with
stochastic rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from nnx_cli.kernels import log8
from nnx_cli.kernels.stochastic_rounding import random_bits, random_stream, stochastic_round
from nnx_cli.system.hardware import of

PIECE = {"cpu": 2**17}  # elements worked on at a time: what a CPU's cache holds
PIECE_ELSEWHERE = 2**24
WOLF_SHARE = 1 / math.e  # of the new in each of Wolf's moments

State = Mapping[str, Tensor]
Group = Mapping[str, Any]


def _step(rule: Callable[..., None], p: Tensor, *arguments: Any) -> None:
    """Take a step by the Triton kernel of the rule's name, or by the rule itself."""
    hardware = of(p)
    if p.is_meta and (hardware.triton or hardware.kind == "cpu"):
        return  # in place, or by pieces too small to count
    if hardware.triton:
        from nnx_cli.kernels import optimizer_step_triton

        rule = getattr(optimizer_step_triton, rule.__name__.removeprefix("plain_"))
    rule(p, *arguments)


def adamw(p: Tensor, state: State, group: Group, found_inf: Tensor | None, key: int) -> None:
    """AdamW: p ← p·(1 - lr·weight_decay) - lr·m̂ / (√v̂ + eps), with the moments in float32 or 8 bits; `step` counts the
    steps before."""
    _step(plain_adamw, p, state, group, found_inf, key)


def plain_adamw(p: Tensor, state: State, group: Group, found_inf: Tensor | None, key: int) -> None:
    """Take the step of `adamw` by operations of torch, piece by piece."""
    (beta1, beta2), lr = group["betas"], group["lr"]
    step = state["step"] + 1
    correction1, correction2 = 1 - beta1**step, (1 - beta2**step).sqrt()
    for piece in pieces(p, state, found_inf, key):
        g = piece.gradient()
        m = piece.read("exp_avg", sign=True).lerp_(g, 1 - beta1)
        v = piece.read("exp_avg_sq", sign=False).mul_(beta2).addcmul_(g, g, value=1 - beta2)
        update = m / (v.sqrt().div_(correction2).add_(group["eps"])).mul_(correction1)
        weights = piece.weights().mul_(1 - lr * group["weight_decay"]).sub_(update.mul_(lr))
        piece.write(weights, exp_avg=m, exp_avg_sq=v)


def lion(p: Tensor, state: State, group: Group, found_inf: Tensor | None, key: int) -> None:
    """Lion: p ← p·(1 - lr·weight_decay) - lr·sign(beta1·m + (1 - beta1)·g), then m ← beta2·m + (1 - beta2)·g, the
    momentum, in the type of its tensor."""
    _step(plain_lion, p, state, group, found_inf, key)


def plain_lion(p: Tensor, state: State, group: Group, found_inf: Tensor | None, key: int) -> None:
    """Take the step of `lion` by operations of torch, piece by piece."""
    (beta1, beta2), lr = group["betas"], group["lr"]
    for piece in pieces(p, state, found_inf, key):
        g, m = piece.gradient(), piece.read("exp_avg")
        update = m.lerp(g, 1 - beta1).sign_()
        weights = piece.weights().mul_(1 - lr * group["weight_decay"]).sub_(update.mul_(lr))
        piece.write(weights, exp_avg=m.lerp_(g, 1 - beta2))


def wolf(p: Tensor, state: State, group: Group, found_inf: Tensor | None, key: int) -> None:
    """Wolf: u = m + (g - m)/e, m ← m + (u - m)/e, p ← p·(1 - lr·weight_decay) - lr·u where u and g have one sign."""
    _step(plain_wolf, p, state, group, found_inf, key, WOLF_SHARE)


def plain_wolf(p: Tensor, state: State, group: Group, found_inf: Tensor | None, key: int, share: float) -> None:
    """Take the step of `wolf` by operations of torch, piece by piece."""
    lr = group["lr"]
    for piece in pieces(p, state, found_inf, key):
        g, m = piece.gradient(), piece.read("momentum")
        update = m.lerp(g, share)
        m.lerp_(update, share)
        update *= update.sign() * g.sign() > 0
        weights = piece.weights().mul_(1 - lr * group["weight_decay"]).sub_(update.mul_(lr))
        piece.write(weights, momentum=m)


class Piece:
    """A stretch of a parameter, flattened, with its gradient and state: read as float32, written back as they are
    stored, unless `skip` () is true. `stream` is where random bits begin; None where nothing is rounded."""

    def __init__(
        self, p: Tensor, g: Tensor, state: State, first: int, last: int, skip: Tensor | None, stream: Tensor | None
    ) -> None:
        self.p = p[first:last]
        self.g = g[first:last]
        self.state = state
        self.skip = skip
        self.stream = stream
        self.elements = slice(first, last)
        self.blocks = slice(first // log8.BLOCK, log8.n_blocks(last))

    def gradient(self) -> Tensor:
        """The gradient in float32."""
        return self.g.float()

    def weights(self) -> Tensor:
        """A copy of the weights in float32."""
        return self.p.to(torch.float32, copy=True)

    def read(self, field: str, sign: bool = True) -> Tensor:
        """A copy of a moment in float32; 8-bit codes have a sign bit or not."""
        stored = self.state[field].view(-1)[self.elements]
        if stored.dtype == torch.uint8:
            return log8.decode(stored, self.state[f"{field}_scale"][self.blocks], sign)
        return stored.to(torch.float32, copy=True)

    def write(self, weights: Tensor, **moments: Tensor) -> None:
        """Store weights and moments, rounded stochastically where they have less than 32 bits."""
        if self.p.dtype == torch.bfloat16:
            weights = stochastic_round(weights, self._bits(0))
        self._put(self.p, weights)
        for field, value in moments.items():
            stored = self.state[field].view(-1)[self.elements]
            if stored.dtype == torch.uint8:
                sign = field == "exp_avg"
                value, scale = log8.encode(value, self._bits(0) >> 16 if sign else self._bits(1), sign)
                self._put(self.state[f"{field}_scale"][self.blocks], scale)
            elif stored.dtype == torch.bfloat16:
                value = stochastic_round(value, self._bits(0) >> 16)
            self._put(stored, value)

    def _bits(self, word: int) -> Tensor:
        assert self.stream is not None, "state without a count of steps"
        return random_bits(self.stream, self.elements.start, len(self.p), word)

    def _put(self, old: Tensor, new: Tensor) -> None:
        old.copy_(new if self.skip is None else torch.where(self.skip, old, new))


def pieces(p: Tensor, state: State, found_inf: Tensor | None, key: int) -> Iterator[Piece]:
    """A parameter in order, PIECE elements at a time."""
    assert p.grad is not None
    flat, gradient, skip = p.detach().view(-1), p.grad.reshape(-1), None if found_inf is None else found_inf != 0
    stream = random_stream(key, state["step"]) if "step" in state else None
    size = PIECE.get(of(p).kind, PIECE_ELSEWHERE)
    for first in range(0, p.numel(), size):
        yield Piece(flat, gradient, state, first, min(first + size, p.numel()), skip, stream)
