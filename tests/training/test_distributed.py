"""Runs on several processes are those of one."""

import distributed
import numpy as np
import pytest
import torch

from nnx_cli.config import TrainConfig
from nnx_cli.data.loader import Loader
from nnx_cli.system.ranks import ALONE, Ranks
from nnx_cli.training.stepper import Stepper


@pytest.fixture(scope="module")
def differences(tmp_path_factory, token_path):
    """How far losses on two processes are from those on one, of every case, in one launch."""
    return distributed.compare(2, tmp_path_factory.mktemp("ranks"), token_path, distributed.SHORT)


@pytest.mark.parametrize("case", distributed.SHORT, ids=distributed.label)
def test_losses_do_not_depend_on_the_number_of_processes(differences, case):
    assert differences[distributed.label(case)] <= distributed.TOLERANCE[case.get("weight_precision", "fp32")]


class Rank(Ranks):
    """One of several, of whom the others are not there."""

    def __init__(self, rank, count):
        self.rank, self.count = rank, count


@pytest.mark.parametrize(("count", "batch_size", "grad_accum"), [(1, 4, 3), (2, 4, 3), (3, 2, 2), (5, 3, 1), (4, 5, 2)])
def test_ranks_share_the_samples_of_a_step(tokens, tiny, count, batch_size, grad_accum):
    """In the order that one process has, each once; who has fewer gets others without a target."""
    n = batch_size * grad_accum
    settings = distributed.SETTINGS | dict(batch_size=batch_size, grad_accum=grad_accum, weight_decay=0.0)
    loader, found, rows = Loader(tokens.train, 32, seed=3), [], set()
    for rank in range(count):
        stepper = Stepper(tiny("llama", vocab_size=256), loader, TrainConfig(**settings), torch.device("cpu"), print)
        stepper.ranks = Rank(rank, count)
        input_ids, targets = stepper.part(7 * n)
        rows.add((len(input_ids), stepper.n_micro, stepper.micro_rows))
        counted = (targets != -100).any(1)
        found.append(input_ids[counted])
    assert torch.equal(torch.cat(found), loader.batch(7 * n, n)[0])
    (size, n_micro, micro_rows) = rows.pop()
    assert not rows and size == n_micro * micro_rows and micro_rows <= batch_size and count * size - n < count * n_micro


def test_one_process_is_all_there_is():
    value = np.ones(2)
    assert ALONE.gather(value) == [value] and ALONE.first(lambda: value) is value and ALONE.is_first
    assert ALONE.any(True) and not ALONE.any(False)
