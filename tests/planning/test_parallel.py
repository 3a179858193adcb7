from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import distributed

from nnx_cli import models
from nnx_cli.config import TrainConfig
from nnx_cli.errors import UsageError
from nnx_cli.layers.loss import LossModule
from nnx_cli.planning.fit import Predictor, advice, first_that_fits, fit_memory, rows_of_rank, savings
from nnx_cli.planning.memory import ANY_GPU, CPU
from nnx_cli.planning.parallel import RankDevice, common_budget, rank_device, unlike_note
from nnx_cli.system.ranks import BUCKET_BYTES

GIB = 2**30
PLAIN = dict(precision="fp32", optimizer="adamw", activation_checkpointing="off", weight_precision="fp32")


def predictor(n_gpus, name="llama", size="base", hardware=ANY_GPU):
    return Predictor(name, models.make_config(name, size=size), None, hardware, n_gpus)


@pytest.fixture
def four_ranks() -> Iterator[None]:
    """A process group of four ranks that talks to nobody."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    yield
    distributed.destroy_process_group()


def test_fsdp_takes_what_torch_says_it_does(four_ranks):
    """torch's own tracker, on fake tensors of the CPU; the prediction is not below it."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    config, mesh = models.make_config("llama", size="nano"), init_device_mesh("cpu", (4,))
    with FakeTensorMode():
        model = models.from_config("llama", config)
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        step = fully_shard(LossModule(model), mesh=mesh)
        optimizer = torch.optim.AdamW(step.parameters(), foreach=False)
        tracker = FSDPMemTracker(step, optimizer)
        with tracker:
            for _ in range(2):  # the states exist from the second step on
                ids = torch.zeros(2, config.seq_len, dtype=torch.int64)
                loss, n_targets = step(ids, ids)
                (loss / n_targets).backward()
                optimizer.step()
                optimizer.zero_grad()
                tracker.reset_mod_stats()
        peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    told = predictor(4, "llama", "nano", CPU).peak(TrainConfig(**PLAIN, parallel="fsdp"), 2)
    assert peak <= told < 1.2 * peak


@pytest.mark.parametrize("name", ["llama", "nyx"])
def test_fsdp_divides_what_ddp_copies(name):
    train = TrainConfig(**PLAIN)
    alone = predictor(1, name).memory(train, 1)
    ddp, fsdp = (predictor(4, name).memory(replace(train, parallel=kind), 1) for kind in ("ddp", "fsdp"))
    assert ddp.phases["backward"] == alone.phases["backward"] and 0 < ddp.buckets_bytes <= BUCKET_BYTES
    assert ddp.phases["optimizer"] <= alone.phases["optimizer"] + ddp.buckets_bytes
    for part in ("weights_bytes", "gradients_bytes", "optimizer_bytes"):
        assert getattr(ddp, part) == getattr(alone, part)
        assert getattr(fsdp, part) == pytest.approx(getattr(alone, part) / 4, rel=0.02)
    assert fsdp.activations_bytes == alone.activations_bytes and fsdp.peak_bytes < alone.peak_bytes


def test_more_gpus_take_less_of_each_down_to_what_is_gathered():
    train = TrainConfig(**PLAIN, parallel="fsdp")
    peaks = [predictor(n).peak(train, 1) for n in (2, 4, 8, 64)]
    assert peaks == sorted(peaks, reverse=True)
    last = predictor(64).memory(train, 1)
    assert last.gathered_bytes > 5 * last.weights_bytes


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_the_bounds_hold_on_several_gpus(kind):
    """Also where a block is nearly the whole model."""
    found = Predictor("llama", models.make_config("llama", size="nano", n_layers=1), None, ANY_GPU, 2)
    for settings, _ in savings(TrainConfig(precision="bf16", parallel=kind)):
        for rows in (1, 64):
            assert found.lower_bound(settings) < found.peak(settings, rows)
            assert 1.2 * found.peak(settings, rows) < found.upper_bound(settings, rows)


@pytest.mark.parametrize(
    ("size", "n_gpus", "gib", "kind", "n_savers"),
    [
        ("base", 2, 7, "ddp", 0),
        ("large", 2, 6, "ddp", 1),  # all blocks run again, which costs time alone
        ("xl", 8, 7, "fsdp", 0),
        ("xl", 2, 7, "fsdp", 2),  # 8-bit moments, where a GPU alone would also take bf16 weights
        ("xl", 4, 23, "ddp", 0),
        ("xl", 2, 1, "fsdp", 3),  # fits in no way: nearest to it
    ],
)
def test_the_model_is_divided_where_a_gpu_would_not_hold_it(size, n_gpus, gib, kind, n_savers):
    settings, savers, fits = first_that_fits(predictor(n_gpus, size=size), TrainConfig(precision="bf16"), 1, gib * GIB)
    assert (settings.parallel, len({saver.field for saver in savers}), fits) == (kind, n_savers, gib > 1)


def test_what_was_asked_for_is_not_chosen():
    train = TrainConfig(precision="bf16", parallel="ddp")
    assert first_that_fits(predictor(8, size="xl"), train, 1, 3 * GIB)[2] is False
    assert advice(predictor(8, size="xl"), train, 3 * GIB, 0) == "leave out --parallel"
    assert "more GPUs" in advice(predictor(2, size="xl"), replace(train, parallel="auto"), 2 * GIB, 0)


@pytest.mark.parametrize("asked", [dict(optimizer_in_backward=True), dict(precision="fp16")], ids=str)
def test_what_needs_whole_gradients_is_not_divided(asked):
    train = TrainConfig(**(dict(precision="bf16") | asked))
    assert first_that_fits(predictor(8, size="xl"), train, 1, 2 * GIB)[0].parallel == "ddp"
    with pytest.raises(UsageError, match="not --parallel fsdp"):
        replace(train, parallel="fsdp")


@pytest.mark.parametrize("n_ranks", [1, 2, 3, 4, 8, 100])
def test_tokens_of_a_step_depend_on_no_number_of_gpus(n_ranks):
    config = models.make_config("llama", size="nano")
    ranks = [RankDevice("a GPU", 7 * GIB, 1e14)] * n_ranks
    for given in ({}, {"batch_size": 4}, {"grad_accum": 2}, {"batch_size": 8, "grad_accum": 4}):
        train = TrainConfig(precision="fp32", tokens_per_step=32 * config.seq_len, **given)
        fitted = fit_memory(train, config, "llama", torch.device("cpu"), "adamw", ranks)
        B, A = (fitted.values[field].value for field in ("batch_size", "grad_accum"))
        assert B * A == 32 and fitted.tokens_per_step == train.tokens_per_step
        if not given:
            assert max(1, -(-32 // n_ranks)) >= B and (n_ranks > 32 or 32 % n_ranks or A % n_ranks == 0)


def test_rows_of_a_rank():
    assert rows_of_rank(8, 4, 2) == 8 and rows_of_rank(8, 1, 2) == 4 and rows_of_rank(5, 1, 2) == 3
    assert rows_of_rank(8, None, 16) == 8 and rows_of_rank(1, 1, 9) == 1


def test_the_smallest_gpu_sets_the_micro_batch():
    large, small = RankDevice("H200", 130 * GIB, 7e14), RankDevice("RTX 3060", 11 * GIB, 2e13)
    assert common_budget([large, small]) == 11 * GIB
    assert unlike_note([large, large]) is None and unlike_note([large]) is None
    said = unlike_note([large, small, large])
    assert said.startswith("rank 1 (RTX 3060) sets the micro-batch: 11.0 GiB, others have 130.0; rank 1 (RTX 3060)")
    assert said.endswith("sets the pace: about 3 % of the fastest")
    busy = replace(large, budget_bytes=60 * GIB)
    assert unlike_note([busy, large]) == "rank 0 (H200) sets the micro-batch: 60.0 GiB, others have 130.0"
    assert unlike_note([large, replace(large, budget_bytes=125 * GIB)]) is None


def test_ranks_on_a_cpu_share_its_memory():
    alone, one_of_four = (rank_device(torch.device("cpu"), "fp32", None, n) for n in (1, 4))
    assert one_of_four.budget_bytes == alone.budget_bytes // 4
    assert rank_device(torch.device("cpu"), "fp32", 8 * GIB, 4).budget_bytes == 7 * GIB
