"""Fused linear cross-entropy: the next-token loss from trunk and head, without the logits of a whole batch.

Logits exist for a chunk of rows at a time, and the chunk's gradients are taken before the next one begins.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nnx_cli.kernels.cross_entropy import cross_entropy_rows
from nnx_cli.kernels.gemm import linear, prefers_onednn
from nnx_cli.kernels.precision import widened
from nnx_cli.kernels.student_t import StudentT
from nnx_cli.layers.head import LinearHead, as_linear_head
from nnx_cli.system.hardware import of

CHUNK_BYTES = 128 * 2**20  # of a chunk's logits and everything made from them
CUDA_CHUNK_BYTES = 256 * 2**20  # launches cost time and GEMMs like many rows: 4096 at 32,000 tokens in bf16
LOGIT_BYTES = 10  # of a head that is not linear: logits, their float32 copy and their gradient
FP16_FACTOR = 2.0**8  # on gradients in fp16, which have values down to 2**-24 and stay well below 2**16 - 1


def chunk_rows(n_rows: int, vocab_size: int, logit_bytes: int = LOGIT_BYTES, device_type: str = "cpu") -> int:
    """Rows per chunk, where a logit takes `logit_bytes`.

    A power of two that keeps the chunk within CHUNK_BYTES, or on CUDA within CUDA_CHUNK_BYTES, but at least 256 and,
    except on CUDA, at most 4096; then evened out.
    """
    budget, most = (CUDA_CHUNK_BYTES, n_rows) if device_type == "cuda" else (CHUNK_BYTES, 4096)
    rows = 2 ** int(math.log2(max(1, budget // (logit_bytes * vocab_size))))
    rows = min(max(rows, 256), max(most, 256))
    return math.ceil(n_rows / math.ceil(n_rows / rows))


def logit_bytes(dtype: torch.dtype, student_t: bool, fused: bool) -> int:
    """Peak memory of a linear head's logit: one element where the kernel writes the gradient in its place, else a
    few."""
    if student_t:
        dtype = torch.promote_types(dtype, torch.float32)
    return dtype.itemsize if fused else 16 if student_t else 8


def summed_loss(head: nn.Module, x: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """Cross-entropy in nats, summed over the rows of `x` (N, D) against `targets` (N,); logsumexp in float32 or
    wider."""
    logits = head(x)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum")


class ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy of any head that acts on rows alone: `summed_loss` and its gradients, chunk by chunk.

    Gradients reach the head's parameters and `x` through autograd; those of parameters are accumulated in float32 or
    wider.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, targets: Tensor, head: nn.Module, ignore_index: int, *parameters: Tensor
    ) -> Tensor:
        """Loss in nats, summed over the rows of `x` (N, D) against `targets` (N,)."""
        rows = chunk_rows(len(x), head_vocab_size(head), device_type=of(x).kind)
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
        """The saved gradients times `grad`."""
        x_grad, *parameter_grads = (
            _scaled(saved, grad, dtype) for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        grads = iter(parameter_grads)
        return x_grad, None, None, None, *(next(grads) if wanted else None for wanted in ctx.wanted)


def head_vocab_size(head: nn.Module) -> int:
    """Number of logits a head makes: the rows of its largest matrix."""
    return max(p.shape[0] for p in head.parameters() if p.dim() == 2)


class LogitChunks:
    """Logits x @ weight.T of a linear head, a chunk of rows at a time, in a buffer that all chunks share.

    Yields where a chunk is, its x and its logits. The weight is cast once, with the scale in it. For use where autograd
    does not look: chunks overwrite one another. Under the Triton kernel zeros lie below the weight, and behind the
    logits, up to a multiple of 64 rows: tensor cores dislike a vocabulary of 50,257.
    """

    def __init__(self, x: Tensor, head: LinearHead) -> None:
        assert head.df is None or head.scale is None and head.bias is None
        self.x = x
        self.vocab_size, self.dim = head.weight.shape
        self.dtype = x.dtype if head.df is None else torch.promote_types(x.dtype, torch.float32)
        fused, V = of(x).triton, self.vocab_size
        width = math.ceil(V / 64) * 64
        self.weight = head.weight.to(self.dtype)
        if head.scale is not None or (fused and width > V):
            self.weight = torch.zeros(width if fused else V, self.dim, dtype=self.dtype, device=x.device)
            self.weight[:V] = head.weight if head.scale is None else head.weight * head.scale[:, None]
        self.bias = None if head.bias is None else F.pad(head.bias.to(self.dtype), (0, len(self.weight) - V))
        self.df = head.df
        self.w_squares = None if head.df is None else self.weight[:V].square().sum(1)
        per_logit = logit_bytes(x.dtype, student_t=head.df is not None, fused=fused)
        self.rows = chunk_rows(len(x), V, per_logit, of(x).kind)
        self.unbuffered = self.bias is None and x.dtype == self.dtype and prefers_onednn(x[: self.rows], self.weight)
        rows = 0 if self.unbuffered else self.rows
        self.buffer = torch.empty(rows, width, dtype=self.dtype, device=x.device)[:, : len(self.weight)]

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        for start in range(0, len(self.x), self.rows):
            rows = slice(start, min(start + self.rows, len(self.x)))
            x = self.x[rows].to(self.dtype)
            yield rows, x, self._logits(x)

    def _logits(self, x: Tensor) -> Tensor:
        if self.unbuffered:
            return linear(x, self.weight)
        if self.bias is None:
            return torch.mm(x, self.weight.t(), out=self.buffer[: len(x)])
        return torch.addmm(self.bias, x, self.weight.t(), out=self.buffer[: len(x)])

    def student_t(self, x: Tensor) -> StudentT | None:
        """What the logits of a chunk's x depend on besides x @ weight.T; None for a plain linear head."""
        if self.df is None or self.w_squares is None:
            return None
        return StudentT(self.df, self.dim, x.square().sum(1), self.w_squares)

    def empty_gradient(self, dtype: torch.dtype) -> Tensor:
        """Memory for the gradient of the weight; column-major where that is how a GEMM is fastest."""
        if self.unbuffered and of(self.weight).onednn and self.vocab_size > self.dim:
            return torch.empty_like(self.weight.t(), dtype=dtype, memory_format=torch.contiguous_format).t()
        return torch.empty_like(self.weight, dtype=dtype)


class FusedLinearCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of a linear head, fused with its GEMMs: the gradients are taken chunk by chunk in forward.

    Nothing here synchronizes. The gradient of the weight is accumulated in float32 or wider. With `once` the gradients
    are handed out in the memory they were kept in, so there is one backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        ignore_index: int,
        df: float | None,
        once: bool,
        weight: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        """Loss in nats, summed over the rows of `hidden` (N, D) against `targets` (N,)."""
        wants_hidden, _, _, _, _, wants_weight, wants_scale, wants_bias = ctx.needs_input_grad
        chunks = LogitChunks(hidden, LinearHead(weight=weight, scale=scale, bias=bias, df=df))
        V, wide = chunks.vocab_size, torch.promote_types(chunks.dtype, torch.float32)
        ctx.once, ctx.factor = once, FP16_FACTOR if chunks.dtype == torch.float16 else 1.0
        loss = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        dhidden = torch.empty_like(hidden) if wants_hidden else None
        dweight = chunks.empty_gradient(wide) if wants_weight or wants_scale else None
        dbias = loss.new_zeros(len(chunks.weight)) if wants_bias or df is not None else None
        for rows, x, logits in chunks:
            loss[rows], dlogits = cross_entropy_rows(
                logits[:, :V], targets[rows], ignore_index, student_t=chunks.student_t(x), factor=ctx.factor
            )
            assert dlogits is not None
            if len(chunks.weight) > V:
                dlogits = logits  # the kernel put it there; the zeros behind it are still zeros
            if dbias is not None:
                dbias += dlogits.sum(0, dtype=wide)
            if dweight is not None:
                gemm_add(dweight, dlogits.t(), x, beta=float(rows.start > 0))
            if dhidden is not None and df is None:
                gemm(dlogits, chunks.weight, out=dhidden[rows])
            elif dhidden is not None:  # of −|x − w|² / 2
                dhidden[rows] = (dlogits @ chunks.weight).addcmul_(dlogits.sum(1, keepdim=True), x, value=-1)
        del logits, dlogits, chunks.buffer  # the gradient of a scale needs a matrix more
        if df is not None and dweight is not None and dbias is not None:
            dweight.addcmul_(dbias[:, None], chunks.weight, value=-1)
        dweight = None if dweight is None else dweight[:V].contiguous()
        dscale = (dweight * weight).sum(1) if wants_scale and dweight is not None else None
        if scale is not None and dweight is not None and wants_weight:
            dweight *= scale[:, None]
        ctx.save_for_backward(
            dhidden, dweight if wants_weight else None, dscale, dbias[:V] if wants_bias and dbias is not None else None
        )
        ctx.dtypes = [tensor if tensor is None else tensor.dtype for tensor in (hidden, weight, scale, bias)]
        return loss.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The saved gradients times `grad`."""
        grad = grad / ctx.factor
        dhidden, *others = (
            None if saved is None else _scaled(saved, grad, dtype, in_place=ctx.once)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return dhidden, None, None, None, None, *others


def gemm(a: Tensor, b: Tensor, *, out: Tensor) -> None:
    """out = a @ b."""
    if prefers_onednn(a, b.t()):
        out.copy_(linear(a, b.t()))
    else:
        torch.mm(a, b, out=out)


def gemm_add(out: Tensor, a: Tensor, b: Tensor, beta: float) -> None:
    """out = beta · out + a @ b, accumulated in the type of `out`, which may be wider than theirs."""
    if out.dtype == a.dtype and prefers_onednn(a, b.t()):
        product = linear(a, b.t()) if out.is_contiguous() else linear(b.t(), a).t()
        out.copy_(product) if beta == 0 else torch.add(product, out, alpha=beta, out=out)
    elif out.dtype == a.dtype:
        out.addmm_(a, b, beta=beta)
    elif of(out).kind == "cuda" and not of(out).hip:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, out=out)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype), beta=beta)


def _scaled(tensor: Tensor, grad: Tensor, dtype: torch.dtype, in_place: bool = False) -> Tensor:
    """tensor · grad in another dtype, without rounding the scalar `grad` to it first; in place if that is allowed and
    the dtype stays."""
    if in_place and dtype == tensor.dtype:
        return tensor.mul_(grad)
    return torch.mul(tensor, grad.view((1,) * tensor.dim()), out=torch.empty_like(tensor, dtype=dtype))


def head_loss(head: nn.Module, hidden: Tensor, targets: Tensor, ignore_index: int, once: bool = False) -> Tensor:
    """Summed cross-entropy in chunks of rows: fused where the head is linear, else through autograd.

    With `once`, memory is saved by taking gradients in place: autograd refuses a second backward pass.
    """
    if (linear := as_linear_head(head)) is None:
        return ChunkedCrossEntropy.apply(hidden, targets, head, ignore_index, *head.parameters())
    hidden = widened(hidden) if linear.wide else hidden
    return FusedLinearCrossEntropy.apply(
        hidden, targets, ignore_index, linear.df, once, linear.weight, linear.scale, linear.bias
    )


class TrunkAndHead(Protocol):
    """What the loss asks of a model."""

    config: Any
    head: nn.Module  # acts on every row alone
    ignore_index: int  # a target outside of the loss

    def trunk(self, input_ids: Tensor) -> Tensor:
        """Token ids (B, T) to what the head reads, (B, T, D)."""

    def aux_loss(self) -> Tensor | None:
        """A loss per target to add, of the latest forward pass."""


class LossModule(nn.Module):
    """The one callable that training wraps: input_ids, targets (B, T) to the summed loss and the number of targets."""

    model: TrunkAndHead

    def __init__(self, model: TrunkAndHead) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy in nats summed over the targets, with the model's own loss, and the number of targets."""
        model = self.model
        hidden = model.trunk(input_ids).flatten(0, 1)
        targets = targets.flatten()
        n_targets = (targets != model.ignore_index).sum()
        loss = head_loss(model.head, hidden, targets, model.ignore_index, once=True)
        if (aux := model.aux_loss()) is not None:
            loss = loss + aux * n_targets
        return loss, n_targets


@torch.no_grad()
def token_losses(model: TrunkAndHead, input_ids: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats of every target, float32 (B, T), without gradients; logits in chunks of rows."""
    return _scores(model, input_ids, targets, ranked=False)[0]


@torch.no_grad()
def token_scores(model: TrunkAndHead, input_ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """`token_losses`, and the rank of every target, int64 (B, T): how many tokens the model finds likelier, with those
    as likely that have a smaller id. A logit that is not finite counts as likelier."""
    losses, ranks = _scores(model, input_ids, targets, ranked=True)
    assert ranks is not None
    return losses, ranks


def _scores(model: TrunkAndHead, input_ids: Tensor, targets: Tensor, *, ranked: bool) -> tuple[Tensor, Tensor | None]:
    hidden, flat = model.trunk(input_ids).flatten(0, 1), targets.flatten()
    losses, ranks = [], []
    if (linear := as_linear_head(model.head)) is None:
        size = chunk_rows(len(hidden), model.config.vocab_size, device_type=of(hidden).kind)
        for x, target in zip(hidden.split(size), flat.split(size), strict=True):
            logits = model.head(x).float()
            losses.append(F.cross_entropy(logits, target, reduction="none"))
            if ranked:
                ranks.append(_ranks(logits, target))
    else:
        chunks, V = LogitChunks(widened(hidden) if linear.wide else hidden, linear), len(linear.weight)
        for rows, x, logits in chunks:
            student_t = chunks.student_t(x)
            if ranked:  # before the logits are used up; nearest centres are likeliest
                near = logits[:, :V] if student_t is None else torch.sub(2 * logits[:, :V], student_t.w_squares)
                ranks.append(_ranks(near, flat[rows]))
            loss, _ = cross_entropy_rows(
                logits[:, :V], flat[rows], model.ignore_index, student_t=student_t, gradient=False
            )
            losses.append(loss.float())
    return torch.cat(losses).view(targets.shape), torch.cat(ranks).view(targets.shape) if ranked else None


def _ranks(logits: Tensor, targets: Tensor) -> Tensor:
    """How many logits (N, V) come before those of the targets (N,)."""
    wanted = logits.gather(1, targets[:, None])
    before = torch.arange(logits.shape[1], device=logits.device) < targets[:, None]
    return (~(logits <= wanted) | (logits == wanted) & before).sum(1)
