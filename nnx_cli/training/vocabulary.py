"""A model's weights for a vocabulary with more ids."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

EQUAL = 1e-3  # relative difference up to which rows count as equally long


def extend_rows(state: Mapping[str, Tensor], model: torch.nn.Module, old: int, new: int) -> dict[str, Tensor]:
    """`state`, with rows for ids from `old` on in every tensor that has a row for each of `new` ids in `model`.

    They are the mean of the other rows, and as long as these where those are all of one length, as on a sphere.
    """
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    extended = dict(state)
    for name, tensor in state.items():
        wanted = shapes.get(name)
        if wanted is not None and wanted != tensor.shape and (tensor.shape[0], wanted[0]) == (old, new):
            row = tensor.float().mean(0, keepdim=True)
            lengths = tensor.float().flatten(1).norm(dim=1) if tensor.dim() > 1 else torch.zeros(1)
            if lengths.min() > (1 - EQUAL) * lengths.max():
                row *= lengths.mean() / row.norm()
            extended[name] = torch.cat([tensor, row.to(tensor.dtype).expand(new - old, *tensor.shape[1:])])
    return extended
