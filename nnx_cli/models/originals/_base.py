"""What reading and writing an original's checkpoints has in common.

A file here has `EMBEDDINGS`, what the original may call its token embedding (a checkpoint is recognised by it);
`reference_config(**arguments)`, the original's constructor arguments as fields of `Config`;
`infer_reference(weights)`, those arguments read off a checkpoint's shapes; and `Tensors`, the names and layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nnx_cli.models._base import LanguageModel


class OriginalTensors:
    """Tensors of a model under its original's names and in that one's layout."""

    def __init__(self, model: LanguageModel) -> None:
        self.model: Any = model
        self.config: Any = model.config

    @property
    def unused(self) -> frozenset[str]:
        """The original's tensors that no output depends on."""
        return frozenset()

    def names(self) -> dict[str, str]:
        """Our names to the original's, of tensors that are the same in both."""
        raise NotImplementedError

    def load(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our tensors from the original's; KeyError for a missing one. Overridden where matrices are packed."""
        return {ours: weights[theirs] for ours, theirs in self.names().items()}

    def save(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The original's tensors from ours, weights or gradients, as far as they are there: undoes `load`."""
        return {theirs: tensors[ours] for ours, theirs in self.names().items() if ours in tensors}
