from dataclasses import replace

import pytest
import torch

from nnx_cli import models
from nnx_cli.config import TrainConfig
from nnx_cli.errors import DoesNotFit, MissingFeature, UsageError
from nnx_cli.experiments import benchmark as bench
from nnx_cli.experiments.benchmark import Case, Limits, Row, calls_per_s, measure_all
from nnx_cli.system import timing

CPU = torch.device("cpu")
LIMITS = Limits({"fp32": 1e11}, 1e10)
CONFIG = TrainConfig(device="cpu", compile="off", threads=1)


FIELDS = {"n_layers": 2, "dim": 32, "n_heads": 2, "seq_len": 16}
AS_PLANNED = dict(vocab_size=64, train_tokens=bench.MANY_TOKENS, val_tokens=2, device=CPU, precision="fp32", sources={})


def case(name="llama", batch_size=2, **fields):
    return Case(name, None, models.make_config(name, **({"vocab_size": 64} | FIELDS | fields)), "fp32", batch_size)


def measure(**changes):
    how = dict(
        names=["nyx"],
        size=None,
        fields={"seq_len": 16},
        config=CONFIG,
        batch_sizes=[1],
        precisions=[],
        seconds=0.01,
        tell=lambda line: None,
    )
    return measure_all(**(how | changes))


@pytest.fixture
def no_large_matmuls(monkeypatch):
    monkeypatch.setattr(bench, "measure_limits", lambda device, precisions, seconds: LIMITS)


def test_a_rate_is_the_median_of_rounds(monkeypatch):
    clock = iter([0.0, 0.1] + [0.0, 0.2, 0.0, 0.3, 0.0, 0.4, 0.0, 9.0, 0.0, 0.1])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    assert calls_per_s(lambda: None, CPU, 0.5) == pytest.approx(1 / 0.3)


def test_slow_work_is_done_twice_only(monkeypatch):
    clock, calls = iter([0.0, 3.0]), []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    assert calls_per_s(lambda: calls.append(1), CPU, 2.0) == pytest.approx(1 / 3) and len(calls) == 2


def test_limits_are_of_this_machine():
    limits = bench.measure_limits(CPU, ["fp32"], 0.01)
    assert limits.flops.keys() == {"fp32"} and limits.flops["fp32"] > 1e8 and limits.bytes_per_s > 1e7


def test_a_token_reads_every_weight_once_and_the_cache():
    weights = sum(p.numel() for p in models.from_config("llama", case().config).parameters())
    cache = 2 * 2 * 16 * 4  # two layers, keys and values of one head of 16, fp32
    assert bench.bytes_read(case(), 10) == 4 * weights + 2 * 10 * cache
    untied = case(tie_embeddings=False)
    weights = sum(p.numel() for p in models.from_config("llama", untied.config).parameters()) - 64 * 32
    assert bench.bytes_read(untied, 10) == 4 * (weights + 2 * 32) + 2 * 10 * cache


@pytest.mark.parametrize("name", models.names())
def test_every_architecture_is_measured(name):
    trained = bench.training(case(name), CONFIG, CPU, LIMITS, 0.01, lambda line: None)
    assert trained.tokens_per_s > 0 and trained.compile == "off" and trained.peak_memory_bytes > 0
    assert trained.share == pytest.approx(trained.flops_per_token * trained.tokens_per_s / 1e11)
    decoded = bench.decoding(case(name), CPU, LIMITS, 0.01)
    assert decoded.share == pytest.approx(decoded.bytes_per_step * decoded.tokens_per_s / 2 / 1e10)
    assert decoded.parameters == trained.parameters > 10_000


def test_a_step_trains_on_all_of_a_batch(monkeypatch):
    monkeypatch.setattr(bench, "calls_per_s", lambda work, device, seconds: 10.0)
    assert bench.training(case(batch_size=3), CONFIG, CPU, LIMITS, 1.0, lambda line: None).tokens_per_s == 480


def test_the_machine_its_limits_then_two_rows_for_everything_asked(no_large_matmuls):
    found = measure(names=["nyx", "llama"], size="nano", batch_sizes=[1, 3])
    assert found.machine.keys() == {"date", "device", "threads", "system", "versions"} and found.limits is LIMITS
    assert [(row.model, row.batch_size, row.what) for row in found.rows] == [
        (name, n, what) for name in ("nyx", "llama") for n in (1, 3) for what in ("decoding", "training")
    ]
    assert all(isinstance(row, Row) and row.size == "nano" and row.seq_len == 16 for row in found.rows)


def test_what_does_not_fit_is_a_row_that_says_so(no_large_matmuls, monkeypatch):
    monkeypatch.setattr(bench, "decoding", lambda case, *rest: case.row("decoding"))
    small, large = measure(config=TrainConfig(device="cpu", vram="1.1GB"), batch_sizes=[1, 4096]).rows[1::2]
    assert small.problem is None and large.tokens_per_s is None and "--batch-size 4096 needs" in large.problem
    assert bench.attempt(case(), "training", lambda: raised(torch.OutOfMemoryError())).problem == "out of memory"
    with pytest.raises(ValueError):
        bench.attempt(case(), "training", lambda: raised(ValueError()))


def raised(error):
    raise error


def test_a_step_reads_whole_sequences():
    """Also where a run of that length begins with short ones."""
    of = case(batch_size=4)
    assert bench.plan_run("llama", "nano", FIELDS, CONFIG, **AS_PLANNED).train.short_sequences
    trainer = bench.make_trainer(of, CONFIG, CPU, lambda line: None)
    assert trainer.stepper.part()[0].shape == (of.batch_size, of.config.seq_len)


def test_what_cannot_be_is_refused_before_anything_is_measured(monkeypatch):
    monkeypatch.setattr(bench, "measure_limits", lambda *_: pytest.fail("measured"))
    with pytest.raises(UsageError):
        measure(size="enormous")
    with pytest.raises(MissingFeature):
        measure(precisions=["bf16"])
    with pytest.raises(DoesNotFit):
        bench.training(case(), TrainConfig(device="cpu", vram="1GB"), CPU, LIMITS, 0.01, lambda line: None)


def test_a_trainer_that_had_to_take_less_at_once_is_no_measurement(monkeypatch):
    def shrink(trainer, lr):
        trainer.config = replace(trainer.config, batch_size=1, grad_accum=2)

    monkeypatch.setattr(bench.session.Trainer, "take_step", shrink)
    with pytest.raises(DoesNotFit, match="1 sequence at a time"):
        bench.training(case(), CONFIG, CPU, LIMITS, 0.01, lambda line: None)
