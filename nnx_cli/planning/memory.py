"""What a training step takes of memory, to the byte, before it is run.

The step itself runs on the meta device, where tensors have shapes and no numbers. Every storage is counted from its
birth to its death, so that what autograd keeps, what a block holds for a moment and when a gradient comes to exist are
those of the code that will run. What only the kernels of a GPU know, torch's own descriptions of them tell (attention),
or a line here does.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nnx_cli.config import TrainConfig
from nnx_cli.kernels.averaged_keys import averaged_keys_backward
from nnx_cli.layers.blocks import checkpoint_blocks, undo_compile
from nnx_cli.layers.loss import LossModule, token_losses
from nnx_cli.layers.segment_attention import attention_with_lse_backward
from nnx_cli.models._base import LanguageModel
from nnx_cli.optim._base import DeviceOptimizer
from nnx_cli.optim._build import build_optimizer
from nnx_cli.planning.shapes import ShapeCache
from nnx_cli.system.device import DTYPES
from nnx_cli.system.hardware import Hardware, of_device, planned
from nnx_cli.system.torch_private import (
    EFFICIENT,
    EFFICIENT_BACKWARD,
    FLASH,
    FLASH_BACKWARD,
    FLASH_CPU,
    HAS_ATTENTION,
    storage_key,
)

REDUCING_BLOCKS = 2112  # that a card of 132 processors runs at once when it sums over rows
ROUNDING = 512  # bytes: the allocator of CUDA hands out multiples of it
WHOLE = 7  # blocks that are simulated as they are; of more, all but six or seven are copies of their neighbours
ATEN = torch.ops.aten
ANY_GPU = Hardware("cuda", (8, 0), flash=True, triton=True)  # NVIDIA, from 2020 on
CPU = Hardware("cpu")


def hardware_to_plan_for(device: torch.device) -> Hardware:
    """The hardware of a GPU; CPU stands for every other device."""
    return of_device(device) if device.type == "cuda" else CPU


def fixed_bytes(hardware: Hardware) -> int:
    """Workspaces of the matrix library, one for the thread of the forward pass and one for the backward's."""
    if hardware.kind != "cuda":
        return 0
    return 2 * (32 * 2**20 if hardware.capability[0] == 9 else 8_519_680)


class FusedRMSNorm(torch.autograd.Function):
    """Stands for the kernel that CUDA has: keeps the input, the gain and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        """Memory for the output, of the shape of x."""
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        """Memory for the gradients of x and gain."""
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), None if weight is None else torch.empty_like(weight)


class PlannedOperations(TorchFunctionMode):
    """Has operations of torch on the meta device allocate what those of the planned hardware do."""

    def __init__(self, hardware: Hardware) -> None:
        super().__init__()
        self.hardware = hardware

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self.attention(*args, **kwargs)
        if self.hardware.kind == "cuda":
            if func in (F.rms_norm, torch.rms_norm):
                return rms_norm(*args, **kwargs)
            if func is F.dropout:
                return dropout(*args, **kwargs)
            if func is torch.addmm and "out_dtype" in kwargs:  # its meta kernel fails in torch 2.11; it works in place
                return kwargs["out"]
        return func(*args, **kwargs)

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """The fused kernel that the hardware takes."""
        mask = attn_mask
        if mask is not None and mask.dtype == torch.bool:  # becomes a number to add to every score
            mask = torch.empty_like(mask, dtype=q.dtype)
        if not HAS_ATTENTION or self.hardware.kind != "cuda" and dropout_p > 0:
            return F.scaled_dot_product_attention(
                q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        if self.hardware.kind != "cuda":
            return FLASH_CPU(q, k, v, 0.0, is_causal, attn_mask=mask, scale=scale)[0]
        if self.hardware.flash and q.dtype != torch.float32 and mask is None:
            return FLASH(q, k, v, dropout_p, is_causal, False, scale=scale)[0]
        if mask is not None:
            mask = mask.expand(*q.shape[:-1], k.shape[-2])
        return EFFICIENT(q, k, v, mask, True, dropout_p, is_causal, scale=scale)[0]


def rms_norm(input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """`F.rms_norm` as on CUDA."""
    return FusedRMSNorm.apply(input, weight)


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """`F.dropout` as on CUDA, which keeps a mask of bytes."""
    return torch.native_dropout(input, p, True)[0] if training and p > 0 else input


@contextmanager
def simulated(hardware: Hardware) -> Iterator[None]:
    """Have what runs on the meta device run as on `hardware`."""
    with planned(hardware), PlannedOperations(hardware):
        yield


def query_gradients(B: int, T: int, H: int, K: int) -> int:
    """What flash attention's backward pass adds up: the gradient of queries in float32, and a number a row."""
    rows = B * H * (-(-T // 128) * 128)
    return rows * (-(-K // 32) * 32) * 4 + rows * 4


def flash_workspace(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, *others: Any) -> int:
    """Backward pass: `query_gradients`, the gradients of keys and values for every query head, and copies of output and
    its gradient where heads do not lie beside each other in a position."""
    B, H, T, K = q.shape
    expanded = 2 * B * H * k.shape[2] * K * k.element_size() if k.shape[1] != H else 0
    in_place = H * T * K, K, H * K, 1  # strides; a transposed view would be counted as a tensor that came to exist
    copied = sum(x.nbytes for x in (grad, out) if x.stride() != in_place)
    return query_gradients(B, T, H, K) + expanded + copied


def segment_workspace(grad: Tensor, q: Tensor, *others: Any) -> int:
    """As `flash_workspace`, of (B, T, H, K) with as many heads everywhere."""
    return query_gradients(*q.shape)


def efficient_workspace(grad: Tensor, q: Tensor, *others: Any) -> int:
    """Backward pass: products of output and gradient, or the gradient of queries, in float32."""
    return 4 * q.numel()


def embedding_workspace(grad: Tensor, ids: Tensor, n_rows: int, *others: Any) -> int:
    """Backward pass: sorted ids, and sums of up to ten rows each."""
    if ids.numel() <= 3072:
        return 0
    sums = -(-ids.numel() // 10) + min(ids.numel(), n_rows)
    return 6 * 8 * ids.numel() + 4 * sums * grad.shape[-1]


def reduction_workspace(x: Tensor, dims: list[int] | None = None, *others: Any) -> int:
    """Sums of float32 over all but the last dimension, as of a bias: blocks of 64 rows leave 128 sums for a column, as
    long as there are about sixteen blocks for every processor of a large card. (Of narrower types none was seen.)"""
    if x.dtype != torch.float32 or x.dim() < 2 or not dims or {d % x.dim() for d in dims} != set(range(x.dim() - 1)):
        return 0
    rows, columns = x.numel() // x.shape[-1], x.shape[-1]
    blocks = min(-(-rows // 64), REDUCING_BLOCKS // -(-columns // 128))
    return 4 * 128 * columns * blocks if blocks > 1 else 0


def averages_workspace(grad: Tensor, k: Tensor, share: Tensor, counts: Tensor) -> int:
    """Backward pass: what each program adds to the gradient of shares."""
    return 4 * share.numel() * -(-k.shape[-1] // 32)


WORKSPACES: dict[Any, Callable[..., int]] = {  # what a kernel of CUDA holds while it runs
    attention_with_lse_backward: segment_workspace,
    averaged_keys_backward: averages_workspace,
    ATEN.sum.dim_IntList: reduction_workspace,
    ATEN.embedding_dense_backward.default: embedding_workspace,
}
if HAS_ATTENTION:
    WORKSPACES[FLASH_BACKWARD.default] = flash_workspace
    WORKSPACES[EFFICIENT_BACKWARD.default] = efficient_workspace


def rounded(n_bytes: int) -> int:
    """What the allocator takes for `n_bytes`: a multiple of ROUNDING."""
    return -(-n_bytes // ROUNDING) * ROUNDING


@dataclass
class Section:
    """A part of the step, between two marks: how far memory rises above where it began, and where it ends."""

    label: tuple[str, int]
    peak: int = 0
    delta: int = 0


class StorageTracker(ShapeCache):
    """Counts the bytes of all storages that come to exist, until each is freed."""

    def __init__(self, hardware: Hardware = CPU) -> None:
        super().__init__()
        self.on_gpu = hardware.kind == "cuda"
        self.live, self.start = 0, 0
        self.sections: list[Section] = []
        self.known: dict[int, weakref.ref | None] = {}
        self.mark("start")

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Not to count tensors that exist already; they must outlive this."""
        self.known |= {storage_key(tensor.untyped_storage()): None for tensor in tensors}

    def mark(self, name: str, number: int = 0) -> None:
        """Begin a section here."""
        if self.sections:
            self.sections[-1].delta = self.live - self.start
        self.start = self.live
        self.sections.append(Section((name, number)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = self.run(func, args, kwargs or {})
        workspace = WORKSPACES.get(func) if self.on_gpu else None
        self.count(out if isinstance(out, (tuple, list)) else (out,), workspace(*args) if workspace else 0)
        return out

    def count(self, tensors: Iterable[Any], workspace: int = 0) -> None:
        """Note what a kernel returns, and what it holds while it runs."""
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                self.allocate(tensor.untyped_storage())
        section = self.sections[-1]
        section.peak = max(section.peak, self.live + workspace - self.start)

    def allocate(self, storage: torch.UntypedStorage) -> None:
        """Count a storage, once, until it is freed."""
        key = storage_key(storage)
        if key not in self.known:
            n_bytes = rounded(storage.nbytes())
            self.known[key] = weakref.ref(storage, partial(self.free, key, n_bytes))
            self.live += n_bytes

    def free(self, key: int, n_bytes: int, ref: weakref.ref) -> None:
        """Count a storage no more; called when it is gone."""
        self.live -= n_bytes
        del self.known[key]


@contextmanager
def fewer_blocks(model: LanguageModel) -> Iterator[int]:
    """Leave out blocks that are alike, in pairs, and tell how many pairs.

    Blocks count as alike where the model has no more of them than layers: they are then built in one loop.
    """
    blocks = model.blocks
    n = len(blocks)
    pairs = (n - WHOLE + 1) // 2 if n > WHOLE and n == model.config.n_layers else 0
    if pairs:
        model.blocks = blocks[: n - 2 * pairs]
    try:
        yield pairs
    finally:
        model.blocks = blocks


def stretched(sections: list[Section], pairs: int) -> list[Section]:
    """The sections of the whole model: those of its third and fourth block are repeated."""
    if pairs == 0:
        return sections
    found = {section.label: section for section in sections}
    whole = []
    for section in sections:
        whole.append(section)
        if section.label == ("forward", 3):
            whole += [found["forward", 2], section] * pairs
        elif section.label == ("backward", 2):
            whole += [found["backward", 3], section] * pairs
    return whole


@dataclass(frozen=True)
class Pass:
    """Bytes that come on top of weights, gradients and optimizer states in one micro-step: the most in each phase, and
    what is kept from the forward pass (`activations`) to the backward pass, by `blocks` among it."""

    forward: int
    head: int
    backward: int
    activations: int
    blocks: int


NO_PASS = Pass(0, 0, 0, 0, 0)


@contextmanager
def _restored(model: LanguageModel) -> Iterator[None]:
    """Leave a model as it is: gradients, modes of its modules, classes of its blocks and how they are called."""
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(p, p.grad) for p in model.parameters()]
    blocks = [(block, type(block), dict(vars(block))) for block in model.blocks]
    try:
        yield
    finally:
        vars(model).pop("trunk", None)
        for block, kind, attributes in blocks:
            block.__class__ = kind
            vars(block).clear()
            vars(block).update(attributes)
        for p, grad in gradients:
            p.grad = grad
        for module, mode in modes:
            module.training = mode


def simulate(
    model: LanguageModel,
    batch_size: int,
    seq_len: int,
    *,
    hardware: Hardware,
    checkpointing: str = "off",
    accumulate: bool = True,
    in_backward: bool = False,
) -> Pass:
    """One micro-step of a model on the meta device.

    `accumulate`: gradients exist before; without it, those that come to exist are part of the backward phase.
    `in_backward`: each is gone as soon as the optimizer has used it.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    with ExitStack() as contexts:
        contexts.enter_context(_restored(model))
        model.train()
        for p in parameters:
            p.grad = torch.empty_like(p) if accumulate else None
        pairs = contexts.enter_context(fewer_blocks(model))
        contexts.enter_context(simulated(hardware))
        tracker = contexts.enter_context(StorageTracker(hardware))
        forward = True
        tracker.leave_out([*model.parameters(), *model.buffers(), *(p.grad for p in parameters if accumulate)])

        def run(number: int, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if not forward:  # again, in the backward pass, in which autograd knows no function modes
                with PlannedOperations(hardware):
                    return call(*args, **kwargs)
            tracker.mark("forward", number)
            out = call(*args, **kwargs)
            first = out[0] if isinstance(out, tuple) else out
            first.register_hook(lambda grad: tracker.mark("backward", number))
            return out

        def trunk(*args: Any) -> Tensor:
            nonlocal forward
            x = type(model).trunk(model, *args)
            forward = False
            tracker.mark("head")
            return x

        checkpoint_blocks(model, checkpointing)
        undo_compile(model)
        for number, block in enumerate(model.blocks):
            block.forward = partial(run, number, block.forward)
        model.trunk = trunk  # type: ignore[method-assign, assignment]  # of this copy alone
        for p in parameters if in_backward else ():
            contexts.callback(p.register_post_accumulate_grad_hook(forget).remove)
        input_ids, targets = (torch.empty(batch_size, seq_len, dtype=torch.int64, device="meta") for _ in range(2))
        loss, n_targets = LossModule(model)(input_ids, targets)
        tracker.mark("backward", -1)
        (loss / n_targets).backward()
        del loss, n_targets
        tracker.mark("end")
    return _pass_of(stretched(tracker.sections, pairs))


def evaluation_bytes(model: LanguageModel, batch_size: int, seq_len: int, hardware: Hardware) -> int:
    """Peak memory of a pass of a model on the meta device that takes losses without gradients, beyond its weights."""
    ids = torch.zeros(batch_size, seq_len, dtype=torch.int64, device="meta")
    with simulated(hardware), StorageTracker(hardware) as tracker:
        tracker.leave_out([*model.parameters(), *model.buffers(), ids])
        token_losses(model.eval(), ids, ids)
    return max(section.peak for section in tracker.sections) + fixed_bytes(hardware)


def _pass_of(sections: list[Section]) -> Pass:
    """What the sections of a step add up to."""
    most: dict[str, int] = {}
    level = activations = blocks = 0
    for section in sections:
        phase, number = section.label
        phase = "forward" if phase == "start" else phase
        if phase == "head":
            activations = level
        most[phase] = max(most.get(phase, 0), level + section.peak)
        blocks += section.delta if section.label[0] == "forward" else 0
        level += section.delta
    return Pass(most["forward"], most["head"], most["backward"], activations, blocks)


def forget(p: Tensor) -> None:
    """Let a gradient go, as an optimizer in the backward pass does."""
    p.grad = None


@dataclass(frozen=True)
class Memory:
    """Predicted bytes of training, by part, and the most that there are in each phase of a step, everything included.

    `activations_bytes` are what a micro-batch keeps from its forward to its backward pass, `step_bytes` what the
    optimizer holds for the moment of its step; of several GPUs, `buckets_bytes` are gradients on their way and
    `gathered_bytes` weights of other GPUs that are there for a moment.
    """

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    step_bytes: int
    fixed_bytes: int
    phases: dict[str, int]
    buckets_bytes: int = 0
    gathered_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        """Bytes in the phase that needs most."""
        return max(self.phases.values())


def optimizer_states(model: LanguageModel, config: TrainConfig) -> int:
    """Bytes of the optimizer's state."""
    specs = _optimizer(model, config).state_specs().values()
    return sum(rounded(shape.numel() * dtype.itemsize) for spec in specs for shape, dtype in spec.values())


def optimizer_step(model: LanguageModel, config: TrainConfig, hardware: Hardware) -> int:
    """Bytes that a step of the optimizer allocates besides its state, with the norm of all gradients."""
    optimizer = _optimizer(model, config)
    specs, kept = optimizer.state_specs(), []
    for p, spec in specs.items():
        p.grad = torch.empty_like(p)
        state = {field: torch.empty(shape, dtype=dtype, device="meta") for field, (shape, dtype) in spec.items()}
        optimizer.state[p] = state
        kept += [p, p.grad, *state.values()]
    with simulated(hardware), StorageTracker() as tracker:
        tracker.leave_out(kept)
        optimizer.step()
    for p in specs:
        p.grad = None
    return tracker.sections[-1].peak + 2 * ROUNDING * len(specs)


def _optimizer(model: LanguageModel, config: TrainConfig) -> DeviceOptimizer:
    return build_optimizer(model, replace(config, lr=1.0, weight_decay=0.1))


def micro_step(model: LanguageModel, config: TrainConfig, batch_size: int, hardware: Hardware) -> Pass:
    """`simulate` as `config` says."""
    model.compute_dtype = DTYPES[config.precision]
    return simulate(
        model,
        batch_size,
        model.config.seq_len,
        hardware=hardware,
        checkpointing=config.activation_checkpointing,
        accumulate=accumulates(config),
        in_backward=config.optimizer_in_backward,
    )


def accumulates(config: TrainConfig) -> bool:
    """Whether gradients exist before a micro-step."""
    return (config.grad_accum or 2) > 1 and not config.optimizer_in_backward


def predict(model: LanguageModel, config: TrainConfig, batch_size: int, hardware: Hardware) -> Memory:
    """Memory of training a model of the meta device with micro-batches of `batch_size` rows, as `config` says, which
    has optimizer, precision, accumulation and checkpointing filled in. Its weights have the type they are stored in.

    Blocks count as eager: compiled ones keep less."""
    step = micro_step(model, config, batch_size, hardware)
    states, moment = optimizer_states(model, config), optimizer_step(model, config, hardware)
    return training_memory(model, config, hardware, states, moment, step)


def training_memory(
    model: LanguageModel, config: TrainConfig, hardware: Hardware, states: int, moment: int = 0, step: Pass = NO_PASS
) -> Memory:
    """What `predict` says, of the bytes of optimizer states, those of its step, and a micro-step; without the last two
    what is there anyway."""
    stored = sum({id(x): rounded(x.nbytes) for x in (*model.parameters(), *model.buffers())}.values())
    trained = sum(rounded(p.nbytes) for p in model.parameters() if p.requires_grad)
    gradients = 0 if config.optimizer_in_backward else trained
    resting = stored + states + fixed_bytes(hardware)
    during = resting + (gradients if accumulates(config) else 0)
    phases = {name: during + getattr(step, name) for name in ("forward", "head", "backward")}
    phases["backward"] += moment if config.optimizer_in_backward else 0
    phases["optimizer"] = resting + gradients + moment
    return Memory(stored, gradients, states, step.activations, moment, fixed_bytes(hardware), phases)


def saved_tensors(
    block: nn.Module, *args: Any, hardware: Hardware = CPU, **kwargs: Any
) -> list[tuple[tuple[int, ...], torch.dtype, int]]:
    """What autograd keeps of a block's forward pass: shape, type and bytes of storage of every distinct tensor, without
    parameters and the tensors it is given.

    The block and its arguments are of the meta device, or of the hardware's own.
    """
    kept: dict[int, Tensor] = {}  # a tensor that is held keeps its storage's key from being used again
    given = {storage_key(x.untyped_storage()) for x in (*block.parameters(), *block.buffers())}

    def pack(tensor: Tensor) -> Tensor:
        if (key := storage_key(tensor.untyped_storage())) not in given:
            kept.setdefault(key, tensor)
        return tensor

    with simulated(hardware), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(*args, **kwargs)
    return [(tuple(x.shape), x.dtype, x.untyped_storage().nbytes()) for x in kept.values()]
