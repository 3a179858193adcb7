"""Cross-entropy of rows of logits and its gradient: what lies between the GEMMs of a head's loss."""

from __future__ import annotations

import torch
from torch import Tensor

from nnx_cli.kernels.student_t import MIN_DISTANCE, StudentT
from nnx_cli.system.hardware import takes_triton


def cross_entropy_rows(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    *,
    student_t: StudentT | None = None,
    factor: float = 1.0,
    gradient: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy in nats of every row (N,), at least float32, and its gradient with respect to `logits` (N, V)
    times `factor`, in their type; both are zero where a target is `ignore_index`.

    `logits`, x·w of every row and token, are used up, with what their rows have beyond V: the gradient may lie in
    their place. Statistics are taken in float32 or wider.
    """
    if takes_triton(logits):
        if logits.is_meta:
            return logits.new_empty(len(logits), dtype=torch.float32), logits if gradient else None
        from nnx_cli.kernels import cross_entropy_triton

        return cross_entropy_triton.cross_entropy_rows(logits, targets, ignore_index, student_t, factor, gradient)
    return plain_cross_entropy_rows(logits, targets, ignore_index, student_t, factor, gradient)


def plain_cross_entropy_rows(
    logits: Tensor, targets: Tensor, ignore_index: int, student_t: StudentT | None, factor: float, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """`cross_entropy_rows` without a kernel of its own."""
    dtype = logits.dtype
    logits, slope = logits.to(torch.promote_types(dtype, torch.float32)), None
    if student_t is not None:
        df, power = student_t.df, (student_t.df + student_t.dim) / 2
        distance = torch.sub(student_t.x_squares[:, None], logits, alpha=2).add_(student_t.w_squares)
        distance.clamp_(min=MIN_DISTANCE)
        slope = 2 * power / (distance + df) if gradient else None
        logits = distance.div_(df).log1p_().mul_(-power)
    log_p = logits.log_softmax(1)
    counts = targets != ignore_index
    index = targets.where(counts, 0)[:, None]
    wanted = log_p.gather(1, index)
    losses = torch.where(counts, -wanted.squeeze(1), 0)
    if not gradient:
        return losses, None
    g = log_p.exp_().scatter_(1, index, wanted.exp() - 1)
    g.mul_((counts * factor).to(g.dtype)[:, None])
    if slope is not None:
        g.mul_(slope)
    return losses, g.to(dtype)
