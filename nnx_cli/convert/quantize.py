"""Run folder to smaller model folder, with a receipt: what it saves, what it costs, how fast it is."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nnx_cli.config import PrepareConfig, SampleConfig
from nnx_cli.convert.sensitivity import rank_layers, unique_matrices
from nnx_cli.data.loader import windows_at
from nnx_cli.errors import DataError, QualityError, UsageError, nearest
from nnx_cli.evaluation.held_out import HeldOutText, held_out_text
from nnx_cli.evaluation.losses import Masked, window_starts
from nnx_cli.inference.generate import generate
from nnx_cli.layers.linear import Linear
from nnx_cli.layers.loss import chunk_rows
from nnx_cli.layers.quantized import (
    Quantization,
    kernels_in_words,
    quantizable,
    quantize,
    quantize_layers,
    stored_in_int8,
    widen,
)
from nnx_cli.models._base import LanguageModel
from nnx_cli.runs.load import ModelRef, fill_model, load_model, model_from_config
from nnx_cli.runs.manifest import BEST, write_model_folder
from nnx_cli.system.files import new_folder, refuse_existing, to_json, write_synced

RELATIVE_DROP = 0.01  # of the loss: what quantizing may cost unless told otherwise
MEASURED_FLOPS = 5e11  # spent on text by each of the two models: a few seconds of a small computer
MEASURED_TOKENS = (4096, 32_768)  # at least and at most
TOKENS_PER_BATCH = 4096
KEPT_SHARE = 0.5  # of the weights, that may stay in 16 bits for the sake of quality: with more, little is saved
NAMED = 4  # layers in an error
DECODED_TOKENS, DECODING_ROUNDS, DECODING_SECONDS = 64, 5, 10.0


@dataclass(frozen=True)
class Judge:
    """The model to quantize, and the text that tells what that costs."""

    ref: ModelRef
    model: LanguageModel
    text: HeldOutText
    token_bytes: np.ndarray | None
    max_drop: float | None
    precision: str
    tell: Callable[[str, float], None]

    def attempt(self, quantization: Quantization) -> Attempt:
        """Quantize in memory, and compare."""
        state = quantized_state(self.model, quantization)
        model = model_from_config(self.ref.config, self.ref.folder, self.ref.file)
        quantize_layers(model, quantization)
        fill_model(model, widen(state), self.ref.folder, self.model.device, self.precision)
        tell = partial(self.tell, "measuring")
        found = compare(self.model, model, self.text.tokens, self.token_bytes, tell, self.text.masked)
        return Attempt(quantization, state, model, found)

    def first_within(self, quantization: Quantization) -> Attempt:
        """As asked where that costs no more than it may; else with the fewest of the most sensitive layers kept that
        suffice, of half of the weights at most. Raises QualityError where those do not."""
        asked = self.attempt(quantization)
        if asked.found.excess(self.max_drop) <= 0:
            return asked
        most = sensitive_layers(self.model, quantization, self.text.tokens, partial(self.tell, "trying each layer"))
        best = self.attempt(with_kept(quantization, most)) if most else asked
        if not best.found.excess(self.max_drop) <= 0:
            raise _too_large_a_drop(asked.found, best.found, self.max_drop, most)
        too_few, enough = 0, len(most)
        while enough - too_few > 1:
            n = (too_few + enough) // 2
            tried = self.attempt(with_kept(quantization, most[:n]))
            if tried.found.excess(self.max_drop) <= 0:
                best, enough = tried, n
            else:
                too_few = n
        return best


@dataclass(frozen=True)
class Attempt:
    """A model quantized in one way: its tensors as they are stored, itself, and what it costs."""

    quantization: Quantization
    state: dict[str, Tensor]
    model: LanguageModel
    found: Comparison


@dataclass(frozen=True)
class Comparison:
    """Two models on the same tokens; losses in nats per token, the divergence of the second from the first too."""

    n_tokens: int
    n_bytes: int | None
    loss_before: float
    loss_after: float
    kl_divergence: float
    same_top_token: float  # share of positions where both find the same token likeliest

    def bits_per_byte(self, loss: float) -> float | None:
        """One of the losses per byte of text, or None where its bytes are not known."""
        return loss * self.n_tokens / math.log(2) / self.n_bytes if self.n_bytes else None

    def in_units(self) -> tuple[float, float, str]:
        """Both losses, in bits per byte where that is known, and what they are in."""
        before, after = self.bits_per_byte(self.loss_before), self.bits_per_byte(self.loss_after)
        if before is None or after is None:
            return self.loss_before, self.loss_after, "nats per token"
        return before, after, "bits per byte"

    def allowed(self, max_drop: float | None) -> float:
        """How much worse the second may be."""
        return RELATIVE_DROP * self.in_units()[0] if max_drop is None else max_drop

    def excess(self, max_drop: float | None) -> float:
        """By how much the second is worse than it may be; infinite where its loss is not finite."""
        before, after, _ = self.in_units()
        return after - before - self.allowed(max_drop) if math.isfinite(after) else math.inf


def quantize_model(
    ref: ModelRef,
    out: Path,
    quantization: Quantization,
    *,
    paths: Sequence[str] = (),
    preparing: PrepareConfig | None = None,
    max_drop: float | None = None,
    device: torch.device,
    precision: str = "fp32",
    tell: Callable[[str, float], None] = lambda what, done: None,
) -> tuple[dict[str, Any], list[str]]:
    """Write the folder `out` with the model of `ref`, quantized; returns the receipt, and lines on how it was measured.

    `max_drop` is in bits per byte (default: RELATIVE_DROP of what the model has). Measures on the text in `paths`, read
    as `preparing` says, or the run's validation split. Where the model loses more than it may, its most sensitive
    layers stay in 16 bits. `tell` hears what is at work and how much of it is done, 0 to 1. Raises OutputError where
    `out` exists, DataError without text, and QualityError, leaving
    nothing behind, where that does not suffice.
    """
    _check_source(ref)
    refuse_existing(out)
    tokenizer = ref.tokenizer
    if max_drop is not None and tokenizer is None:
        raise UsageError(f"--max-drop is in bits per byte; {ref.label} has no tokenizer, so its bytes are not known")
    before = load_model(ref, device, precision)
    _check_kept(before, quantization.kept)
    read = _check_any(before, quantization, ref.label)
    with held_out_text(ref, paths, preparing, lambda event: read.append(event["note"])) as text:
        tokens, n_tokens = text.tokens, len(text.tokens)
        if n_tokens < 2:
            raise DataError("the text to measure on has fewer than two tokens", fix="name a text: --filepath FILE")
        token_bytes = None if tokenizer is None else tokenizer.token_bytes()
        best = Judge(ref, before, text, token_bytes, max_drop, precision, tell).first_within(quantization)
        with new_folder(out) as folder:
            config = ref.config_at(out) | {"quantization": asdict(best.quantization), "quantized_from": ref.label}
            write_model_folder(folder, config, tokenizer, best.state, ref.file)
            prompt = tokens[: max(1, min(16, before.config.seq_len // 2))].tolist()
            speeds = _decoding_speeds((before, best.model), prompt, partial(tell, "decoding"))
            sizes = [path.stat().st_size for path in (ref.weights()[0], folder / BEST)]
            receipt = _write_receipt(folder, out, best, sizes, speeds, _kernels(before, best))
        n_targets = text.n_targets
    notes = [*read, f"measured on {best.found.n_tokens:,} of {n_targets:,} tokens, evenly spread"]
    if added := best.quantization.kept[len(quantization.kept) :]:
        notes.append(f"kept in 16 bits, as --max-drop asks for: {', '.join(added)}")
    return receipt, [*notes, f"matmuls on this machine: {receipt['kernel']}"]


def _check_source(ref: ModelRef) -> None:
    """Raise UsageError where a model is quantized already or carries an adapter."""
    config = ref.config
    if "quantization" in config:
        raise UsageError(f"{ref.label} is quantized already", fix="quantize the run that it was made from")
    if config.get("lora"):
        raise UsageError(f"{ref.label} carries an adapter", fix=f"merge it first: nnx merge {ref.as_argument}")


def _write_receipt(
    folder: Path,
    out: Path,
    done: Attempt,
    file_bytes: Sequence[int],
    speeds: Sequence[float],
    kernel: str,
) -> dict[str, Any]:
    """Write receipt.json: what quantizing saves and costs. `file_bytes` and `speeds` are of before and after."""
    quantization, found = done.quantization, done.found
    before, after = (
        {"file_bytes": size, "bits_per_byte": found.bits_per_byte(loss), "decode_tokens_per_s": speed}
        for size, loss, speed in zip(file_bytes, (found.loss_before, found.loss_after), speeds, strict=True)
    )
    receipt = {
        "bits": quantization.bits,
        "out": str(out),
        "before": before,
        "after": after,
        "kl_divergence": found.kl_divergence,
        "same_top_token": found.same_top_token,
        "kept": quantization.kept,
        "kernel": kernel,
    }
    write_synced(folder / "receipt.json", to_json(receipt))
    return receipt


def _check_kept(model: LanguageModel, kept: Sequence[str]) -> None:
    """Raise UsageError unless every name in `kept` is that of a module with something to quantize in it."""
    layers = list(quantizable(model))
    for name in kept:
        if not any(f"{layer}.".startswith(f"{name}.") for layer in layers):
            raise UsageError(
                f"--keep {name}: this model has no such layer{nearest(name, layers)}",
                fix=f"its layers are {', '.join(layers[:6])}" + (", …" if len(layers) > 6 else ""),
            )


def _check_any(model: LanguageModel, quantization: Quantization, label: str) -> list[str]:
    """What to say of torch's own layers, which stay as they are. Raises UsageError where nothing can be quantized."""
    modules = model.named_modules()
    torchs = [name for name, module in modules if isinstance(module, nn.Linear) and not isinstance(module, Linear)]
    if not quantizable(model, quantization.kept) and not stored_in_int8(model, quantization):
        if quantization.kept:
            raise UsageError(f"--keep leaves nothing of {label} to quantize", fix="keep fewer layers")
        raise UsageError(
            f"none of the layers of {label} can be quantized"
            + (f": {torchs[0]} is torch's own Linear" if torchs else ""),
            fix="train it with Linear of nnx_cli.layers.linear, and an embedding that no layer of torch's shares",
        )
    named = ", ".join(torchs[:NAMED]) + (", …" if len(torchs) > NAMED else "")
    return [f"left in 16 bits, for they are torch's own Linear: {named}"] if torchs else []


def _kernels(before: LanguageModel, done: Attempt) -> str:
    """What multiplies with the quantized matrices, in words."""
    layers = quantizable(before, done.quantization.kept).values()
    return kernels_in_words(done.model, sum(isinstance(layer, Linear) for layer in layers), done.model.compute_dtype)


def sensitive_layers(
    model: LanguageModel, quantization: Quantization, tokens: np.ndarray, on_progress: Callable[[float], None]
) -> list[str]:
    """The layers that suffer most, from the worst on, as many as have no more than KEPT_SHARE of the weights."""
    layers = unique_matrices(model, quantization)
    budget = KEPT_SHARE * sum(layer.weight.numel() for layer in layers.values())
    found = []
    for name in rank_layers(model, quantization, tokens, on_progress):
        if layers[name].weight.numel() <= budget:
            budget -= layers[name].weight.numel()
            found.append(name)
    return found


def with_kept(quantization: Quantization, names: Sequence[str]) -> Quantization:
    """The same with more layers kept."""
    return replace(quantization, kept=[*quantization.kept, *names])


def quantized_state(model: LanguageModel, quantization: Quantization) -> dict[str, Tensor]:
    """The tensors of a float model as `quantize_layers` lets a model expect them; the others in fp16 or bf16."""
    names = (*quantizable(model, quantization.kept), *stored_in_int8(model, quantization))
    owners = {f"{name}.weight": name for name in names}
    state = {}
    for name, tensor in model.state_without_ties().items():
        if name in owners:
            state[name], state[f"{owners[name]}.scale"] = quantize(tensor, quantization)
        else:
            state[name] = narrow(tensor)
    return state


def narrow(tensor: Tensor) -> Tensor:
    """A float tensor in fp16 or bf16, whichever is closer to it (fp16 ends at 65504); others as they are."""
    if not tensor.is_floating_point():
        return tensor
    return min((tensor.half(), tensor.bfloat16()), key=lambda narrowed: float((narrowed.float() - tensor).norm()))


@torch.no_grad()
def compare(
    before: LanguageModel,
    after: LanguageModel,
    tokens: np.ndarray,
    token_bytes: np.ndarray | None,
    on_progress: Callable[[float], None] = lambda done: None,
    masked: Masked | None = None,
) -> Comparison:
    """Both models on evenly spread windows of `tokens`, as many as MEASURED_FLOPS pay for; logits in chunks of rows.
    Where not all tokens count, `masked` says which do."""
    config = before.config
    n_parameters = sum(tensor.numel() for tensor in before.state_without_ties().values())
    n_tokens = min(max(int(MEASURED_FLOPS / (2 * n_parameters)), MEASURED_TOKENS[0]), MEASURED_TOKENS[1])
    seq_len = min(config.seq_len, len(tokens) - 1)
    starts = window_starts(len(tokens), seq_len, max(1, n_tokens // seq_len), masked)
    rows = chunk_rows(TOKENS_PER_BATCH, config.vocab_size)
    sums, count, n_bytes, done = torch.zeros(4, dtype=torch.float64), 0, 0, 0
    for batch in np.array_split(starts, math.ceil(len(starts) * seq_len / TOKENS_PER_BATCH)):
        input_ids, targets = windows_at(tokens, batch, seq_len)
        done, kept = done + len(batch), torch.ones(targets.shape, dtype=torch.bool)
        if masked is not None:
            kept = torch.from_numpy(masked.counts(batch, batch + seq_len, seq_len))
        trunks = [model.trunk(input_ids.to(model.device))[kept.to(model.device)] for model in (before, after)]
        for x, y, target in zip(*(part.split(rows) for part in (*trunks, targets[kept])), strict=True):
            p, q = before.head(x).float().log_softmax(1), after.head(y).float().log_softmax(1)  # (rows, V)
            index = target[:, None].to(p.device)
            found = (
                -p.gather(1, index),
                -q.gather(1, index),
                p.exp() * (p - q),
                (p.argmax(1) == q.argmax(1)).float(),
            )
            sums += torch.stack([each.sum() for each in found]).double().cpu()
        count += int(kept.sum())
        if token_bytes is not None:
            n_bytes += int(token_bytes[targets[kept].numpy()].sum())
        on_progress(done / len(starts))
    if not count:
        raise DataError("no answer stands in the text to measure on", fix="name a text: --filepath FILE")
    means = (sums / count).tolist()
    return Comparison(count, n_bytes or None, *means)


def _too_large_a_drop(
    asked: Comparison, kept: Comparison, max_drop: float | None, layers: Sequence[str]
) -> QualityError:
    """What to say where a model lost more than it may, even with `layers` kept."""
    before, after, unit = asked.in_units()
    again = ""
    if layers:
        names = ", ".join(layers[:NAMED]) + (", …" if len(layers) > NAMED else "")
        again = f"; {kept.in_units()[1]:.4f} with {names} in 16 bits"
    return QualityError(
        f"quantized, the model has {after:.4f} {unit} instead of {before:.4f}: {after - before:.4f} worse, "
        f"and --max-drop is {asked.allowed(max_drop):.4f}{again}",
        fix="allow more with --max-drop, take --bits 8 or a smaller --group-size, or --keep a layer",
    )


def _decoding_speeds(
    models: Sequence[LanguageModel], prompt: list[int], on_progress: Callable[[float], None]
) -> list[float]:
    """Tokens per second of each model alone with one text: the best of several short rounds, taken in turn."""
    started = time.perf_counter()
    best = [0.0] * len(models)
    how = SampleConfig(max_new_tokens=max(2, min(DECODED_TOKENS, models[0].config.seq_len - len(prompt))))
    for turn in range(DECODING_ROUNDS):
        for number, model in enumerate(models):
            best[number] = max(best[number], generate(model, None, [prompt], how).decode_tokens_per_s)
        on_progress((turn + 1) / DECODING_ROUNDS)
        if time.perf_counter() - started > DECODING_SECONDS:
            break
    return best
