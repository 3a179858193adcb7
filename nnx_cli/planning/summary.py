"""The figures behind `nnx summarize`."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch

from nnx_cli import models
from nnx_cli.config import TrainConfig
from nnx_cli.layers.lora import check_rank
from nnx_cli.models._base import ModelConfig
from nnx_cli.planning.fit import Predictor, advice, first_that_fits, may_be_divided, strongest
from nnx_cli.planning.flops import count_parameters, file_bytes, flops_per_token, meta_model, sampling_bytes
from nnx_cli.planning.memory import ANY_GPU
from nnx_cli.planning.rates import speeds_by_data_sheet
from nnx_cli.planning.recipe.training import default_tokens_per_step, preferred_optimizer
from nnx_cli.system.device import memory_budget, pick_device

GPUS_GB = (4, 6, 8, 12, 16, 24)
PARALLEL = ("ddp", "fsdp")


def summary(
    name: str, label: str | None, config: ModelConfig, train: TrainConfig, whole: bool = True, n_gpus: int = 1
) -> dict[str, Any]:
    """Everything there is to say of a model, under the keys of --json; memory is that of one of `n_gpus`. Unless it is
    to be `whole`, the largest micro-batch is None where another was asked for and fits."""
    if train.lora_rank is not None:
        check_rank(meta_model(name, config), train.lora_rank)
    device = pick_device("auto")
    predictor = Predictor(name, config, train.lora_rank, device if device.type == "cuda" else ANY_GPU, n_gpus)
    with predictor.shapes:
        model = predictor.model()
        parameters, flops = count_parameters(model), flops_per_token(model)
        weights, cache = sampling_bytes(model)
    tokens_per_step = default_tokens_per_step(model, torch.device("cuda"))
    rows_per_step = max(1, tokens_per_step // config.seq_len)
    preferred, budget = preferred_optimizer(name, train.lora_rank), memory_budget(device, train.vram_bytes)
    chosen, fits = _fitting(predictor, train, preferred, budget, rows_per_step, whole)
    smallest, asked = strongest(train, n_gpus), train.batch_size or 1
    width = models.recipe(name).gpu_half_width
    speeds = speeds_by_data_sheet(config.dim, width, flops["train"], tokens_per_step, train.precision)
    facts: dict[str, Any] = {
        "model": models.stem(name),
        "size": label,
        "seq_len": config.seq_len,
        "vocab_size": config.vocab_size,
        "parameters": parameters,
        "flops_per_token": flops,
        "memory": _parts(predictor, chosen, fits["batch_size"]) | {"sampling_bytes": weights + cache * config.seq_len},
        "cache_bytes_per_token": cache,
        "file_bytes": file_bytes(model),
        "fits": fits,
        "tokens_per_s_by_data_sheet": {gpu: round(speed) for gpu, speed in speeds.items()},
        "trains_in_gb": {str(gb): predictor.fits(smallest, asked, memory_budget(device, gb * 2**30)) for gb in GPUS_GB},
    }
    if n_gpus > 1:
        facts |= {"gpus": n_gpus, "parallel": chosen.parallel, "per_gpu": {}}
        both = train.parallel == "auto" and may_be_divided(train)
        for kind in PARALLEL if both else (chosen.parallel,):
            how, found = _fitting(predictor, replace(train, parallel=kind), preferred, budget, rows_per_step, whole)
            facts["per_gpu"][kind] = {"memory": _parts(predictor, how, found["batch_size"]), "fits": found}
    return facts


def _parts(predictor: Predictor, train: TrainConfig, rows: int) -> dict[str, Any]:
    """Predicted bytes of training, by part."""
    return asdict(predictor.memory(train, rows)) | {"peak_bytes": predictor.peak(train, rows)}


def _fitting(
    predictor: Predictor, train: TrainConfig, preferred: str, budget: int, rows_per_step: int, whole: bool
) -> tuple[TrainConfig, dict[str, Any]]:
    """The settings to train with, and whether and how that fits in `budget`, on each GPU."""
    asked, rows_of_gpu = train.batch_size or 1, -(-rows_per_step // predictor.n_gpus)
    chosen, savers, fits = first_that_fits(predictor, train, asked, budget, preferred)
    largest = None
    if whole or not (fits and train.batch_size):
        largest = predictor.largest(chosen, budget, max(rows_of_gpu, asked), fitting=asked if fits else 0)
    rows = train.batch_size or max(1, min(largest or 0, rows_of_gpu))
    return chosen, {
        "budget_bytes": budget,
        "fits": fits,
        "batch_size": rows,
        "largest": largest,
        "grad_accum": 1 if train.optimizer_in_backward else max(1, -(-rows_per_step // rows)),
        "activation_checkpointing": chosen.activation_checkpointing,
        "optimizer": chosen.optimizer,
        "weight_precision": chosen.weight_precision,
        "predicted_peak_bytes": predictor.peak(chosen, rows),
        "one_sequence_bytes": None if fits else predictor.peak(chosen, 1),
        "gives_up": [saver.text for saver in savers],
        "advice": None if fits else advice(predictor, train, budget, largest or 0),
    }
