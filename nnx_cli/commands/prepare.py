"""`nnx prepare`: text to token folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from nnx_cli.commands._options import ROW_FIELDS, Branch, command, given, may_have_rows, settings
from nnx_cli.config import PrepareConfig, own_fields, parse_bytes
from nnx_cli.console.output import Output
from nnx_cli.console.progress import Progress
from nnx_cli.errors import Interrupted, UsageError, counted, quoted
from nnx_cli.system.signals import half_made
from nnx_cli.system.text import size

EXAMPLES = """Examples:

  nnx prepare book.txt
  nnx prepare books/ 'web-*.jsonl.gz' --out data/mine
  nnx prepare chats.jsonl --prompt-key question --answer-key answer"""

MEMORY = f"{PrepareConfig.max_memory_bytes >> 20}MB"
NAME_COLUMNS, LINE_CHARS = 17, 60  # of the first lines as tokens
SUITS = "suits so much text; --size of train"
SUITS_WITH_A_GPU = "suits so much text, given a GPU and time; without --size, train takes what this machine can"
TOKEN_MARK = "·"  # between two of them
BRANCHES = (
    Branch({"val_fraction"}, lambda v: v["val"] is None, "with --val: all of the other text is trained on"),
    Branch(ROW_FIELDS, lambda v: may_have_rows(_texts(v)), "with plain text: it names a field of rows"),
)


def _texts(options: Mapping[str, Any]) -> list[str]:
    """All text to read."""
    named = (options["filepath"], options["val"])
    return [*(options["paths"] or []), *(path for path in named if path)]


@command(*settings(PrepareConfig, without=["max_memory_bytes"]), branches=BRANCHES)
def run(
    output: Output,
    paths: Annotated[list[str] | None, typer.Argument(help="Files, folders, globs, or - for standard input.")] = None,
    filepath: Annotated[str | None, typer.Option(help="A further path, as `train` takes it.")] = None,
    out: Annotated[Path | None, typer.Option(help="Token folder to make.", show_default="data/NAME-HASH")] = None,
    val: Annotated[
        str | None, typer.Option(help="Text to validate on, not to train on; else a part of the input.")
    ] = None,
    max_memory: Annotated[str | None, typer.Option(help="Bound on memory, such as 512MB.", show_default=MEMORY)] = None,
    **options: Any,
) -> None:
    """Turn text into a token folder: files, folders, globs, standard input; txt, md, jsonl, csv, parquet, compressed or
    not, in zip and tar archives too."""
    sources = [*(paths or []), *([filepath] if filepath else [])]
    if not sources:
        raise UsageError("nothing to prepare", fix="name files, folders, globs, or - for standard input")
    limit: dict[str, Any] = {"max_memory_bytes": parse_bytes(max_memory)} if max_memory else {}
    config = PrepareConfig(**given(options, own_fields(PrepareConfig)), **limit)
    from nnx_cli.data.prepare import default_folder, prepare
    from nnx_cli.planning.recipe.size import suited_size
    from nnx_cli.planning.recipe.tokenizer import vocabularies_for

    output.note_reading(*sources, val)
    val_sources, suited = [val] if val else None, vocabularies_for()
    with half_made(), preparation_view(output) as show:
        if out is None:
            out = default_folder(sources, config, val_sources, suited)
        result = prepare(sources, out, config, val_sources, show, suited)
    if result["xray"] is not None:
        result["xray"]["suggested_size"] = suited_size(result["xray"]["train_bytes"])
    output.made = out
    output.show_json(result)
    what = "conversation" if result["conversations"] else "document"
    output.show(
        f"{result['out']}: {result['train_tokens']:,} tokens to train on, {result['val_tokens']:,} to validate "
        f"({result['tokenizer']}, vocabulary {result['vocab_size']:,}, {result['bytes_per_token']:.2f} bytes a token)",
        f"{size(result['text_bytes'])} of text, {counted(result['documents'], what)}, {result['seconds']:.1f} s",
        f"next: nnx train --data {quoted(result['out'])}",
    )
    if result["xray"] is not None:
        _show_xray(output, result["xray"], result["vocab_size"])


def _show_xray(output: Output, xray: Mapping[str, Any], vocab_size: int) -> None:
    """What an X-ray found, a row each."""
    looked_at, total = xray["sampled_bytes"], xray["train_bytes"]
    part = f"all {size(total)}" if looked_at >= total else f"{size(looked_at)} of {size(total)}"
    output.show("", f"X-ray of the training text ({part}; --no-xray leaves it out)")
    output.aligned(_xray_rows(xray, vocab_size), product=True)
    for number, tokens in enumerate(xray["first_lines"]):
        line = TOKEN_MARK.join(tokens)
        output.show(
            f"{'as tokens' if not number else '':<{NAME_COLUMNS}}{line[:LINE_CHARS]}{'…' * (len(line) > LINE_CHARS)}"
        )


def _xray_rows(xray: Mapping[str, Any], vocab_size: int) -> list[tuple[str, str, str]]:
    """Name, value and remark."""
    documents, unit = xray["documents"], xray["compared"]
    unit = "long lines" if unit == "lines" else unit
    compared = f"of {xray['n_compared']:,} {unit}" if unit else "no documents or long lines to compare"
    again = f"stand earlier in it, {compared}" if unit else compared
    odd = ", ".join(f"{name} ({n:,})" for name, n in xray["odd_characters_named"].items())
    bits = xray["ngram_bits_per_byte"]
    from nnx_cli.planning.recipe.table import SIZES_BY_BYTES

    suits = SUITS if xray["suggested_size"] == SIZES_BY_BYTES[0][1] else SUITS_WITH_A_GPU
    return [
        ("documents", f"{documents['train']:,}", f"to train on, {documents['val']:,} to validate"),
        ("duplicates", _share(xray["duplicate_share"]), again),
        ("overlap", _share(xray["overlap_share"]), f"of validation {unit} are in it too" if unit else compared),
        ("odd characters", _count(xray["odd_characters"]), odd),
        ("vocabulary used", f"{xray['vocabulary_used']:.1%}", f"of {vocab_size:,} ids"),
        (
            "5-gram",
            "–" if bits is None else f"{bits:.2f}",
            "bits per byte; a model that learned more than it gets less" if bits is not None else "not of such text",
        ),
        ("size", xray["suggested_size"], suits),
    ]


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}" if value else "none"


@contextmanager
def _saying_what_is_kept() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted("stopped; nothing was kept", fix="the same command starts over") from error


@contextmanager
def preparation_view(output: Output) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A callback that shows how preparing goes. A signal that ends it leaves nothing behind, and that is said: raises
    Interrupted."""
    with _saying_what_is_kept(), Progress(output) as progress:

        def show(event: dict[str, Any]) -> None:
            if "note" in event:
                progress.end()
                output.note(event["note"])
            elif event["phase"] == "xray":
                progress.share("looking at the text", event["share"])
            else:
                what = "training the tokenizer" if event["phase"] == "train" else "preparing"
                progress.n_bytes(what, event["bytes"], event["total_bytes"])

        yield show
