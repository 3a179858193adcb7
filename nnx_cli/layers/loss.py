"""Next-token loss from trunk and head, in chunks of rows, so that the logits of a batch never exist at once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nnx_cli.kernels.cross_entropy import StudentT, row_loss
from nnx_cli.kernels.gemm import has_onednn, multiply, pays
from nnx_cli.layers.head import HeadFormula, formula_of
from nnx_cli.system.hardware import has_triton

CHUNK_BYTES = 128 * 2**20  # of a chunk's logits and everything made from them
CUDA_CHUNK_BYTES = 256 * 2**20  # a kernel starts late and products like many rows: 4096 rows at 32,000 tokens in bf16
LOGIT_BYTES = 10  # of a head without a formula: logits, their float32 copy and their gradient
FP16_FACTOR = 2.0**8  # on gradients in fp16, which have values down to 2**-24 and stay well below 2**16 - 1


def chunk_rows(n_rows: int, vocab_size: int, logit_bytes: int = LOGIT_BYTES, device_type: str = "cpu") -> int:
    """Rows per chunk, of which each logit takes `logit_bytes`: a power of two that keeps the chunk within CHUNK_BYTES,
    or on CUDA within CUDA_CHUNK_BYTES, but at least 256 and, except on CUDA, at most 4096; then evened out."""
    budget, most = (CUDA_CHUNK_BYTES, n_rows) if device_type == "cuda" else (CHUNK_BYTES, 4096)
    rows = 2 ** int(math.log2(max(1, budget // (logit_bytes * vocab_size))))
    rows = min(max(rows, 256), max(most, 256))
    return math.ceil(n_rows / math.ceil(n_rows / rows))


def logit_bytes(dtype: torch.dtype, student_t: bool, fused: bool) -> int:
    """What a logit of a head with a formula takes at its peak: one number where the kernel puts the gradient in the
    place of the product, else a few."""
    if student_t:
        dtype = torch.promote_types(dtype, torch.float32)
    return dtype.itemsize if fused else 16 if student_t else 8


def summed_loss(head: nn.Module, x: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """Cross-entropy in nats, summed over the rows of `x` (N, D) against `targets` (N,); statistics in float32 or
    wider."""
    logits = head(x)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum")


class ChunkedHeadLoss(torch.autograd.Function):
    """`summed_loss`, chunk by chunk: each chunk's gradient is taken as soon as its logits exist.

    Works for any head that acts on rows alone. Gradients reach the head's parameters and `x` through autograd; those of
    parameters are summed in float32 or wider.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, targets: Tensor, head: nn.Module, ignore_index: int, *parameters: Tensor
    ) -> Tensor:
        rows = chunk_rows(len(x), head_vocab_size(head), device_type=x.device.type)
        wanted = [p for p in parameters if p.requires_grad]
        total = torch.zeros((), device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        x_grad = torch.empty_like(x)
        parameter_grads: list[Tensor] = []
        for start in range(0, len(x), rows):
            end = min(start + rows, len(x))
            chunk = x[start:end].detach().requires_grad_()
            with torch.enable_grad():
                loss = summed_loss(head, chunk, targets[start:end], ignore_index)
            chunk_grad, *grads = torch.autograd.grad(loss, [chunk, *wanted])
            total += loss.detach()
            x_grad[start:end] = chunk_grad
            if not parameter_grads:
                parameter_grads = [g.to(torch.promote_types(g.dtype, torch.float32)) for g in grads]
            else:
                torch._foreach_add_(parameter_grads, grads)
        ctx.save_for_backward(x_grad, *parameter_grads)
        ctx.dtypes = [x.dtype, *(p.dtype for p in wanted)]
        ctx.wanted = [p.requires_grad for p in parameters]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_grad, *parameter_grads = (
            scaled(saved, grad, dtype) for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        grads = iter(parameter_grads)
        return x_grad, None, None, None, *(next(grads) if wanted else None for wanted in ctx.wanted)


def head_vocab_size(head: nn.Module) -> int:
    """Number of logits a head makes: the rows of its largest matrix."""
    return max(p.shape[0] for p in head.parameters() if p.dim() == 2)


class Products:
    """x @ weight.T of a head with a formula, chunk by chunk, in a buffer that all chunks share. The weight is cast
    once, with the scale in it. For use where autograd does not look: products are written over one another.

    Where the kernel is, there are zeros below the weight up to a multiple of 64 rows: matrix units dislike a vocabulary
    of 50,257.
    """

    def __init__(self, x: Tensor, formula: HeadFormula) -> None:
        weight, scale, bias, self.df = formula.weight, formula.scale, formula.bias, formula.df
        assert self.df is None or scale is None and bias is None
        self.x, (V, self.dim) = x, weight.shape
        self.dtype = x.dtype if self.df is None else torch.promote_types(x.dtype, torch.float32)
        fused = has_triton(x.device)
        self.vocab_size, width = V, math.ceil(V / 64) * 64
        self.matrix = weight.to(self.dtype)
        if scale is not None or (fused and width > V):
            self.matrix = torch.zeros(width if fused else V, self.dim, dtype=self.dtype, device=x.device)
            self.matrix[:V] = weight if scale is None else weight * scale[:, None]
        self.bias = None if bias is None else F.pad(bias.to(self.dtype), (0, len(self.matrix) - V))
        self.w_squares = None if self.df is None else self.matrix[:V].square().sum(1)
        per_logit = logit_bytes(x.dtype, student_t=self.df is not None, fused=fused)
        self.rows = chunk_rows(len(x), V, per_logit, x.device.type)
        self.is_new = self.bias is None and x.dtype == self.dtype and pays(x[: self.rows], self.matrix)  # no buffer
        rows = 0 if self.is_new else self.rows
        self.buffer = torch.empty(rows, width, dtype=self.dtype, device=x.device)[:, : len(self.matrix)]

    def empty_gradient(self, dtype: torch.dtype) -> Tensor:
        """Memory for the gradient of the matrix; column by column where that is how products come fastest."""
        if self.is_new and has_onednn() and self.vocab_size > self.dim:
            return torch.empty_like(self.matrix.t(), dtype=dtype, memory_format=torch.contiguous_format).t()
        return torch.empty_like(self.matrix, dtype=dtype)

    def chunks(self) -> Iterator[tuple[slice, Tensor, Tensor, StudentT | None]]:
        """Where a chunk is, its x, its products (with zeros behind them) and what else its logits depend on."""
        for start in range(0, len(self.x), self.rows):
            where = slice(start, min(start + self.rows, len(self.x)))
            x = self.x[where].to(self.dtype)
            if self.is_new:
                products = multiply(x, self.matrix)
            elif self.bias is None:
                products = torch.mm(x, self.matrix.t(), out=self.buffer[: len(x)])
            else:
                products = torch.addmm(self.bias, x, self.matrix.t(), out=self.buffer[: len(x)])
            student_t = None
            if self.df is not None:
                student_t = StudentT(self.df, self.dim, x.square().sum(1), self.w_squares)
            yield where, x, products, student_t


class FormulaHeadLoss(torch.autograd.Function):
    """`summed_loss` of a head with a formula: products, their softmax, and two products more for the gradients.

    Nothing here waits for the device. The gradient of the weight is summed in float32 or wider. With `once` the
    gradients are handed out in the memory they were kept in, so there is one backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        targets: Tensor,
        ignore_index: int,
        df: float | None,
        once: bool,
        weight: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        wants_x, _, _, _, _, wants_weight, wants_scale, wants_bias = ctx.needs_input_grad
        head = Products(x, HeadFormula(weight=weight, scale=scale, bias=bias, df=df))
        wide = torch.promote_types(head.dtype, torch.float32)
        ctx.once, ctx.factor = once, FP16_FACTOR if head.dtype == torch.float16 else 1.0
        losses = torch.empty(len(x), dtype=wide, device=x.device)
        x_grad = torch.empty_like(x) if wants_x else None
        weight_grad = head.empty_gradient(wide) if wants_weight or wants_scale else None
        column_sums = losses.new_zeros(len(head.matrix)) if wants_bias or df is not None else None
        V = head.vocab_size
        for where, chunk, products, student_t in head.chunks():
            losses[where], g = row_loss(
                products[:, :V], targets[where], ignore_index, student_t=student_t, factor=ctx.factor
            )
            g = products if len(head.matrix) > V else g  # the kernel put it there; the zeros behind it are still zeros
            if column_sums is not None:
                column_sums += g.sum(0, dtype=wide)
            if weight_grad is not None:
                add_product(weight_grad, g.t(), chunk, beta=float(where.start > 0))
            if x_grad is not None and df is None:
                multiply_into(x_grad[where], g, head.matrix.t())
            elif x_grad is not None:
                x_grad[where] = (g @ head.matrix).addcmul_(g.sum(1, keepdim=True), chunk, value=-1)
        del products, g, head.buffer  # the gradient of a scale needs a matrix more
        if df is not None and weight_grad is not None:
            weight_grad.addcmul_(column_sums[:, None], head.matrix, value=-1)
        weight_grad = None if weight_grad is None else weight_grad[:V].contiguous()
        scale_grad = (weight_grad * weight).sum(1) if wants_scale else None
        if scale is not None and wants_weight:
            weight_grad *= scale[:, None]
        bias_grad = column_sums[:V] if wants_bias else None
        ctx.save_for_backward(x_grad, weight_grad if wants_weight else None, scale_grad, bias_grad)
        ctx.dtypes = [tensor if tensor is None else tensor.dtype for tensor in (x, weight, scale, bias)]
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad / ctx.factor
        x_grad, *others = (
            None if saved is None else scaled(saved, grad, dtype, in_place=ctx.once)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return x_grad, None, None, None, None, *others


def multiply_into(out: Tensor, x: Tensor, weight: Tensor) -> None:
    """out = x @ weight.T"""
    if pays(x, weight):
        out.copy_(multiply(x, weight))
    else:
        torch.mm(x, weight.t(), out=out)


def add_product(total: Tensor, a: Tensor, b: Tensor, beta: float) -> None:
    """total = beta · total + a @ b, summed in the type of `total`, which may be wider than theirs."""
    if total.dtype == a.dtype and pays(a, b.t()):
        product = multiply(a, b.t()) if total.is_contiguous() else multiply(b.t(), a).t()
        total.copy_(product) if beta == 0 else torch.add(product, total, alpha=beta, out=total)
    elif total.dtype == a.dtype:
        total.addmm_(a, b, beta=beta)
    elif total.is_cuda and torch.version.hip is None:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype), beta=beta)


def scaled(tensor: Tensor, grad: Tensor, dtype: torch.dtype, in_place: bool = False) -> Tensor:
    """tensor · grad in another type, without rounding the number `grad` to it first; in the same memory, if that is
    allowed and the type stays."""
    if in_place and dtype == tensor.dtype:
        return tensor.mul_(grad)
    return torch.mul(tensor, grad.view((1,) * tensor.dim()), out=torch.empty_like(tensor, dtype=dtype))


def head_loss(head: nn.Module, x: Tensor, targets: Tensor, ignore_index: int, once: bool = False) -> Tensor:
    """`summed_loss` in chunks of rows: by formula where the head has one, else through autograd. With `once`, memory is
    saved by taking gradients in place: autograd refuses a second backward pass."""
    if (formula := formula_of(head)) is None:
        return ChunkedHeadLoss.apply(x, targets, head, ignore_index, *head.parameters())
    return FormulaHeadLoss.apply(
        x, targets, ignore_index, formula.df, once, formula.weight, formula.scale, formula.bias
    )


class TrainStep(nn.Module):
    """The one callable that training wraps: input_ids, targets (B, T) to the summed loss and the number of targets."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        model = self.model
        x = model.trunk(input_ids).flatten(0, 1)
        targets = targets.flatten()
        n_targets = (targets != model.ignore_index).sum()
        loss = head_loss(model.head, x, targets, model.ignore_index, once=True)
        if (aux := model.aux_loss()) is not None:
            loss = loss + aux * n_targets
        return loss, n_targets


@torch.no_grad()
def token_losses(model: nn.Module, input_ids: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats of every target, float32 (B, T), without gradients; logits in chunks of rows."""
    x, flat = model.trunk(input_ids).flatten(0, 1), targets.flatten()
    if (formula := formula_of(model.head)) is None:
        rows = chunk_rows(len(x), model.config.vocab_size, device_type=x.device.type)
        pieces = zip(x.split(rows), flat.split(rows), strict=True)
        losses = [F.cross_entropy(model.head(chunk).float(), target, reduction="none") for chunk, target in pieces]
    else:
        chunks, V = Products(x, formula).chunks(), len(formula.weight)
        losses = [
            row_loss(products[:, :V], flat[where], model.ignore_index, student_t=student_t, gradient=False)[0].float()
            for where, _, products, student_t in chunks
        ]
    return torch.cat(losses).view(targets.shape)
