from collections.abc import Iterator

import pytest
import torch
from torch import distributed

from nnx_cli import models
from nnx_cli.layers.loss import LossModule
from nnx_cli.optim._groups import cast_matrices
from nnx_cli.optim.adamw8bit import eight_bit_matrices
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
    divided = {part.name for part in shards.parts() if part.source is None}
    assert whole and divided.isdisjoint(whole) and len(divided) > len(whole)
    ids = torch.zeros(1, 16, dtype=torch.int64)
    loss, _ = LossModule(model)(ids, ids)
    loss.backward()
    shards.take_gradients()
    assert all(part.grad is not None and part.grad.shape == part.shape for part in shards.local.values())
    assert len(shards.undivided_gradients()) == len(whole)


def test_moments_that_share_scales_are_whole_on_one_rank(two_ranks):
    """Where the rows of a rank are no whole blocks; each rank gets about as many."""
    with torch.device("meta"):
        model = models.build("llama", size="nano", n_layers=4, dim=32, n_heads=2, ffn_dim=129)
    in_blocks = eight_bit_matrices(model)
    shards = Shards(model, two_ranks, torch.device("cpu"), in_blocks)
    names = {name for name, p in shards.blank.named_parameters() if "mlp.gate_up" in name or "mlp.down" in name}
    assert {name for name, p in model.named_parameters() if p in shards.owners} == names
    assert {part.name for part in shards.parts() if part.source is not None} == names
    loads = [sum(p.numel() for p, owner in shards.owners.items() if owner == rank) for rank in range(2)]
    assert loads[0] == loads[1] > 0
