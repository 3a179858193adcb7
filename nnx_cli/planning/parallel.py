"""What each of several GPUs holds, where the model is copied to all of them (DDP) or divided among them (FSDP)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from nnx_cli.models._base import LanguageModel
from nnx_cli.planning.memory import Memory, rounded
from nnx_cli.planning.rates import nominal_flops
from nnx_cli.system.device import describe, memory_budget
from nnx_cli.system.ranks import BUCKET_BYTES

GATHERED_BLOCKS = 3  # of FSDP at once: the block that runs, and the buffers of all-gathers into it and the next one
REDUCED_BLOCKS = 3  # gradients of the block that runs, and the inputs of reduce-scatters of it and the one before
ALIKE = 1.1  # times as much memory or speed: less is no other kind of GPU


@dataclass(frozen=True)
class RankDevice:
    """The device of one rank: its name, bytes to plan for, and FLOPs a second of its large matmuls."""

    name: str
    budget_bytes: int
    flops: float


def rank_device(device: torch.device, precision: str, vram_bytes: int | None, n_sharing: int = 1) -> RankDevice:
    """A rank's device as it is; the memory of a CPU is divided among the `n_sharing` ranks of its host."""
    budget = memory_budget(device, vram_bytes)
    if device.type != "cuda" and vram_bytes is None:
        budget //= n_sharing
    return RankDevice(describe(device), budget, nominal_flops(device, precision))


def common_budget(ranks: Sequence[RankDevice]) -> int:
    """Bytes to plan for on every rank: micro-batches are those that the smallest takes."""
    return min(rank.budget_bytes for rank in ranks)


def common_flops(ranks: Sequence[RankDevice]) -> float:
    """FLOPs a second of all ranks together, which wait for the slowest."""
    return len(ranks) * min(rank.flops for rank in ranks)


def unlike_note(ranks: Sequence[RankDevice]) -> str | None:
    """A line where one rank holds the others up: by its memory, which sets the micro-batch of all, or its speed."""
    smallest, largest = (pick(ranks, key=lambda rank: rank.budget_bytes) for pick in (min, max))
    slowest, fastest = (pick(ranks, key=lambda rank: rank.flops) for pick in (min, max))
    parts = []
    if largest.budget_bytes > ALIKE * smallest.budget_bytes:
        least, most = (f"{rank.budget_bytes / 2**30:.1f}" for rank in (smallest, largest))
        parts.append(
            f"rank {ranks.index(smallest)} ({smallest.name}) sets the micro-batch: {least} GiB, others have {most}"
        )
    if fastest.flops > ALIKE * slowest.flops:
        share = 100 * slowest.flops / fastest.flops
        parts.append(f"rank {ranks.index(slowest)} ({slowest.name}) sets the pace: about {share:.0f} % of the fastest")
    return "; ".join(parts) or None


def per_gpu(memory: Memory, model: LanguageModel, parallel: str, n_gpus: int) -> Memory:
    """What one of `n_gpus` holds of the training that `memory` describes: all of it, and buckets in which gradients are
    added up between backward pass and step; or with FSDP shards of weights, gradients and optimizer states, the weights
    that are gathered for the moment, and gradients on their way. FSDP adds gradients to shards that exist: `memory` is
    to count them in all phases, or in none.
    """
    if parallel != "fsdp":
        buckets = min(BUCKET_BYTES, memory.gradients_bytes)
        end = memory.phases["optimizer"] - memory.step_bytes + max(memory.step_bytes, buckets)
        return replace(memory, buckets_bytes=buckets, phases=memory.phases | {"optimizer": end})
    whole, shard = _sizes(model.parameters(), 1), _sizes(model.parameters(), n_gpus)
    weights = memory.weights_bytes - whole + shard  # buffers stay whole
    gradients, states = (-(-n_bytes * shard // whole) for n_bytes in (memory.gradients_bytes, memory.optimizer_bytes))
    gathered, reduced = _gathered_bytes(model, n_gpus, GATHERED_BLOCKS), _gathered_bytes(model, n_gpus, REDUCED_BLOCKS)
    saved = memory.weights_bytes + memory.gradients_bytes + memory.optimizer_bytes - weights - gradients - states
    extra = {"forward": gathered, "head": gathered, "backward": gathered + reduced, "optimizer": 0}
    phases = {name: n_bytes - saved + extra[name] for name, n_bytes in memory.phases.items()}
    return replace(
        memory,
        weights_bytes=weights,
        gradients_bytes=gradients,
        optimizer_bytes=states,
        buckets_bytes=reduced,
        gathered_bytes=gathered,
        phases=phases,
    )


def _gathered_bytes(model: LanguageModel, n_gpus: int, n_blocks: int) -> int:
    """Bytes of what lies outside of blocks and of the largest block, so many times, as FSDP gathers them."""
    blocks = [[*block.parameters()] for block in model.blocks]
    inside = {id(p) for block in blocks for p in block}
    outside = {id(p): p for p in model.parameters() if id(p) not in inside}.values()
    return n_gpus * (_sizes(outside, n_gpus) + n_blocks * max(_sizes(block, n_gpus) for block in blocks))


def _sizes(parameters: Iterable[nn.Parameter], n_gpus: int) -> int:
    """Bytes of the largest shard of parameters, each divided along its first dimension, whose last shards may be
    empty."""
    return sum(rounded(p.nbytes // p.shape[0] * -(-p.shape[0] // n_gpus) if p.dim() else p.nbytes) for p in parameters)
