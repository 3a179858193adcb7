"""Which architecture is better: every one trained with its own default recipe on the same tokens of the same text.

    python tests/bench/zoo.py --text tinyshakespeare.txt [--size tiny] [--tokens 4000000] [--seeds 3] [--model nyx ...]
                              [--tokenizer char] [--set dropout=0.2 optimizer=muon seq_len=64 ...] [--markdown FILE]

A run has --tokens training tokens at the size's context (tiny: 256); its loss is the mean over the whole validation
split, of the weights at the end. --set overrides settings of the recipe and of the model. Prints the mean over the
seeds and their spread, processor seconds of the last run's steps (what to compare on a CPU that does other work too,
with OMP_NUM_THREADS=1), tokens a second (on a GPU with the step captured as a CUDA graph) and the peak of memory; and
for `--lora RANK` the peak of adapter training beside full training.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from nnx_cli import models
from nnx_cli.config import PrepareConfig, TrainConfig, own_fields
from nnx_cli.data.prepare import prepare
from nnx_cli.data.token_folder import TokenFolder, open_token_folder
from nnx_cli.evaluation.losses import evaluate
from nnx_cli.layers.lora import add_adapters
from nnx_cli.planning.plan import plan_run
from nnx_cli.system.device import (
    describe,
    peak_memory_bytes,
    pick_device,
    pick_precision,
    reset_peak_memory,
    set_seed,
    synchronize,
)
from nnx_cli.training import session
from nnx_cli.training.compilation import follow_length
from nnx_cli.training.observer import Silent
from nnx_cli.training.sampling import Sampling
from nnx_cli.training.trainer import Trainer


def make_trainer(
    name: str,
    size: str,
    data: TokenFolder,
    config: TrainConfig,
    device: torch.device,
    fields: dict[str, Any] | None = None,
) -> Trainer:
    """A trainer as `nnx train` would make it, without a run folder."""
    plan = plan_run(
        name,
        size,
        fields or {},
        config,
        vocab_size=data.vocab_size,
        train_tokens=len(data.train),
        val_tokens=len(data.val),
        device=device,
        precision=pick_precision("auto", device),
        sources={},
    )
    set_seed(config.seed)
    model = models.from_config(name, plan.model_config)
    if config.lora_rank is not None:
        add_adapters(model, config.lora_rank)
    return session.make_trainer(model, data, plan.train, device, Silent(), Sampling([10]))


def take_step(trainer: Trainer, progress: float) -> None:
    """The step at that part of a run, 0 to 1, as `nnx train` takes it."""
    state, stepper = trainer.state, trainer.stepper
    stepper.execution = follow_length(stepper, trainer.config, state, progress)
    state.tokens += trainer.take_step(trainer.lr(progress))
    state.step += 1


def train(trainer: Trainer) -> tuple[float, float, float]:
    """Loss on the validation split after all steps, tokens a second, and seconds of processor time for the steps."""
    config, state = trainer.config, trainer.state
    trainer.model.train()
    trainer.choose_execution("graph")
    synchronize(trainer.device)
    started, used = time.perf_counter(), time.process_time()
    for step in range(config.max_steps):
        take_step(trainer, step / config.max_steps)
    synchronize(trainer.device)
    speed, used = state.tokens / (time.perf_counter() - started), time.process_time() - used
    result = evaluate(
        trainer.model,
        trainer.data.val,
        seq_len=trainer.model.config.seq_len,
        batch_size=16,
        token_bytes=trainer.validation.token_bytes,
    )
    return result.loss, speed, used


def make_trainer_for(
    tokens: int, name: str, size: str, data: TokenFolder, seed: int, device: torch.device, **settings: Any
) -> Trainer:
    """A trainer of as many steps as read so many tokens. `settings` override the default recipe, and fields of the
    model."""
    own = {field.name for field in models.config_fields(name)}
    fields = {key: value for key, value in settings.items() if key in own}
    recipe = {key: value for key, value in settings.items() if key not in own}
    shape = make_trainer(name, size, data, TrainConfig(max_steps=1, seed=seed, **recipe), device, fields).config
    config = TrainConfig(max_steps=tokens // shape.tokens_per_step, seed=seed, **recipe)
    return make_trainer(name, size, data, config, device, fields)


def race(
    name: str, size: str, data: TokenFolder, tokens: int, seeds: int, device: torch.device, **settings: Any
) -> dict[str, Any]:
    """One row of the table. `settings` override the default recipe, and fields of the model."""
    losses, row = [], {}
    for seed in range(seeds):
        reset_peak_memory(device)
        trainer = make_trainer_for(tokens, name, size, data, seed, device, **settings)
        config = trainer.config
        loss, speed, used = train(trainer)
        losses.append(loss)
        row = {
            "model": name,
            "parameters": sum(p.numel() for p in trainer.model.parameters()),
            "step": f"{config.max_steps} x {config.tokens_per_step}",
            "optimizer": config.optimizer,
            "lr": config.lr,
            "set": " ".join(f"{key}={value}" for key, value in settings.items()),
            "loss": statistics.mean(losses),
            "spread": max(losses) - min(losses),
            "processor s": round(used),
            "tokens/s": round(speed),
            "peak MiB": round((peak_memory_bytes(device) or 0) / 2**20),
        }
        del trainer
    return row


def adapter_memory(name: str, size: str, data: TokenFolder, rank: int, device: torch.device) -> float:
    """Peak of adapter training over the peak of full training, same batch."""
    peaks = []
    for lora_rank in (None, rank):
        reset_peak_memory(device)
        config = TrainConfig(max_steps=3, batch_size=8, grad_accum=1, lora_rank=lora_rank)
        train(make_trainer(name, size, data, config, device))
        peaks.append(peak_memory_bytes(device))
    return peaks[1] / peaks[0]


def coerced(name: str, settings: dict[str, str]) -> dict[str, Any]:
    """Settings of the command line in the types of their fields."""
    kinds = {field.name: field.type for field in (*models.config_fields(name), *own_fields(TrainConfig))}
    types = {"int": int, "float": float, "str": str, "bool": lambda text: text == "true"}
    return {key: types[kinds[key]](value) for key, value in settings.items()}


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Rows as a markdown table."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + " --- |" * len(rows[0])]
    for row in rows:
        cells = [
            f"{v:.4f}" if isinstance(v, float) and k != "lr" else f"{v:,}" if isinstance(v, int) else str(v)
            for k, v in row.items()
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--tokens", type=int, default=4_000_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--model", nargs="*", default=models.names())
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tokenizer", default="byte")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--lora", type=int)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    device = pick_device(options.device)
    with tempfile.TemporaryDirectory() as folder:
        prepare([options.text], Path(folder) / "tokens", PrepareConfig(tokenizer=options.tokenizer))
        data = open_token_folder(Path(folder) / "tokens")
        rows = []
        for name in options.model:
            settings = coerced(name, dict(pair.split("=", 1) for pair in options.set))
            rows.append(race(name, options.size, data, options.tokens, options.seeds, device, **settings))
            if options.lora:
                rows[-1]["adapter peak"] = adapter_memory(name, options.size, data, options.lora, device)
            print(table(rows)[-1], flush=True)
    output = "\n".join(
        [
            f"# The zoo, size {options.size}, {options.tokens:,} tokens of {options.text.name}, {options.seeds} seeds",
            "",
            f"{describe(device)}, torch {torch.__version__}, {datetime.date.today().isoformat()}.",
            "",
            *table(rows),
            "",
        ]
    )
    print(output)
    if options.markdown:
        options.markdown.write_text(output, encoding="utf-8")


if __name__ == "__main__":
    main()
