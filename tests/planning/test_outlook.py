import math
from pathlib import Path

import pytest
import torch

from nnx_cli.config import MILESTONES, TrainConfig
from nnx_cli.planning import outlook as module
from nnx_cli.planning.outlook import MEASURED, outlook, run_folder_bytes, such_runs
from nnx_cli.planning.plan import plan_run

BENCH = Path(__file__).parents[1] / "bench"
CPU = torch.device("cpu")


def planned(tokens, fields=None, **train):
    return plan_run(
        "nyx",
        "nano",
        dict(n_layers=2, dim=64, n_heads=2, seq_len=32) | (fields or {}),
        TrainConfig(device="cpu", **train),
        vocab_size=256,
        train_tokens=len(tokens.train),
        val_tokens=len(tokens.val),
        device=CPU,
        precision="fp32",
        sources={},
    )


@pytest.mark.parametrize(
    "runs", MEASURED, ids=lambda runs: f"{runs.table} {runs.model} {runs.text} {runs.text_bytes:g}"
)
def test_a_measured_loss_stands_in_the_table_that_is_named(runs):
    table = (BENCH / runs.table).read_text(encoding="utf-8")
    assert runs.losses
    for loss in runs.losses.values():
        assert f"{loss:.3f}" in table or f"{loss:.4f}" in table
    assert f"`{runs.model}`" in table or f"| {runs.model} |" in table


def test_steps_are_read_in_full_and_a_time_at_the_nominal_speed(tokens):
    steps = planned(tokens, max_steps=9, batch_size=2, grad_accum=2)
    assert outlook(steps, tokens, CPU).tokens == 9 * 2 * 2 * 32
    clock = planned(tokens, max_time="30s", stop_early="off")
    expected = outlook(clock, tokens, CPU)
    assert expected.tokens == round(30 * clock.tokens_per_s)
    assert expected.epochs == pytest.approx(expected.tokens / len(tokens.train))
    short = outlook(planned(tokens, max_time="30s"), tokens, CPU)
    assert short.epochs == pytest.approx(32, rel=0.05)


def test_the_first_sample_comes_at_the_first_milestone_or_when_it_is_asked_for(tokens):
    def after(**train):
        return outlook(planned(tokens, stop_early="off", max_time="200s", **train), tokens, CPU).first_sample_s

    assert after() == module.START_SECONDS["cpu"] + 200 * MILESTONES[0]
    plan = planned(tokens, stop_early="off", max_time="200s")
    asked = module.START_SECONDS["cpu"] + 70 * plan.train.tokens_per_step / plan.tokens_per_s
    assert after(sample_every=70) == pytest.approx(asked)
    assert after(sample_every=10**9) == module.START_SECONDS["cpu"] + 200
    assert after(sample_every=0) is None


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "muon", "keep": 2},
        {"optimizer": "adamw", "keep": 1},
        {"optimizer": "lion", "keep": 4},
        {"optimizer": "adamw8bit", "keep": 2, "weight_precision": "bf16"},
    ],
    ids=lambda settings: settings["optimizer"],
)
def test_the_run_folder_at_its_fullest_is_as_large_as_was_said(start, tokens, tmp_path, monkeypatch, settings):
    from nnx_cli.runs import checkpoint

    fullest, prune = 0, checkpoint.prune_checkpoints

    def measure(*args):
        nonlocal fullest
        tensors = (tmp_path / "run").rglob("*.safetensors")
        fullest = max(fullest, sum(path.stat().st_size for path in tensors))
        return prune(*args)

    monkeypatch.setattr(checkpoint, "prune_checkpoints", measure)
    settings = settings | {"max_steps": 16, "save_every": 2, "val_every": 2}
    run, trainer = start(tmp_path / "run", fields=dict(dim=64), **settings)
    trainer.train(run, lambda: False)
    said = run_folder_bytes(planned(tokens, **settings, lr=3e-3))
    assert said == pytest.approx(fullest, rel=0.08) and said <= fullest  # which has a head in every file


def test_adapters_have_states_of_their_own_alone(tokens):
    whole, adapters = (run_folder_bytes(planned(tokens, max_steps=4, lora_rank=rank)) for rank in (None, 2))
    assert adapters < 0.7 * whole


def test_such_runs_are_of_that_architecture_size_text_and_length():
    low, high = such_runs("nyx", 0.787e6, 420e3, 8)
    assert (low.text, high.text) == ("documentation", "plays")
    assert low.bits_per_byte == pytest.approx(1.101 / math.log(2)) and high.bits_per_byte < 2.3
    assert such_runs("nyx", 10.7e6, 900e3, 16)[0].text == "code"
    low, high = such_runs("nyx", 34e6, 200e6, 3, is_bpe=True)
    assert (low.bits_per_byte, high.bits_per_byte) == (0.538, 0.602) and low.text == "code"


@pytest.mark.parametrize(
    ("model", "parameters", "text_bytes", "epochs"),
    [
        ("nyx", 350e6, 900e3, 16),
        ("nyx", 2.5e6, 900e3, 16),
        ("nyx", 30e6, 220e6, 3),
        ("nyx", 10.7e6, 900e3, 0.1),
        ("nyx", 0.79e6, 5e3, 32),
        ("nyx", 0.79e6, 900e3, 300),
        ("tape", 0.79e6, 900e3, 4),
        ("my", 10.7e6, 900e3, 4),
    ],
)
def test_nothing_is_said_of_what_was_not_measured(model, parameters, text_bytes, epochs):
    assert such_runs(model, parameters, text_bytes, epochs) is None


def test_every_measured_run_is_like_itself():
    for runs in MEASURED:
        for epochs, loss in runs.losses.items():
            low, high = such_runs(runs.model, runs.parameters, runs.text_bytes, epochs, runs.is_bpe)
            assert low.bits_per_byte <= (loss if runs.is_bpe else loss / math.log(2)) <= high.bits_per_byte


@pytest.mark.parametrize(
    ("device", "fields", "known"),
    [("cpu", {}, True), ("cpu", {"dim": 1024, "n_layers": 8}, False), ("mps", {}, False), ("cuda", {}, True)],
)
def test_nothing_is_said_of_a_start_that_was_not_measured(tokens, device, fields, known):
    found = outlook(planned(tokens, fields, max_steps=4), tokens, torch.device(device))
    assert (found.first_sample_s is not None) == known
