"""A decoding step recorded as a CUDA graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nnx_cli.models._base import LanguageModel
from nnx_cli.training.step import capture_stream


class CapturedDecoding:
    """One more token of every row through a model and its cache, launched at once: its hundreds of small kernels run
    many times faster than a processor launches them. The cache becomes static, and has to stay the same.

    Raises RuntimeError where something cannot be recorded, torch.OutOfMemoryError where memory does not suffice; the
    cache is then as it was.
    """

    def __init__(self, model: LanguageModel, cache: Any, input_ids: Tensor) -> None:
        self.cache, self.input_ids = cache, input_ids.clone()  # (R, 1): what a replay reads
        self.graph, stream = torch.cuda.CUDAGraph(), capture_stream()
        restore = cache.snapshot()
        cache.static = True
        try:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                model(self.input_ids, cache=cache)  # libraries choose kernels and make their workspaces
            torch.cuda.current_stream().wait_stream(stream)
            restore()
            with torch.cuda.graph(self.graph, stream=stream):
                self.logits = model(self.input_ids, cache=cache)[:, -1]
        except RuntimeError:
            cache.static = False
            raise
        finally:
            restore()

    def __call__(self, input_ids: Tensor) -> Tensor:
        """Logits (R, V) after tokens (R, 1); good until the next call."""
        self.input_ids.copy_(input_ids)
        self.graph.replay()
        self.cache.note_advance(1)
        return self.logits
