"""A run with low-rank adapters to a plain model of the same function."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from nnx_cli.errors import QualityError, UsageError
from nnx_cli.evaluation.held_out import sample_windows
from nnx_cli.layers.lora import merge_adapters
from nnx_cli.runs.load import ModelRef, load_model
from nnx_cli.runs.manifest import write_model_folder
from nnx_cli.system.files import new_folder, refuse_existing

TOLERANCE = 1e-4  # largest difference of a logit, in fp32
COMPARED_WINDOWS = 8


@torch.no_grad()
def merge_model(ref: ModelRef, out: Path, device: torch.device) -> dict[str, Any]:
    """Write the folder `out` with the adapters of `ref` added to its weights, compared with the adapter model in fp32.

    The text compared on is the run's validation split, or random tokens where that is gone. Raises UsageError without
    an adapter, OutputError where `out` exists, QualityError where a logit differs by more than TOLERANCE.
    """
    config = ref.config_at(out)
    if not config.pop("lora", None):
        raise UsageError(f"{ref.label} carries no adapter", fix="name a run that was trained with --lora-rank")
    refuse_existing(out)
    adapted = load_model(ref, device)
    merged = copy.deepcopy(adapted)
    merge_adapters(merged)
    shape = adapted.config
    ids = sample_windows(ref, shape.vocab_size, COMPARED_WINDOWS, shape.seq_len).to(device)
    difference = (adapted(ids) - merged(ids)).abs().max().item()
    if not difference <= TOLERANCE:
        raise QualityError(f"the merged model differs from its adapter by {difference:.1e} in a logit")
    parameters = sum(p.numel() for p in merged.parameters())
    with new_folder(out) as folder:
        config |= {"parameters": parameters, "merged_from": ref.label}
        write_model_folder(folder, config, ref.tokenizer, merged.state_without_ties(), ref.file)
    return {"out": str(out), "parameters": parameters, "largest_logit_difference": difference}
