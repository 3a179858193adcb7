"""Muon: momentum orthogonalized by Newton-Schulz, for the matrices of blocks; AdamW for everything else."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nnx_cli.kernels.gemm import onednn_linear, prefers_onednn
from nnx_cli.kernels.stochastic_rounding import random_bits, random_stream, stochastic_round
from nnx_cli.optim._base import Defaults, DeviceOptimizer, Group, OptimizerConfig, StateSpec
from nnx_cli.optim._groups import hidden_matrices, parameter_groups, split_group
from nnx_cli.optim.adamw import AdamW
from nnx_cli.system.hardware import of

DEFAULTS = Defaults(lr_share=2.5)

STACK_BYTES = 32 * 2**20  # of float32 matrices that are worked on together; about five times that is needed for it
# Polar Express (Amsel et al. 2025, https://arxiv.org/abs/2505.16932): the best odd quintic for each of five steps, as
# published with modded-nanogpt (https://github.com/KellerJordan/modded-nanogpt) for a margin of 2 % and cushion 2. They
# take singular values from 0.001 up to between 0.85 and 1.15.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
SHORTER = POLAR_EXPRESS[1:]  # from 0.008 up: no worse on a CPU, where the steps are a quarter of the time (zoo.md)
LEAST_APART = 2**24  # multiplications of a matrix with its own transpose, from which on a stack is taken apart
LARGEST = 1.25  # root mean square of the singular values of what the steps end with
MARGIN = 1.02  # by which a matrix's norm is kept below 1 at the start


def orthogonalize(
    matrices: Tensor, dtype: torch.dtype, steps: Sequence[tuple[float, float, float]] = POLAR_EXPRESS
) -> Tensor:
    """U Vᵀ of each matrix (N, R, C) = U S Vᵀ, nearly: the Newton-Schulz iteration x ← a·x + (b·x xᵀ + c·(x xᵀ)²)·x in
    `dtype`, with coefficients (a, b, c) of its own for each of `steps`. Zero where the iteration diverged."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = (x / (torch.linalg.matrix_norm(x, keepdim=True) * MARGIN + 1e-7)).to(dtype)
    one_by_one = x[0].numel() * x.shape[1] >= LEAST_APART and prefers_onednn(x[0], x[0]) and of(x).onednn
    if dtype == torch.float32 and x.shape[2] >= 2 * x.shape[1]:
        x = _forget_failures(_by_grams(x, steps, matmul if one_by_one else torch.bmm))
        return x.mT if tall else x
    for a, b, c in steps:
        if one_by_one:
            gram = matmul(x, x.mT)
            x = matmul(matmul(gram, gram).mul_(c).add_(gram, alpha=b), x).add_(x, alpha=a)
        else:
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = _forget_failures(x)
    return x.mT if tall else x


def _forget_failures(x: Tensor) -> Tensor:
    """`x` (N, R, C), R <= C, with zeros in place of matrices that are larger than orthogonal ones are, or not finite.

    A small error is enough for that: the steps diverge beyond the singular values that they are made for. Seen where
    several processes share one H200, of which cuBLAS's products are now and then wrong: tests/bench/zoo.md.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=wide)
    return torch.where(norm <= LARGEST * math.sqrt(x.shape[1]), x, 0.0)


def _by_grams(
    x: Tensor, steps: Sequence[tuple[float, float, float]], product: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """The iteration on x xᵀ alone, which is square, where x is at least twice as wide: two thirds of the FLOPs. x is
    multiplied once at the end. Needs float32: what rounding adds grows as the smallest singular values do."""
    gram, whole = product(x, x.mT), None
    for number, (a, b, c) in enumerate(steps):
        factor = product(gram, gram).mul_(c).add_(gram, alpha=b)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        whole = factor if whole is None else product(factor, whole)
        if number + 1 < len(steps):
            gram = product(product(factor, gram), factor)
    assert whole is not None
    return product(whole, x)


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """left @ right of stacks of matrices (N, R, K) and (N, K, C), by the library that is fastest with single ones."""
    out = left.new_empty(*left.shape[:-1], right.shape[-1])
    for whole, a, b in zip(out, left, right, strict=True):
        whole.copy_(onednn_linear(a, b.t()))
    return out


def step_type(x: Tensor) -> torch.dtype:
    """The arithmetic of `orthogonalize`: bfloat16 where a GPU has matmuls in it, else float32."""
    return torch.bfloat16 if of(x).bf16_matmul else torch.float32


@dataclass(frozen=True)
class Matrix:
    """Rows of a parameter that are one projection."""

    p: Tensor
    first: int
    last: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.last - self.first, self.p.shape[1]

    def of(self, tensor: Tensor) -> Tensor:
        """Its part of a tensor of the parameter's shape."""
        return tensor.detach()[self.first : self.last]


class Muon(AdamW):
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/): Nesterov momentum, orthogonalized.

    Groups with `orthogonal` hold matrices; the projections that `splits` says are packed in one by rows are taken
    apart, because they are separate maps. An update is scaled by 0.2·√max(rows, columns), the root mean square of
    Adam's, so that one learning rate and weight decay serve both (Liu et al. 2025, https://arxiv.org/abs/2502.16982).
    The momentum has the type of the weights. Equal shapes go through `orthogonalize` together.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *args: Any,
        momentum: float = 0.9,
        splits: Mapping[Tensor, Sequence[int]] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, *args, momentum=momentum, orthogonal=False, **options)
        self.splits = splits or {}
        self.rows: dict[Tensor, int] = {}  # of the whole of each matrix that is divided among ranks

    def move(self, local: Mapping[Tensor, Tensor], rank: int, owners: Mapping[Tensor, int]) -> None:
        """As in the base."""
        super().move(local, rank, owners)
        self.rows = {local[p]: len(p) for p in self.splits if local[p] is not p}
        self.splits = {local[p]: rows for p, rows in self.splits.items()}

    def state_spec(self, p: Tensor, group: Group) -> StateSpec:
        """The momentum of a matrix; of all else AdamW's moments."""
        if group["orthogonal"]:
            return {"momentum": (p.shape, p.dtype)} | self.rounding_spec(p)
        return super().state_spec(p, group)

    def clip(self, norm: Tensor, limit: float) -> None:
        """Scale all gradients, whose norm is `norm`, down to one of `limit` where that is less."""
        DeviceOptimizer.clip(self, norm, limit)

    def update(self, parameters: list[Tensor], group: Group, found_inf: Tensor | None) -> None:
        """Move matrices by their orthogonalized momentum, all else as AdamW does."""
        if not group["orthogonal"]:
            super().update(parameters, group, found_inf)
            return
        skip = None if found_inf is None else found_inf != 0
        whole = [p for p in parameters if p not in self.rows]
        for stack in self.stacks(whole):
            self._update_stack(stack, group, skip)
        for some in self._of_one_shape([p for p in parameters if p in self.rows]):
            self._update_divided(some, group, skip)
        self.count_step(parameters, found_inf)

    @property
    def may_be_captured(self) -> bool:
        """As in the base: ranks that divide the work send one another what comes of it."""
        return self.ranks.count == 1

    def stacks(self, parameters: list[Tensor]) -> Iterator[list[Matrix]]:
        """The matrices of some parameters: lists of equal shape, none of them over STACK_BYTES unless it is of one."""
        by_shape: dict[tuple[int, int], list[Matrix]] = defaultdict(list)
        for p in parameters:
            first = 0
            for rows in self.splits.get(p, (len(p),)):
                by_shape[rows, p.shape[1]].append(Matrix(p, first, first + rows))
                first += rows
        for (rows, columns), matrices in by_shape.items():
            n = self.ranks.count * max(1, STACK_BYTES // (4 * rows * columns))
            for start in range(0, len(matrices), n):
                yield matrices[start : start + n]

    def _of_one_shape(self, parameters: list[Tensor]) -> Iterator[list[Tensor]]:
        """Matrices that ranks have rows of, by their shape and splits, as many as are worked on together."""
        alike: dict[Any, list[Tensor]] = defaultdict(list)
        for p in parameters:
            alike[self.rows[p], p.shape[1], tuple(self.splits[p])].append(p)
        for (rows, columns, _), group in alike.items():
            n = self.ranks.count * max(1, STACK_BYTES // (4 * rows * columns))
            for start in range(0, len(group), n):
                yield group[start : start + n]

    def _update_divided(self, some: list[Tensor], group: Group, skip: Tensor | None) -> None:
        """Move matrices of one shape that ranks have rows of: joined, changed, and divided again."""
        ranks, rows, (mine, columns) = self.ranks, self.rows[some[0]], some[0].shape
        stack = [Matrix(p, 0, mine) for p in some]
        share = -(-rows // ranks.count)
        part = some[0].new_zeros(len(some), share, columns, dtype=torch.float32)
        part[:, :mine] = self._nesterov(stack, group, skip)
        joined = ranks.collect(part).view(ranks.count, *part.shape).transpose(0, 1).reshape(len(some), -1, columns)
        begin, first = ranks.rank * share, 0
        changes = self._shared_out(joined[:, :rows], self.splits[some[0]])[:, begin : begin + mine].float()
        for n in self.splits[some[0]]:
            scale = -0.2 * math.sqrt(max(n, columns)) * group["lr"]
            changes[:, max(0, first - begin) : max(0, first + n - begin)] *= scale
            first += n
        self._add(stack, changes, group, skip)

    def _shared_out(self, matrices: Tensor, splits: Sequence[int]) -> Tensor:
        """Each part by rows of matrices (N, R, C) orthogonalized: by every rank those of some, then gathered."""
        ranks, n = self.ranks, len(matrices)
        share = -(-n // ranks.count)
        mine = matrices[ranks.rank * share : (ranks.rank + 1) * share]
        part = matrices.new_zeros(share, *matrices.shape[1:], dtype=step_type(matrices))
        for whole, found in zip(mine.split([*splits], dim=1), part.split([*splits], dim=1), strict=True):
            if len(whole):
                found[: len(whole)] = self._orthogonalized(whole.contiguous())
        return ranks.collect(part)[:n]

    def _orthogonalized(self, matrices: Tensor) -> Tensor:
        """`orthogonalize` in the arithmetic, and by as many steps, as the device is good at."""
        steps = SHORTER if of(matrices).kind == "cpu" else POLAR_EXPRESS
        return orthogonalize(matrices, step_type(matrices), steps)

    def _update_stack(self, stack: list[Matrix], group: Group, skip: Tensor | None) -> None:
        """Move matrices of one shape. What is skipped is multiplied by 1 and has -0.0 added: no bit of it changes."""
        lr = group["lr"]
        g = self._nesterov(stack, group, skip)
        whole = self._orthogonalized(g) if self.ranks.count == 1 else self._shared_out(g, [stack[0].shape[0]])
        change = whole.float() * (-0.2 * math.sqrt(max(stack[0].shape)) * lr)
        del g
        self._add(stack, change, group, skip)

    def _nesterov(self, stack: list[Matrix], group: Group, skip: Tensor | None) -> Tensor:
        """Move the momenta of matrices of one shape; returns (N, R, C) where they will be, in float32."""
        beta = keep = group["momentum"]
        g = torch.stack([matrix.of(matrix.p.grad) for matrix in stack if matrix.p.grad is not None]).float()
        if skip is not None:
            g.masked_fill_(skip, -0.0)
            keep = torch.where(skip, 1.0, keep)
        momenta = [matrix.of(self.state[matrix.p]["momentum"]) for matrix in stack]
        m = torch.stack(momenta).float().mul_(keep).add_(g, alpha=1 - beta)
        torch._foreach_copy_(momenta, list(m.unbind()))
        return g.lerp_(m, beta)

    def _add(self, stack: list[Matrix], change: Tensor, group: Group, skip: Tensor | None) -> None:
        """Let weights decay, and add changes (N, R, C) to them."""
        p, decay = stack[0].p, 1 - group["lr"] * group["weight_decay"]
        if skip is not None:
            change.masked_fill_(skip, -0.0)
            decay = torch.where(skip, 1.0, decay)
        weights = [matrix.of(matrix.p) for matrix in stack]
        if p.dtype == torch.float32:
            torch._foreach_mul_(weights, decay)
            torch._foreach_add_(weights, list(change.unbind()))
            return
        stream = random_stream(self.keys[p] ^ stack[0].first, self.state[p]["step"])
        bits = random_bits(stream, 0, change.numel(), 0).view(change.shape)
        new = stochastic_round(change.add_(torch.stack(weights).float() * decay), bits)
        torch._foreach_copy_(weights, list(new.unbind()))


def build(model: nn.Module, config: OptimizerConfig) -> Muon:
    """Muon for the linear layers of blocks, AdamW for all other parameters that are trained."""
    splits = hidden_matrices(model)
    groups = split_group(parameter_groups(model, config.weight_decay), set(splits), orthogonal=True)
    return Muon(groups, config.lr, config.betas, splits=splits, seed=config.seed)
