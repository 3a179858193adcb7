"""Runs on several processes are those of one."""

import json
import re

import distributed
import numpy as np
import pytest
import torch

from nnx_cli.config import TrainConfig
from nnx_cli.data.loader import Loader
from nnx_cli.runs.run import Run
from nnx_cli.system.machine import missing_to_compile
from nnx_cli.system.ranks import ALONE, Ranks
from nnx_cli.training.stepper import Stepper

CASES = [*distributed.SHORT, *distributed.STOPPED, *distributed.SLOWED, distributed.OWNED]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def outs(once, token_path):
    """The run of every case on two processes, all in one launch; some stop on their way."""
    folder = once("two_ranks", lambda folder: distributed.take(2, folder, token_path, CASES))
    return {distributed.label(case): distributed.run_of(folder, case, 2) for case in CASES}


@pytest.mark.parametrize("case", distributed.SHORT, ids=distributed.label)
def test_losses_do_not_depend_on_the_number_of_processes(outs, folder, token_path, case):
    name = distributed.label(case)
    found = distributed.differences(folder, token_path, [case], [outs[name]])
    assert found[name] <= distributed.TOLERANCE[case.get("weight_precision", "fp32")]


@pytest.mark.long
@pytest.mark.skipif(missing_to_compile() is not None, reason=f"no {missing_to_compile()} here")
def test_compiled_blocks_of_a_divided_model(folder, token_path):
    (case,) = (case for case in distributed.COMPILED if case["model"] == "llama" and case["parallel"] == "fsdp")
    (found,) = distributed.compare(2, folder, token_path, [case]).values()
    assert found <= distributed.TOLERANCE["fp32"]
    assert Run(folder / f"{distributed.label(case)}-2").config["training"]["compile"] == "on"


def test_all_take_smaller_micro_batches_when_one_runs_out_of_memory(outs):
    run = Run(outs[distributed.label(next(case for case in CASES if "fails" in case))])
    assert run.config["training"]["batch_size"] * run.config["training"]["grad_accum"] == 6
    assert run.config["training"]["batch_size"] < 3 and "out of memory at step 2" in run.status()["events"][0]


@pytest.mark.parametrize("case", distributed.SLOWED, ids=distributed.label)
def test_a_rank_that_is_slower_is_named_once(outs, case):
    """By its own work: the other one is as long at a step, for it waits."""
    (event,) = Run(outs[distributed.label(case)]).status()["events"]
    assert re.fullmatch(r"rank 1 \(cpu of .+\) takes \d+ % longer for its part of a step than the others, .+", event)


def test_a_rank_holds_no_more_of_the_others_than_a_file_needs(outs, folder, token_path):
    """A checkpoint and the best weights are written in turn. Moments that cannot be divided are on one rank alone."""
    case = distributed.OWNED
    out = outs[distributed.label(case)]
    first, second = json.loads(out.with_suffix(".json").read_text())
    checkpoint = Run(out).newest_checkpoint()[0]
    weights, moments = (distributed.bytes_of(part.values()) for part in (checkpoint.model, checkpoint.optimizer))
    largest = max(tensor.nbytes for part in (checkpoint.model, checkpoint.optimizer) for tensor in part.values())
    assert weights + moments <= first["most"] <= weights + moments + largest + 2048 < 2 * weights + moments
    late = largest  # what a thread of the backend has sent and lets go of a little later
    assert second["most"] <= largest + late + 2048 < weights
    kept, exact = first["moments"] + second["moments"], sum(t.nbytes for t in checkpoint.optimizer.values())
    counts = sum(t.nbytes for t in checkpoint.optimizer.values() if t.dim() == 0)
    assert exact <= kept <= exact + counts and abs(first["moments"] - second["moments"]) <= counts
    found = distributed.differences(folder, token_path, [case], [out])
    assert max(found.values()) <= distributed.TOLERANCE["fp32"]


def test_a_run_goes_on_with_another_number_of_processes(outs, folder, token_path):
    """Begun on two, whole tensors in its checkpoint, the rest on four, which divide the model if they did before."""
    stopped = [outs[distributed.label(case)] for case in distributed.STOPPED]
    for out in stopped:
        checkpoint = Run(out).newest_checkpoint()[0]
        assert checkpoint.step == 2 and checkpoint.model["embedding.weight"].shape == (256, 32)
    cases = [{name: value for name, value in case.items() if name != "stop_at"} for case in distributed.STOPPED]
    cases, outs = [*cases, distributed.UNEVEN], [*stopped, folder / "uneven"]
    distributed.launch(
        4, token_path, folder / "4.json", [case | {"out": str(out)} for case, out in zip(cases, outs, strict=True)]
    )
    found = distributed.differences(folder, token_path, cases, outs)
    assert max(found.values()) <= distributed.TOLERANCE["fp32"]
    assert all(Run(out).newest_checkpoint()[0].step == distributed.SETTINGS["max_steps"] for out in stopped)
    assert Run(outs[-1]).config["training"]["compile"] == "auto", "for whoever goes on with a whole model"


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
