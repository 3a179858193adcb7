"""Next-token loss from trunk and head, in chunks of rows, so that the logits of a batch never exist at once."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnx_cli.models._base import LanguageModel

CHUNK_BYTES = 128 * 2**20  # of logits, their float32 copy and their gradient: about 10 bytes a logit


def chunk_rows(n_rows: int, vocab_size: int) -> int:
    """Rows per chunk: a power of two between 256 and 4096 that keeps a chunk near CHUNK_BYTES, then evened out."""
    rows = 2 ** int(math.log2(max(1, CHUNK_BYTES // (10 * vocab_size))))
    rows = min(max(rows, 256), 4096)
    return math.ceil(n_rows / math.ceil(n_rows / rows))


def summed_loss(head: nn.Module, x: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """Cross-entropy in nats, summed over the rows of `x` (N, D) against `targets` (N,); statistics in float32 or
    wider."""
    logits = head(x)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum")


class ChunkedHeadLoss(torch.autograd.Function):
    """`summed_loss`, chunk by chunk: each chunk's gradient is taken as soon as its logits exist.

    Works for any head that acts on rows alone. Gradients reach the head's parameters and `x` through autograd.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, targets: Tensor, head: nn.Module, ignore_index: int, *parameters: Tensor
    ) -> Tensor:
        rows = chunk_rows(len(x), head_vocab_size(head))
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
                parameter_grads = grads
            else:
                torch._foreach_add_(parameter_grads, grads)
        ctx.save_for_backward(x_grad, *parameter_grads)
        ctx.wanted = [p.requires_grad for p in parameters]
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_grad, *parameter_grads = ctx.saved_tensors
        scaled = iter(parameter_grads)
        return (
            x_grad * grad.to(x_grad.dtype), None, None, None,
            *(next(scaled) * grad if wanted else None for wanted in ctx.wanted),
        )  # fmt: skip


def head_vocab_size(head: nn.Module) -> int:
    """Number of logits a head makes: the rows of its largest matrix."""
    return max(p.shape[0] for p in head.parameters() if p.dim() == 2)


class TrainStep(nn.Module):
    """The one callable that training wraps: input_ids, targets (B, T) to the summed loss and the number of targets."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        model = self.model
        x = model.trunk(input_ids).flatten(0, 1)
        targets = targets.flatten()
        n_targets = (targets != model.ignore_index).sum()
        loss = ChunkedHeadLoss.apply(x, targets, model.head, model.ignore_index, *model.head.parameters())
        if (aux := model.aux_loss()) is not None:
            loss = loss + aux * n_targets
        return loss, n_targets


def token_losses(model: LanguageModel, input_ids: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats of every target, float32 (B, T), without gradients; logits in chunks of rows."""
    with torch.no_grad():
        x = model.trunk(input_ids).flatten(0, 1)
        rows = chunk_rows(len(x), model.config.vocab_size)
        pieces = zip(x.split(rows), targets.flatten().split(rows), strict=True)
        losses = [F.cross_entropy(model.head(chunk).float(), target, reduction="none") for chunk, target in pieces]
        return torch.cat(losses).view(targets.shape)
