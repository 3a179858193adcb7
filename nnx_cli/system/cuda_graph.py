"""A function of tensors recorded as a CUDA graph."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from itertools import count
from typing import Any, ClassVar

import torch
from torch import Tensor


@cache
def capture_stream(family: str) -> torch.cuda.Stream:
    """Stream that graphs of a family are recorded on, those that are let go together: always the same, for cuBLAS keeps
    a workspace for every stream. PyTorch 2.12 and later give that up with the first graph of a stream that is gone,
    though others have its address (https://github.com/pytorch/pytorch/issues/193402).
    """
    return torch.cuda.Stream()


def on_capture_stream(fn: Callable[[], Any], family: str) -> Any:
    """Run a function on the stream that graphs of a family are recorded on, between what comes before and after."""
    stream = capture_stream(family)
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            return fn()
    finally:  # what is undone after a failure comes after what had begun
        torch.cuda.current_stream().wait_stream(stream)


@contextmanager
def _garbage_kept() -> Iterator[None]:
    """Meanwhile no garbage is collected: a CUDA graph among it would break off a recording when it is destroyed."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _end_failed_recording(pool: tuple[int, int], family: str) -> None:
    """Undo what PyTorch leaves behind of a recording that CUDA has given up: memory that goes to its pool for ever, and
    a random generator that no graph with dropout can be replayed with ("Offset increment outside graph capture")."""
    device = torch.cuda.current_device()
    with suppress(RuntimeError):  # that had ended by itself
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)
    flag = torch.zeros((), device="cuda")
    with (
        _garbage_kept(),
        torch.cuda.graph(torch.cuda.CUDAGraph(), stream=capture_stream(family)),
    ):  # the generator's end too
        flag.zero_()


class CudaGraph:
    """A function recorded once and replayed: one launch for all its kernels, which a host launches slower than a GPU
    runs them.

    `fn` takes copies of `inputs`, which a call fills anew; what it does must depend on nothing but their values. Before
    it is recorded, `warm_up` (by default `fn`) runs on the same stream with the same copies, so that libraries choose
    kernels and make their workspaces. Graphs that never run at once may share the memory `pool` of one of them; those
    of one `family` are let go together (`capture_stream`).

    Raises RuntimeError where something cannot be recorded, torch.OutOfMemoryError where memory does not suffice; the
    current stream, the random generator and graphs recorded before are then what they were.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        inputs: Sequence[Tensor] = (),
        *,
        warm_up: Callable[..., object] | None = None,
        pool: Any = None,
        family: str = "alone",
    ) -> None:
        self.inputs = [x.clone() for x in inputs]
        self.graph = torch.cuda.CUDAGraph()
        on_capture_stream(lambda: (warm_up or fn)(*self.inputs), family)
        pool = torch.cuda.graph_pool_handle() if pool is None else pool
        try:
            # the outer context: torch.cuda.graph stays on its stream where CUDA refuses to end the recording
            with (
                _garbage_kept(),
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(self.graph, stream=capture_stream(family), pool=pool),
            ):
                self.output = fn(*self.inputs)
        except RuntimeError as error:
            _end_failed_recording(pool, family)
            if isinstance(error.__context__, torch.OutOfMemoryError):  # whereupon CUDA refused to end the recording
                raise error.__context__ from None
            raise

    def __call__(self, *inputs: Tensor) -> Any:
        """What `fn` returns for `inputs` of the recorded shapes; its tensors are good until the next call."""
        for recorded, given in zip(self.inputs, inputs, strict=True):
            recorded.copy_(given, non_blocking=True)
        self.graph.replay()
        return self.output

    def pool(self) -> Any:
        """Handle of the graph's memory pool."""
        return self.graph.pool()


class CudaGraphs:
    """A function that is recorded once for every key; what it does must depend on nothing but the key, and the values
    of tensors that stay where they are.

    The first call with a key runs it as it is, for libraries choose kernels and make their workspaces; the second
    records it. Where that cannot be, for want of memory, every call from there on runs it as it is.
    """

    numbers: ClassVar[set[int]] = set()  # of those that are there: each is a family

    def __init__(self, fn: Callable[[], Any]) -> None:
        self.fn = fn
        number = next(number for number in count() if number not in self.numbers)
        self.numbers.add(number)
        weakref.finalize(self, self.numbers.discard, number)
        self.family = f"keys {number}"
        self.recorded: dict[Hashable, CudaGraph | None] = {}  # None: it has run once
        self.fails = False

    def __call__(self, key: Hashable) -> Any:
        """What the function returns; its tensors are good until the next call."""
        if self.fails:
            return self.fn()
        if key not in self.recorded:
            self.recorded[key] = None
            return on_capture_stream(self.fn, self.family)
        graph = self.recorded[key]
        if graph is None:
            pool = next((graph.pool() for graph in self.recorded.values() if graph is not None), None)
            try:
                graph = self.recorded[key] = CudaGraph(self.fn, warm_up=lambda: None, pool=pool, family=self.family)
            except RuntimeError:
                self.fails = True
                return self.fn()
        return graph()
