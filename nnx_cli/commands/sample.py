"""`nnx sample`: text from a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nnx_cli.commands._options import (
    ALIASES,
    Branch,
    Device,
    Model,
    ModelFile,
    Precision,
    command,
    given,
    hidden,
    settings,
)
from nnx_cli.commands._prompt import prompt_ids, read_prompt
from nnx_cli.config import PrepareConfig, SampleConfig, TrainConfig, check_encoding, own_fields, unescape
from nnx_cli.console.output import Output
from nnx_cli.errors import CheckpointError, UsageError, counted

if TYPE_CHECKING:
    from nnx_cli.runs.load import ModelRef

EXAMPLES = """Examples:

  nnx sample --prompt "Once upon a time"
  nnx sample book --num-samples 3 --temperature 0.7
  nnx sample book@last --greedy --max-new-tokens 100"""

# Options of the original NYX that choose the newest run of a shape, and our names of these values.
SHAPE = {name: ALIASES.get(name, name) for name in ("vocab_size", "model_dim", "layer_depth", "num_attention_heads")}

LIKELIEST = "the likeliest token is taken every time"

OPTIONS = [
    *settings(SampleConfig),
    *settings(PrepareConfig, only=("encoding",)),
    hidden("sample_prompt", str),
    hidden("generate_length", int),
    *(hidden(name, int) for name in SHAPE),
]
Stops = Annotated[
    list[str] | None,
    typer.Option(help=r"End a sample before this text (\n, \t, \\: as in code); may be repeated."),
]
STOP = Branch({"stop"}, lambda v: all(v["stop"]), "without text")
DRAWING = (
    Branch({"temperature"}, lambda v: not v["greedy"] or v["temperature"] == 0, f"with --greedy: {LIKELIEST}"),
    Branch(
        {"top_k", "top_p", "min_p", "seed"},
        lambda v: not v["greedy"] and v["temperature"] != 0,
        f"with --greedy or --temperature 0: {LIKELIEST}",
    ),
)
BRANCHES = (
    Branch({"encoding"}, lambda v: v["prompt_file"] or v["prompt"] == "-", "without --prompt-file or --prompt -"),
    STOP,
    Branch(SHAPE, lambda v: v["model"] is None, "beside MODEL: it chooses the newest run of that shape"),
    Branch({"sample_prompt"}, lambda v: v["prompt"] is None, "beside --prompt, which is another spelling of it"),
    Branch({"generate_length"}, lambda v: v["max_new_tokens"] is None, "beside --max-new-tokens: it is the same"),
    *DRAWING,
)


@command(*OPTIONS, branches=BRANCHES)
def run(
    output: Output,
    model: Model = None,
    file: ModelFile = None,
    prompt: Annotated[str | None, typer.Option(help="Text to continue; - reads standard input.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="File with the text to continue.")] = None,
    stop: Stops = None,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Read everything again for every token: slow, same text.")
    ] = False,
    device: Device = TrainConfig.device,
    precision: Precision = TrainConfig.precision,
    **options: Any,
) -> None:
    """Write text with a trained model."""
    prompt = prompt if prompt is not None else options.get("sample_prompt")
    if prompt is not None and prompt_file is not None:
        raise UsageError("--prompt and --prompt-file: give one")
    check_encoding(options["encoding"])
    values = given(options, own_fields(SampleConfig))
    if options.get("generate_length") is not None:
        values.setdefault("max_new_tokens", options["generate_length"])
    config = SampleConfig(**values)
    from nnx_cli.inference.generate import generate
    from nnx_cli.runs.find import find_model
    from nnx_cli.runs.load import load_model
    from nnx_cli.system.device import peak_memory_bytes, pick_device, pick_precision

    where = pick_device(device)
    precision = pick_precision(precision, where)
    shape = {ours: options[theirs] for theirs, ours in SHAPE.items() if options.get(theirs) is not None}
    ref = _newest_of_shape(shape, file) if shape and model is None else find_model(model, file)
    tokenizer = ref.tokenizer
    output.note_reading(prompt)
    text = read_prompt(output, prompt, prompt_file, options["encoding"])
    network = load_model(ref, where, precision)
    asked = bool(text)
    text, ids = prompt_ids(text, ref, network.config.vocab_size)
    _note_what_is_read(output, ref, ids, asked, network.config.seq_len)
    several = config.num_samples > 1

    def show(sample: int, piece: str) -> None:
        if not several:
            output.stream(piece)

    if not several:
        output.stream(text)
    stops = [unescape(text) for text in stop or ()]
    result = generate(network, tokenizer, [ids], config, stops=stops, use_cache=not no_cache, on_text=show)
    if several:
        for number, sample in enumerate(result.samples):
            output.stream(("" if number == 0 else "\n---\n") + text + sample.text)
    output.stream("\n")
    output.note(
        f"{ref.label}: {counted(result.decode_tokens, 'token')}, {result.decode_tokens_per_s:,.0f} tokens/s "
        f"(prompt {result.prefill_tokens_per_s:,.0f} tokens/s)"
    )
    output.show_json(_samples_as_json(ref.label, text, result) | {"peak_memory_bytes": peak_memory_bytes(where)})


def _note_what_is_read(output: Output, ref: ModelRef, ids: list[int], asked: bool, seq_len: int) -> None:
    """Say what a model makes of a prompt, where that may not be what was wanted."""
    from nnx_cli.data.conversations import template_of

    if asked and template_of(ref.tokenizer) is not None:
        output.note("this model was trained on conversations, and continues a prompt like any text: nnx chat asks it")
    if len(ids) > seq_len:
        output.note(f"the prompt has {len(ids):,} tokens; the model sees the last {seq_len:,}")


def _samples_as_json(label: str, prompt: str, result: Any) -> dict[str, Any]:
    """What --json prints of the samples of a model."""
    return {
        "model": label,
        "prompt": prompt,
        "samples": [{"text": s.text, "tokens": len(s.tokens), "stop_reason": s.stop_reason} for s in result.samples],
        "prefill_tokens_per_s": result.prefill_tokens_per_s,
        "decode_tokens_per_s": result.decode_tokens_per_s,
    }


def _newest_of_shape(shape: dict[str, int], file: Path | None) -> ModelRef:
    """The newest run whose model has these values. Raises CheckpointError, saying which runs exist, where there is
    none."""
    from nnx_cli.runs.find import find_runs
    from nnx_cli.runs.load import ModelRef

    seen = []
    for folder in find_runs():
        ref = ModelRef(folder, file=file)
        try:
            model = ref.config["model"]
        except CheckpointError:
            continue  # damaged
        if all(model.get(name) == value for name, value in shape.items()):
            return ref
        seen.append(f"{folder.name} ({', '.join(f'{name} {model.get(name)}' for name in shape)})")
    wanted = ", ".join(f"{name} {value}" for name, value in shape.items())
    raise CheckpointError(
        f"no run has {wanted}; there is {'; '.join(seen[:5]) or 'none'}", fix="train one: nnx train --filepath FILE"
    )
