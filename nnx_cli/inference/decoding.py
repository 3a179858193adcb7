"""A decoding step as a CUDA graph."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nnx_cli.models._base import LanguageModel
from nnx_cli.system.cuda_graph import CudaGraph


def decoding_graph(model: LanguageModel, cache: Any, input_ids: Tensor) -> CudaGraph:
    """One more token (R, 1) of every row, through a model and its cache, to logits (R, V). The cache becomes static,
    has to stay the same, and is told of every replay by `note_advance`.

    Raises RuntimeError where something cannot be recorded, torch.OutOfMemoryError where memory does not suffice; the
    cache is then as it was.
    """
    restore = cache.snapshot()

    def warm_up(input_ids: Tensor) -> None:
        model(input_ids, cache=cache)
        restore()

    cache.static = True
    try:
        return CudaGraph(lambda ids: model(ids, cache=cache)[:, -1], (input_ids,), warm_up=warm_up)
    except RuntimeError:
        cache.static = False
        raise
    finally:
        restore()
