"""What the README or page of a model says: measured numbers of its run, and nothing of the machine or its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nnx_cli import __version__
from nnx_cli.errors import CheckpointError
from nnx_cli.models._base import ModelConfig
from nnx_cli.runs.load import ModelRef
from nnx_cli.runs.run import Run
from nnx_cli.system.text import duration

SHAPE = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "seq_len", "vocab_size")


@dataclass(frozen=True)
class Card:
    """Facts of a model; rows are (what, value)."""

    title: str
    origin: str  # a sentence: what it is
    size: list[tuple[str, str]]
    training: list[tuple[str, str]]
    changes: list[str]  # sentences: what the weights went through

    def to_markdown(self, how_to_load: str, tags: list[str], library: str) -> str:
        """The README, with how the format is loaded."""
        head = ["---", f"library_name: {library}", "pipeline_tag: text-generation", "tags:"]
        head += [*(f"- {tag}" for tag in ("nnx", *tags)), "---", "", f"# {self.title}", ""]
        told = f"{self.origin} nnx-cli {__version__} wrote this, opened it with {library}"
        parts = [f"{told} and found that it computes the same as the original."]
        parts += [" ".join(self.changes)] if self.changes else []
        parts += ["## Size", _table(self.size)]
        parts += ["## Training", _table(self.training)] if self.training else []
        parts += ["## Use", how_to_load.strip()]
        return "\n".join(head) + "\n" + "\n\n".join(parts) + "\n"


def _table(rows: list[tuple[str, str]]) -> str:
    """Rows as Markdown; what is a name of the user's stays in its cell."""
    cells = [(what, " ".join(value.replace("|", r"\|").split())) for what, value in rows]
    return "\n".join(["| | |", "| --- | --- |", *(f"| {what} | {value} |" for what, value in cells)])


def make_card(ref: ModelRef, name: str, config: ModelConfig, n_parameters: int, data_name: str | None) -> Card:
    """The card of a MODEL; the name of its data is told where the user gives it."""
    described = ref.config
    tokenizer = described.get("tokenizer") or {}
    size = [("architecture", name), ("parameters", f"{n_parameters:,}")]
    size += [(field, f"{value:,}") for field in SHAPE if isinstance(value := getattr(config, field, None), int)]
    size.append(("tokenizer", str(tokenizer.get("kind", "none: ids"))))
    many = f"{n_parameters / 1e6:,.1f} million" if n_parameters >= 1e6 else f"{n_parameters:,}"
    return Card(
        title=f"{name}, {many} parameters",
        origin=_origin(described),
        size=size,
        training=_training(ref, described, data_name),
        changes=_changes(described),
    )


def _origin(config: Mapping[str, Any]) -> str:
    """What a model is, in a sentence."""
    if not config.get("training"):
        return "A small language model."
    how = "trained further from another's weights" if config.get("init_from") else "trained from scratch"
    return f"A small language model, {how} with nnx-cli."


def _training(ref: ModelRef, config: Mapping[str, Any], data_name: str | None) -> list[tuple[str, str]]:
    """How a run went, as far as its folder says."""
    rows = [] if data_name is None else [("data", data_name)]
    status, step, bits, loss = _reached(ref)
    settings = config.get("training") or {}
    if not settings:
        return rows
    tokens_per_step = settings.get("tokens_per_step")
    known = {
        "steps": step,
        "tokens": step * tokens_per_step if step is not None and tokens_per_step else None,
        "bits per byte of validation text": bits,
        "validation loss, nats per token": loss,
        "optimizer": settings.get("optimizer"),
        "learning rate": settings.get("lr"),
        "tokens a step": tokens_per_step,
        "arithmetic": settings.get("precision"),
        "time of the run": duration(status["time_s"]) if status.get("time_s") else None,
        "versions": ", ".join(f"{what} {version}" for what, version in (config.get("versions") or {}).items()),
    }
    forms = {int: "{:,}", float: "{:.6g}"}
    return rows + [
        (what, forms.get(type(x), "{}").format(x)) for what, x in known.items() if x not in (None, "", "auto")
    ]


def _reached(ref: ModelRef) -> tuple[dict[str, Any], int | None, float | None, float | None]:
    """run.json, and step, bits per byte and loss of the weights that are exported; nothing where nothing is known."""
    if not (ref.folder / "run.json").is_file():
        return {}, None, None, None
    run = Run(ref.folder)
    try:
        status = run.status()
        if ref.which == "best" and (found := run.best_found()) is not None:
            status = status | found
            return status, status["best_step"], status.get("best_val_bits_per_byte"), status.get("best_val_loss")
        if ref.which in ("best", "last"):
            return status, status["step"], status.get("val_bits_per_byte"), status.get("val_loss")
        return status, int(ref.which), None, None
    except (CheckpointError, KeyError):
        return {}, None, None, None


def _changes(config: Mapping[str, Any]) -> list[str]:
    """What became of the weights after training, in sentences."""
    told = []
    if config.get("lora"):
        told.append(f"Low-rank adapters (rank {config['lora']['rank']}) were trained and are merged into the weights.")
    elif config.get("merged_from"):
        told.append("Low-rank adapters were trained and are merged into the weights.")
    if quantization := config.get("quantization"):
        told.append(f"The weights were quantized to int{quantization['bits']} after training.")
    return told
