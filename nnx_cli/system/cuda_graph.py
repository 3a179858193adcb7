"""A function of tensors recorded as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def capture_stream() -> torch.cuda.Stream:
    """Stream that graphs are recorded on: always the same, for cuBLAS keeps a workspace for every stream."""
    return torch.cuda.Stream()


def on_capture_stream(fn: Callable[[], object]) -> None:
    """Run a function on the stream that graphs are recorded on, between what comes before and after."""
    stream = capture_stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            fn()
    finally:  # what is undone after a failure comes after what had begun
        torch.cuda.current_stream().wait_stream(stream)


class CudaGraph:
    """A function recorded once and replayed: one launch for all its kernels, which a host launches slower than a GPU
    runs them.

    `fn` takes copies of `inputs`, which a call fills anew; what it does must depend on nothing but their values. Before
    it is recorded, `warm_up` (by default `fn`) runs on the same stream with the same copies, so that libraries choose
    kernels and make their workspaces. Graphs that never run at once may share the memory `pool` of one of them.

    Raises RuntimeError where something cannot be recorded, torch.OutOfMemoryError where memory does not suffice; the
    current stream is then the one it was.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        inputs: Sequence[Tensor] = (),
        *,
        warm_up: Callable[..., object] | None = None,
        pool: Any = None,
    ) -> None:
        self.inputs = [x.clone() for x in inputs]
        self.graph = torch.cuda.CUDAGraph()
        on_capture_stream(lambda: (warm_up or fn)(*self.inputs))
        # the outer context: torch.cuda.graph stays on its stream where CUDA refuses to end the recording
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(self.graph, stream=capture_stream(), pool=pool),
        ):
            self.output = fn(*self.inputs)

    def __call__(self, *inputs: Tensor) -> Any:
        """What `fn` returns for `inputs` of the recorded shapes; its tensors are good until the next call."""
        for recorded, given in zip(self.inputs, inputs, strict=True):
            recorded.copy_(given, non_blocking=True)
        self.graph.replay()
        return self.output

    def pool(self) -> Any:
        """Handle of the graph's memory pool."""
        return self.graph.pool()
