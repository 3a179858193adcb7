import os
import time
import timeit
from dataclasses import replace
from functools import partial

import pytest
import torch

from nnx_cli import models
from nnx_cli.config import TrainConfig
from nnx_cli.errors import DoesNotFit, UsageError
from nnx_cli.models._base import Recipe
from nnx_cli.planning import fit
from nnx_cli.planning import plan as planner
from nnx_cli.planning.plan import affordable_size, plan_run, steps_in
from nnx_cli.planning.recipe import table
from nnx_cli.planning.recipe.training import (
    default_dropout,
    default_lr,
    default_short_sequences,
    default_weight_decay,
    useful_epochs,
)

T, CPU = 32, torch.device("cpu")
CLOCKS = [name + unit for name in ("perf_counter", "monotonic", "time", "process_time") for unit in ("", "_ns")]
FIELDS = dict(n_layers=2, dim=32, n_heads=2, seq_len=T)


def plan(
    fields=FIELDS,
    size="nano",
    train_tokens=100_000,
    model="nyx",
    from_scratch=True,
    may_halve=True,
    device=CPU,
    **train,
):
    return plan_run(
        model,
        size,
        fields,
        TrainConfig(**train),
        vocab_size=256,
        train_tokens=train_tokens,
        val_tokens=10_000,
        device=device,
        precision="fp32",
        sources=dict.fromkeys([*fields, *train], "command line"),
        from_scratch=from_scratch,
        may_halve=may_halve,
    )


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"batch_size": 4, "grad_accum": 3}, (4, 3, 384)),
        ({"batch_size": 4, "tokens_per_step": 384}, (4, 3, 384)),
        ({"grad_accum": 3, "tokens_per_step": 384}, (4, 3, 384)),
        ({"batch_size": 4, "grad_accum": 3, "tokens_per_step": 384}, (4, 3, 384)),
        ({"batch_size": 1, "grad_accum": 1}, (1, 1, 32)),
        ({"tokens_per_step": 32}, (1, 1, 32)),
    ],
)
def test_two_fix_the_third(given, wanted):
    train = plan(max_steps=5, **given).train
    assert (train.batch_size, train.grad_accum, train.tokens_per_step) == wanted


@pytest.mark.parametrize("given", [{}, {"batch_size": 8}, {"grad_accum": 2}, {"tokens_per_step": 2048}])
def test_what_is_free_is_derived_and_said(given):
    planned = plan(max_steps=5, **given)
    train = planned.train
    assert train.batch_size * train.grad_accum * T == train.tokens_per_step
    for field in ("batch_size", "grad_accum", "tokens_per_step"):
        wanted = "command line" if field in given else "derived: device, memory and the other two"
        assert planned.sources[field] == wanted
    assert all(getattr(train, field) == value for field, value in given.items())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch_size": 4, "grad_accum": 3, "tokens_per_step": 400}, "4 x --grad-accum 3 x --seq-len 32 is 384, not"),
        ({"tokens_per_step": 100}, "no multiple of --seq-len 32"),
        ({"batch_size": 3, "tokens_per_step": 320}, "no multiple of --batch-size x --seq-len 96"),
        ({"grad_accum": 3, "tokens_per_step": 320}, "no multiple of --grad-accum x --seq-len 96"),
    ],
)
def test_settings_that_disagree_are_refused(given, message):
    with pytest.raises(UsageError, match=message):
        plan(max_steps=5, **given)


def test_what_does_not_fit_is_refused(monkeypatch):
    with pytest.raises(DoesNotFit, match="not even one sequence fits") as error:
        plan(max_steps=5, vram="1.0001GB")
    assert "smaller --size" in error.value.fix
    with pytest.raises(DoesNotFit, match="a batch of [0-9]+ would fit") as error:
        plan(max_steps=5, batch_size=10**7)
    assert "--batch-size" in error.value.fix
    with pytest.raises(DoesNotFit):
        plan(max_steps=5, grad_accum=1, tokens_per_step=T * 10**7)


def test_vram_bounds_the_micro_batch():
    roomy, tight = (plan(max_steps=5, vram=vram, tokens_per_step=T * 4096).train for vram in ("8GB", "1.1GB"))
    assert tight.batch_size < roomy.batch_size
    assert tight.batch_size * tight.grad_accum == roomy.batch_size * roomy.grad_accum == 4096


def test_what_was_given_up_to_fit_is_recorded():
    fields = dict(n_layers=4, dim=512, n_heads=8, seq_len=512)
    roomy = plan(fields, max_steps=5, vram="8GB", batch_size=4)
    assert roomy.train.activation_checkpointing == "off" and not roomy.savers and roomy.train.weight_precision == "fp32"
    assert 0 < roomy.predict() <= roomy.budget_bytes == 7 * 2**30
    tight = f"{(roomy.predict() * 0.8 + 2**30) / 2**20:.0f}MB"
    planned = plan(fields, max_steps=5, vram=tight, batch_size=4)
    assert planned.train.activation_checkpointing in ("half", "on") and planned.predict() <= planned.budget_bytes
    assert [saver.field for saver in planned.savers] == ["activation_checkpointing"]
    assert "run" in planned.sources["activation_checkpointing"] and planned.train.batch_size == 4
    assert (planned.train.lr, planned.train.max_steps) == (roomy.train.lr, roomy.train.max_steps)
    with pytest.raises(DoesNotFit) as error:
        plan(
            fields,
            max_steps=5,
            vram=tight,
            batch_size=4,
            activation_checkpointing="off",
            optimizer="adamw",
            weight_precision="fp32",
        )
    assert "--batch-size" in error.value.fix


def test_the_optimizer_in_the_backward_pass_has_no_fp16():
    """Nor where a device's best precision is that."""
    with pytest.raises(UsageError, match="--optimizer-in-backward.*fp16"):
        plan_run(
            "nyx",
            "nano",
            FIELDS,
            TrainConfig(max_steps=5, optimizer_in_backward=True),
            vocab_size=256,
            train_tokens=100_000,
            val_tokens=10_000,
            device=torch.device("cpu"),
            precision="fp16",
            sources={},
        )


def test_the_optimizer_in_the_backward_pass_sees_one_micro_batch():
    train = plan(max_steps=5, optimizer_in_backward=True, tokens_per_step=T * 16).train
    assert (train.batch_size, train.grad_accum) == (16, 1)
    assert plan(max_steps=5, optimizer_in_backward=True).train.grad_accum == 1
    given = dict(max_steps=5, optimizer_in_backward=True, tokens_per_step=T * 16)
    assert plan(**given, batch_size=16).train.batch_size == 16
    with pytest.raises(UsageError, match=f"--batch-size 8 x --seq-len {T} is {T * 8}, not --tokens-per-step {T * 16}"):
        plan(**given, batch_size=8)


def test_epochs_become_steps():
    train = plan(epochs=2, batch_size=4, grad_accum=2, train_tokens=10_000).train
    assert train.max_steps == round(2 * 10_000 / (8 * T)) and train.max_time is None
    assert plan(epochs=0.001, batch_size=4, grad_accum=2, train_tokens=10_000).train.max_steps == 1
    assert steps_in(1.0, 1000, 100) == 10


def test_a_length_that_was_given_is_the_only_one():
    assert plan(max_steps=7).train.max_time is None
    by_time = plan(max_time="20m").train
    assert by_time.max_steps == steps_in(32, 100_000, by_time.tokens_per_step) and by_time.max_time_s == 1200
    in_full = plan(max_time="20m", stop_early="off").train
    assert in_full.max_steps is None and in_full.max_time_s == 1200


def test_the_default_length_has_two_ends():
    planned = plan(train_tokens=10_000, batch_size=4, grad_accum=2)
    assert planned.train.max_time_s == table.DEFAULT_SECONDS
    assert planned.train.max_steps == steps_in(32, 10_000, 8 * T)
    assert planned.sources["max_steps"] == "derived: 32 epochs, all that a model of this size can use"
    assert plan(train_tokens=10_000, stop_early="off").train.max_steps is None


@pytest.mark.parametrize(
    ("per_token", "train_tokens", "epochs"),
    [
        (12, 900_000, 16),
        (33, 900_000, 16),
        (14.6, 54_000, 32),
        (1.3, 8e6, 32),
        (43, 2_904_000, 12),
        (148, 846_000, 16),
        (10, 2_904_000, 16),
        (50, 2_500_000, 14),
        (20, 2_904_000, 16),
        (21, 2_904_000, 12),
        (5, 20_000_000, 32),
    ],
)
def test_large_models_need_a_text_less_often(per_token, train_tokens, epochs):
    assert useful_epochs(per_token, train_tokens) == epochs


def test_long_runs_of_new_weights_begin_with_short_sequences():
    def short(fields=FIELDS, **settings):
        return plan(fields, **({"max_steps": 400, "batch_size": 4} | settings)).train.short_sequences

    assert short() == pytest.approx(1 / 3)
    assert short(max_steps=399) == short(from_scratch=False) == short(may_halve=False) == short(lora_rank=2) == 0.0
    assert short(FIELDS | {"seq_len": 31}) == 0.0 and short(short_sequences=0.5, max_steps=9) == 0.5
    assert default_short_sequences(torch.device("cuda"), 256, 5000) == 0.0
    with pytest.raises(UsageError, match="even context"):
        short(FIELDS | {"seq_len": 31}, short_sequences=0.5)


def test_a_longer_time_plans_for_no_more_than_the_text_can_give():
    """So that dropout and decay are those of the epochs that are trained."""
    day, hour = (plan(FIELDS, train_tokens=20_000, max_time=length) for length in ("24h", "1h"))
    assert day.model_config == hour.model_config and day.train.weight_decay == hour.train.weight_decay
    assert day.train.max_steps == hour.train.max_steps


def test_every_value_is_filled_in():
    train = plan().train
    left = {name for name in TrainConfig.__dataclass_fields__ if getattr(train, name) is None}
    assert left <= {
        "epochs",
        "vram",
        "threads",
        "val_every",
        "sample_every",
        "sample_prompt",
        "save_every",
        "patience",
        "lora_rank",
        "val_batches",
        "log_to",
    }
    assert "auto" not in (train.optimizer, train.precision)


def test_given_values_win():
    train = plan(max_steps=50, lr=0.5, optimizer="lion", weight_decay=0.3, warmup_steps=0, val_batches=3).train
    assert (train.lr, train.optimizer, train.weight_decay) == (0.5, "lion", 0.3)
    assert (train.warmup_steps, train.val_batches) == (0, 3)


def lr_of(optimizer, dim, steps=None, **recipe):
    return default_lr(optimizer, dim, Recipe(**recipe), steps)


def test_learning_rate_falls_with_the_width():
    assert lr_of("adamw", 128) == pytest.approx(4e-3)
    assert lr_of("adamw", 512) == lr_of("adamw", 512, muon_lr_factor=2.0) == pytest.approx(1e-3)
    assert lr_of("lion", 512, lr_factor=2.0) == pytest.approx(2e-4)
    assert lr_of("muon", 128) == lr_of("muon", 128, lr_factor=2.0) == pytest.approx(1e-2)
    assert lr_of("muon", 512, muon_lr_factor=2.0) == pytest.approx(5e-3)


def test_muons_learning_rate_falls_less_with_the_width_in_short_runs():
    assert lr_of("muon", 128, 300) == lr_of("muon", 128) == pytest.approx(1e-2)
    assert lr_of("muon", 512, 300) == lr_of("muon", 512, 10) == pytest.approx(4.3e-3)
    rates = [lr_of("muon", 384, steps) for steps in (1000, 1500, 3000, 30_000)]
    assert rates == pytest.approx([5.8e-3, 4.7e-3, 3.3e-3, 3.3e-3])
    rates = [default_lr("muon", 384, models.recipe("ngpt"), steps) for steps in (160, 245, 480)]
    assert rates == pytest.approx([5.8e-3, 4.7e-3, 3.3e-3])
    assert lr_of("adamw", 512, 300) == pytest.approx(1e-3)
    of_tiny = partial(plan, {}, "tiny", 10**8, optimizer="muon")
    short, long = (of_tiny(max_steps=n).train.lr for n in (300, 5000))
    assert short > long == of_tiny(max_steps=300, from_scratch=False).train.lr


def test_warmup_is_a_small_part_of_the_run():
    assert plan(max_steps=1000).train.warmup_steps == 20
    assert plan(max_steps=10**6).train.warmup_steps == 200
    assert plan(max_steps=1).train.warmup_steps <= 1
    assert plan(max_steps=1000, schedule="constant").train.warmup_steps == 0


@pytest.mark.parametrize("name", models.names())
def test_a_size_is_what_the_time_allows(name):
    assert affordable_size(name, 0.0) == "nano"
    assert affordable_size(name, 1e15) in ("nano", "tiny")
    assert affordable_size(name, 1e30) == models.sizes(name)[-1]


@pytest.mark.parametrize("rate", [1e6, 1e12])
def test_auto_size_on_a_cpu_follows_its_kind(monkeypatch, rate):
    monkeypatch.setattr(planner, "nominal_flops", lambda device, precision: rate)
    planned = plan(fields={}, size="auto", max_time="20m")
    assert planned.size == affordable_size("nyx", 1200 * rate)
    assert planned.sources["size"].startswith("derived")


@pytest.mark.parametrize(
    ("train_tokens", "train", "size"),
    [
        (419_000, {}, "tiny"),  # what the text has is in its sixteenth epoch
        (600_000, {}, "small"),
        (1_003_000, {}, "small"),
        (1_003_000, {"max_time": "5s"}, "tiny"),
        (3_000_000, {"max_time": "2m"}, "small"),
        (100_000_000, {"max_steps": 50}, "tiny"),
        (100_000_000, {"epochs": 1.0}, "small"),
        (1_003_000, {"epochs": 1.0}, "tiny"),
    ],
)
def test_auto_size_on_a_gpu_follows_what_the_run_reads(train_tokens, train, size):
    data = planner.Data(256, train_tokens, 10_000)
    assert planner.auto_size("nyx", TrainConfig(**train), torch.device("cuda"), 200e12, data) == size


@pytest.mark.parametrize(("rate", "size"), [(1e12, "tiny"), (200e12, "small")])
def test_auto_size_on_a_gpu_follows_its_kind(rate, size):
    assert planner.auto_size("nyx", TrainConfig(), torch.device("cuda"), rate) == size


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_neither_a_clock_nor_the_load_decides(monkeypatch, device):
    """A plan of a busy machine is that of a quiet one."""
    monkeypatch.setattr(fit, "memory_budget", lambda device, vram_bytes: 2**40)
    if device == "cuda":
        monkeypatch.setattr(planner, "nominal_flops", lambda device, precision: 200e12)
    for module, names in ((time, CLOCKS), (timeit, ["default_timer"]), (os, ["getloadavg", "times"])):
        for name in names:
            monkeypatch.setattr(module, name, lambda *args: pytest.fail("a plan asks how busy the machine is"))
    planned = plan(fields={}, size="auto", train_tokens=3_000_000, max_time="4m", device=torch.device(device))
    found = planned.size, planned.train.optimizer, planned.train.lr, planned.train.tokens_per_step
    assert found == {"cpu": ("nano", "muon", 0.01, 1024), "cuda": ("small", "muon", 0.0025, 16_384)}[device]


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
def test_two_cores_take_the_smallest_size_in_four_minutes(monkeypatch, capability):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    planned = plan(fields={}, size="auto", train_tokens=419_000)
    assert planned.size == "nano" and planned.train.tokens_per_step == 1024
    steps = planned.tokens_per_s * table.DEFAULT_SECONDS / 1024
    assert 2300 < steps < 3800 and (capability != "AVX512" or steps > 3400)


def test_shapes_of_ones_own_have_no_size():
    assert plan(max_steps=5).size is None
    assert plan(fields={"seq_len": 64, "dropout": 0.1}, max_steps=5).size == "nano"


# dropout


@pytest.mark.parametrize(
    ("passes", "per_token", "dropout"),
    [
        (1, 10, 0.0),
        (5.9, 4, 0.0),
        (6, 4, 0.1),
        (12, 4, 0.2),
        (20, 4, 0.3),
        (40, 0.9, 0.3),
        (40, 0.4, 0.0),
        (8, 1.9, 0.1),
        (4.3, 10, 0.0),
        (4.5, 10, 0.1),
        (9, 10, 0.2),
        (3.2, 25, 0.0),
        (3.3, 25, 0.1),
        (6.6, 25, 0.2),
        (16, 12, 0.3),
    ],
)
def test_dropout_where_a_text_is_learnt_by_heart(passes, per_token, dropout):
    assert default_dropout(passes, per_token) == dropout


@pytest.mark.parametrize(
    ("fields", "length", "dropout"),
    [
        ({}, {"epochs": 12.0}, 0.2),
        ({}, {"epochs": 3.0}, 0.0),
        ({}, {"max_steps": 2000}, 0.3),
        ({}, {"max_steps": 20}, 0.0),
        ({"dropout": 0.0}, {"epochs": 12.0}, 0.0),
    ],
)
def test_dropout_follows_from_length_and_text_unless_it_is_given(fields, length, dropout):
    made = planner.plan_run(
        "llama",
        "nano",
        fields,
        TrainConfig(**length),
        vocab_size=256,
        train_tokens=100_000,
        val_tokens=10_000,
        device=torch.device("cpu"),
        precision="fp32",
        sources={},
    )
    assert made.model_config.dropout == dropout
    assert ("dropout" in made.sources) == ("dropout" not in fields)


def test_adapters_are_trained_in_little_memory():
    def made(**settings):
        return planner.plan_run(
            "llama",
            "nano",
            {},
            TrainConfig(max_steps=10, **settings),
            vocab_size=256,
            train_tokens=100_000,
            val_tokens=10_000,
            device=torch.device("cpu"),
            precision="fp32",
            sources={},
        )

    assert made(lora_rank=4).train.activation_checkpointing == "on"
    assert made(lora_rank=4, activation_checkpointing="off").train.activation_checkpointing == "off"
    assert made().train.activation_checkpointing == "off"
    assert made(lora_rank=4).predict() < 0.45 * made().predict()


# optimizer


def test_muon_where_the_text_is_not_read_too_often():
    made = [plan(train_tokens=2_000, epochs=epochs) for epochs in (3.0, 16.0, 17.0)]
    assert [p.train.optimizer for p in made] == ["muon", "muon", "adamw"]
    assert [p.train.lr for p in made] == [lr_of(o, 32) for o in ("muon", "muon", "adamw")]
    assert all(p.sources["optimizer"].startswith("derived: model") for p in made)


@pytest.mark.parametrize(("dropout", "epochs", "optimizer"), [(0.5, 3.0, "muon"), (0.0, 17.0, "adamw")])
def test_dropout_of_ones_own_does_not_change_the_optimizer(dropout, epochs, optimizer):
    made = plan(FIELDS | {"dropout": dropout}, train_tokens=2_000, epochs=epochs)
    assert (made.model_config.dropout, made.train.optimizer) == (dropout, optimizer)


def test_adapters_are_left_to_adamw():
    assert plan(max_steps=5, lora_rank=4).train.optimizer == "adamw"
    assert plan(max_steps=5, lora_rank=4, optimizer="muon").train.optimizer == "muon"


@pytest.mark.parametrize("name", models.names())
def test_an_architecture_may_prefer_another_optimizer(name, monkeypatch):
    assert plan(model=name, max_steps=5).train.optimizer == models.recipe(name).optimizer
    monkeypatch.setattr(models, "recipe", lambda name: Recipe(optimizer="lion"))
    assert plan(model=name, max_steps=5).train.optimizer == "lion"


@pytest.mark.parametrize(("size", "tokens"), [("nano", 1024), ("tiny", 2048)])
def test_small_models_take_small_steps_on_a_processor(size, tokens):
    assert plan({}, size, max_steps=5).train.tokens_per_step == tokens


@pytest.mark.parametrize(
    ("steps", "passes", "dim", "weight_decay"),
    [
        (2000, 0.26, 128, 0.1),  # the least there is
        (300, 0.26, 128, 0.4),  # more in a short run, so that something is forgotten at all
        (300, 2.4, 384, 0.4),  # and no more before a text is read a third time
        (30, 0.26, 128, 0.41),  # but none the more in a shorter one
        (20_000, 0.26, 128, 0.03),  # but a run is not forgotten within itself
        (3400, 3.5, 128, 0.1),
        (3656, 8.9, 128, 0.24),  # more in many steps, also of models that are not wide
        (20_000, 35.0, 128, 0.06),
        (300, 6.0, 128, 0.67),  # more, where a text is read again and again
        (300, 6.0, 64, 0.67),
        (300, 6.0, 256, 1.3),  # and more for wider models
        (300, 10.0, 512, 3.3),
        (300, 30.0, 512, 4.0),
        (3, 30.0, 128, 4.0),  # a step leaves most of a weight
    ],
)
def test_weights_forget_what_they_would_know_by_heart(steps, passes, dim, weight_decay):
    assert default_weight_decay(0.1, "muon", 0.01, steps, passes, dim) == weight_decay


@pytest.mark.parametrize("lr", [1e-9, 1e-6, 1e-3, 10.0])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_derived_weight_decay_is_one_that_may_be_given(lr, optimizer):
    train = plan(max_steps=60, lr=lr, optimizer=optimizer).train
    assert replace(train, weight_decay=train.weight_decay) == train


def test_under_adamw_wide_weights_forget_no_more_than_narrow_ones():
    wide, narrow = (default_weight_decay(0.1, "adamw", 0.01, 300, 30.0, dim) for dim in (512, 128))
    assert wide == narrow == 2.0


def test_weight_decay_follows_the_length_unless_it_is_given():
    short, long = (plan(max_steps=steps, tokens_per_step=1024).train.weight_decay for steps in (200, 20_000))
    assert short > long > 0
    assert plan(max_steps=200, weight_decay=0.3).train.weight_decay == 0.3
    assert plan(model="ngpt", max_steps=200).train.weight_decay == 0.0
