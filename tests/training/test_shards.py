from collections.abc import Iterator

import pytest
import torch
from torch import distributed

from nnx_cli import models
from nnx_cli.layers.loss import LossModule
from nnx_cli.optim._groups import cast_matrices
from nnx_cli.system.ranks import Ranks
from nnx_cli.training.shards import Shards


class Two(Ranks):
    """One of two ranks that talks to nobody."""

    count = 2


@pytest.fixture
def two_ranks() -> Iterator[Ranks]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield Two()
    distributed.destroy_process_group()


def test_weights_of_two_types_are_divided(two_ranks):
    """Matrices in bfloat16 beside gains in float32."""
    with torch.device("meta"):
        model = models.build("llama", size="nano", n_layers=2)
    cast_matrices(model, "bf16")
    shards = Shards(model, two_ranks, torch.device("cpu"))
    whole = {name for name, p in shards.blank.named_parameters() if p.dim() < 2}
    assert whole and shards.divided().isdisjoint(whole) and len(shards.divided()) > len(whole)
    ids = torch.zeros(1, 16, dtype=torch.int64)
    loss, _ = LossModule(model)(ids, ids)
    loss.backward()
    shards.take_gradients()
    assert all(part.grad is not None and part.grad.shape == part.shape for part in shards.local.values())
    assert len(shards.undivided_gradients()) == len(whole)
