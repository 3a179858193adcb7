"""`nnx summarize`: what a model is made of and what it costs, without weights and without a GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nnx_cli import models
from nnx_cli.commands._options import (
    ARCHITECTURE_HELP,
    COMMAND_LINE,
    TRAINING,
    AllBut,
    Branch,
    check_read,
    command,
    field_branches,
    given,
    model_fields,
    model_options,
    runs_named,
    settings,
)
from nnx_cli.commands._ranks import how_many
from nnx_cli.config import TrainConfig, check_choice, check_range, own_fields
from nnx_cli.console.output import Output
from nnx_cli.errors import DoesNotFit, MissingFeature, UsageError, counted, quoted
from nnx_cli.system.text import size

if TYPE_CHECKING:
    from nnx_cli.models._base import ModelConfig

EXAMPLES = """Examples:

  nnx summarize --vram 8GB
  nnx summarize --model nyx --size tiny
  nnx summarize book"""

DEFAULT_SIZE = "small"
MOST_GPUS = 2**16
SETTINGS = (
    "vram",
    "batch_size",
    "optimizer",
    "weight_precision",
    "activation_checkpointing",
    "optimizer_in_backward",
    "lora_rank",
    "parallel",
)
OF_A_RUN = "beside a MODEL: it has its own shape"
BRANCHES = (
    Branch(AllBut("ref", "model", "bank_file", "precision", "gpus", *SETTINGS), lambda v: v["ref"] is None, OF_A_RUN),
    Branch({"model"}, lambda v: v["ref"] is None or models.is_file(v["model"]), OF_A_RUN),
    Branch({"model"}, lambda v: not v["all"], "with --all, which shows every architecture"),
    Branch({"parallel"}, lambda v: _count(v["gpus"]) > 1, "on one GPU", "add --gpus 2"),
)
OF_A_GPU = "memory of a GPU, here or not, such as 8GB; 1 GiB of it is kept for the driver and the screen"
OF_ANY_GPU = [replace(field, help=OF_A_GPU) if field.name == "vram" else field for field in own_fields(TrainConfig)]
SHOWN_GPUS = "RTX 3060", "RTX 4060", "RTX 4090", "H100"  # of those whose speed is told
WAITING = "counting operations and memory (loading PyTorch takes some seconds)"


@command(*model_options(), *settings(OF_ANY_GPU, only=SETTINGS), branches=BRANCHES)
def run(
    output: Output,
    ref: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Run folder or its name.", autocompletion=runs_named)
    ] = None,
    model: Annotated[str | None, typer.Option(help=ARCHITECTURE_HELP)] = None,
    size: Annotated[
        str | None, typer.Option(help="Named size: nano, tiny, small, base, large, xl.", show_default=DEFAULT_SIZE)
    ] = None,
    all: Annotated[bool, typer.Option("--all", help="Set the whole zoo side by side.")] = False,
    precision: Annotated[str, typer.Option(help="Arithmetic in training: fp32, bf16, fp16.")] = "bf16",
    gpus: Annotated[
        str, typer.Option(help="GPUs to train on, or all that are here; memory is then that of each.")
    ] = "1",
    **options: Any,
) -> None:
    """Show layers, parameters, FLOPs, memory, file sizes, and whether training fits."""
    check_choice("precision", precision, ("fp32", "bf16", "fp16"))
    n_gpus = _count(gpus)
    train = TrainConfig(precision=precision, **given(options, [TRAINING[name] for name in SETTINGS]))
    fields = given(options, model_fields(model).values())
    named = model if model is not None and models.is_file(model) else fields.get("bank_file")
    file = None if named is None else Path(named)
    if all or (ref is None and model is None and not fields):
        shapes = {name: models.make_config(name, size=size or DEFAULT_SIZE, **fields) for name in models.names()}
        with output.spinner(WAITING):
            from nnx_cli.planning.summary import summary

            zoo = [summary(name, size or DEFAULT_SIZE, config, train, n_gpus=n_gpus) for name, config in shapes.items()]
        output.show_json(zoo)
        show_zoo(output, zoo)
        output.note(
            "a run takes the time you give it (--max-time); what it reads in an hour: nnx summarize --model NAME"
        )
        return
    if ref is not None:
        name, label, config = of_run(ref, file)
    else:
        name = model or "nyx"
        models.check_name(name)
        label, config = size or DEFAULT_SIZE, models.make_config(name, size=size or DEFAULT_SIZE, **fields)
        check_read(field_branches(config), {}, dict.fromkeys(fields, COMMAND_LINE))
        if models.is_file(name):
            from nnx_cli.models._check import check_model

            check_model(name, config)
    with output.spinner(WAITING):
        from nnx_cli.planning.fit import SMALLER
        from nnx_cli.planning.summary import summary
        from nnx_cli.system.device import budget_words, check_cap

        facts = summary(name, label, config, train, whole=output.json, n_gpus=n_gpus)
    fits = facts["fits"]
    room = budget_words(fits["budget_bytes"], train.vram_bytes)
    output.show_json(facts)
    show_layers(output, name, config)
    show_facts(output, facts, train, room)
    if not fits["fits"] and (train.vram or train.batch_size):
        check_cap(train.vram_bytes)
        _refuse(fits, room, see_all(train) if ref is not None and fits["advice"] == SMALLER else fits["advice"])


def _refuse(fits: dict[str, Any], room: str, fix: str) -> None:
    """Raise DoesNotFit for a batch that takes more than the `room` there is."""
    enough = f"--batch-size {fits['largest']} would" if fits["largest"] else "not even one sequence does"
    if not fits["largest"] and fits["batch_size"] > 1:
        enough += f", which takes {fits['one_sequence_bytes'] / 2**30:.2f} GiB"
    peak = f"{fits['predicted_peak_bytes'] / 2**30:.2f} GiB"
    raise DoesNotFit(f"a batch of {fits['batch_size']} takes {peak} and does not fit in {room}; {enough}", fix=fix)


def _count(gpus: str) -> int:
    """The GPUs of --gpus, which need not be here unless all are meant. Raises UsageError, MissingFeature."""
    if gpus == "all":
        try:
            return how_many(gpus, "auto")
        except MissingFeature as error:
            error.fix = "say how many: --gpus 4"
            raise
    if not (gpus.isascii() and gpus.isdecimal()):
        raise UsageError(f"--gpus is {gpus!r}; it must be a number of GPUs, or all")
    n_gpus = int(gpus)
    check_range("gpus", n_gpus, 1, MOST_GPUS)
    return n_gpus


def see_all(train: TrainConfig) -> str:
    """What shows which models fit, to somebody whose own does not."""
    return "see what fits: nnx summarize --all" + (f" --vram {quoted(train.vram)}" if train.vram else "")


def of_run(spec: str, file: Path | None = None) -> tuple[str, str | None, ModelConfig]:
    """Architecture, size and configuration of a run's model."""
    from nnx_cli.runs.find import find_model
    from nnx_cli.runs.load import architecture_of, model_from_config

    found = find_model(spec, file)
    config = found.config
    model = model_from_config(config, found.folder, file)
    return architecture_of(config, found.folder, file), config["model"].get("size"), model.config


def show_layers(output: Output, name: str, config: ModelConfig) -> None:
    """The table of layers: torchinfo walks the modules; shapes and counts are of one sequence. Its totals are not
    used."""
    if output.json:
        return
    import torch
    import torchinfo

    from nnx_cli.planning import flops as cost
    from nnx_cli.planning.shapes import ShapeCache

    model = cost.meta_model(name, config)
    ids = torch.zeros(1, config.seq_len, dtype=torch.int64, device="meta")
    with ShapeCache():
        layers = torchinfo.summary(
            model, input_data=[ids], depth=5, verbose=0, device="meta", mode="train"
        ).summary_list
    alike = copies(model)
    hidden = {id(part) for block, n in alike.items() if n == 0 for part in block.modules()}
    seen: set[int] = set()
    rows = []
    for layer in layers:
        module = layer.module
        if id(module) in hidden:
            continue
        own = {id(p) for p in module.parameters(recurse=False)}
        inside = sum({id(p): p.numel() for p in module.parameters()}.values())
        times = f" … {int(layer.var_name) + alike[module] - 1}" if alike.get(module, 1) > 1 else ""
        count = "tied" if own and own <= seen else f"{inside:,}" + (f" x {alike[module]}" if times else "")
        seen |= own
        rows.append(
            [
                "  " * layer.depth + (layer.var_name or models.stem(name)) + times,
                layer.class_name,
                shape_text(layer.output_size),
                count,
            ]
        )
    output.table(["layer", "kind", "output of one sequence", "parameters"], rows)


def copies(model: Any) -> dict[Any, int]:
    """For the blocks of a model: how many in a row are built alike, at the first of them; 0 at the others."""
    counts: dict[Any, int] = {}
    first, shapes = None, None
    for block in model.blocks:
        own = [(key, p.shape) for key, p in block.named_parameters()]
        if own == shapes:
            counts[first] += 1
            counts[block] = 0
        else:
            first, shapes = block, own
            counts[block] = 1
    return counts


def shape_text(shape: Any) -> str:
    """A shape as 1 x 256 x 384; nothing for a module without one output."""
    return " x ".join(str(n) for n in shape) if shape and all(isinstance(n, int) for n in shape) else ""


def show_facts(output: Output, facts: dict[str, Any], train: TrainConfig, room: str) -> None:
    """One model's numbers, trained as `train` has it in the `room` there is."""
    parameters, memory, flops = facts["parameters"], facts["memory"], facts["flops_per_token"]
    files = ", ".join(f"{kind} {size(n)}" for kind, n in facts["file_bytes"].items())
    gpus = [gb for gb, trains in facts["trains_in_gb"].items() if trains]
    trained = facts.get("per_gpu") or {None: facts}
    kind = f"{facts['gpus']} GPUs" if "gpus" in facts else "GPUs"
    at_once = f", {counted(train.batch_size or 1, 'sequence')} at once"
    adapters = f"; {parameters['trainable']:,} of them are trained" if train.lora_rank is not None else ""
    output.show(
        f"{facts['model']} {facts['size'] or 'of your shape'}: {parameters['total']:,} parameters "
        f"({parameters['embedding']:,} in the embedding){adapters}",
        f"forward {flops['forward'] / 1e6:,.1f} MFLOP a token, training {flops['train'] / 1e6:,.1f}",
        *(line for kind, how in trained.items() for line in training_lines(how, facts["seq_len"], kind, room)),
        *([f"--parallel auto is {facts['parallel']}"] if len(trained) > 1 else []),
        f"sampling: {size(memory['sampling_bytes'])}, cache {size(facts['cache_bytes_per_token'])} a token",
        f"file: {files}",
        f"million tokens that one GPU reads in an hour of training, about: {_read_in_an_hour(facts)} "
        "(by data sheets; measured on H100 and H200 alone)",
        (f"trains on {kind} with {', '.join(gpus)} GB" if gpus else f"trains on no {kind} of up to 24 GB") + at_once,
    )


def _read_in_an_hour(facts: dict[str, Any]) -> str:
    """Millions of tokens that training reads on GPUs which need not be here, in two digits."""
    speeds = facts["tokens_per_s_by_data_sheet"]
    return ", ".join(f"{gpu} {float(f'{3600 * speeds[gpu] / 1e6:.2g}'):,g}" for gpu in SHOWN_GPUS)


def training_lines(facts: dict[str, Any], seq_len: int, parallel: str | None, room: str) -> list[str]:
    """Memory of training on a GPU, of several where `parallel` says in which way, and what is given up for that."""
    memory, fits = facts["memory"], facts["fits"]
    parts = {"weights": "weights", "gradients": "gradients", "optimizer": "optimizer", "activations": "activations"}
    parts |= {"buckets": "gradients on their way", "gathered": "gathered blocks"} if parallel else {}
    shown = ", ".join(f"{text} {size(memory[f'{part}_bytes'])}" for part, text in parts.items())
    rest = memory["peak_bytes"] - sum(memory[f"{part}_bytes"] for part in parts)
    shown += f", working memory {size(rest)}" if rest > 0 else ""
    how = f"{parallel}, on each GPU" if parallel else "training"
    verdict = "fits" if fits["fits"] else "does not fit"
    return [
        f"{how} with {fits['batch_size']} x {seq_len} tokens at once: {shown}; "
        f"peak about {size(memory['peak_bytes'])}, {verdict} in {room}",
        *(f"  {text}" for text in fits["gives_up"]),
    ]


def show_zoo(output: Output, zoo: list[dict[str, Any]]) -> None:
    """The architectures side by side."""
    rows = []
    for facts in zoo:
        gpus = [gb for gb, trains in facts["trains_in_gb"].items() if trains]
        parameters, flops = facts["parameters"]["total"], facts["flops_per_token"]["train"]
        rows.append(
            [
                facts["model"],
                f"{parameters / 1e6:,.2f} M",
                f"{flops / 1e6:,.0f} M",
                size(facts["memory"]["peak_bytes"]),
                facts["fits"]["batch_size"],
                size(facts["cache_bytes_per_token"]),
                size(facts["file_bytes"]["int8"]),
                f"{gpus[0]} GB" if gpus else "–",
            ]
        )
    first = zoo[0]
    title = f"size {first['size']}, vocabulary {first['vocab_size']:,}, {first['seq_len']:,} tokens of context"
    columns = ["model", "params", "FLOP/tok", "peak", "batch", "cache/tok", "int8", "from"]
    output.table(columns, rows, title)
