"""A folder for ONNX runtimes: model.onnx, any text in one pass; decode.onnx, which goes on from a cache that it is
given and gives a longer one back."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from string import Template
from typing import Any

import torch
from torch import Tensor, nn

from nnx_cli.convert.export._base import Found, Source
from nnx_cli.convert.export._compare import compare
from nnx_cli.convert.export._traced_cache import GraphState
from nnx_cli.data.tokenizers.hf_json import save_tokenizer
from nnx_cli.errors import UsageError
from nnx_cli.models._base import LanguageModel, ModelConfig
from nnx_cli.runs.tensors import size_on_disk
from nnx_cli.system.files import require_space, sync_file, write_synced

LIBRARIES = ("onnx", "onnxscript", "onnxruntime")
FILE = None
TOLERANCE = 1e-4  # of a logit, in float32
WHOLE, DECODE = "model.onnx", "decode.onnx"
BATCH, LENGTH, PAST = "batch", "length", "past"  # free dimensions, by name
EXAMPLE = 5, 7, 11  # sequences, new tokens and earlier ones that the graphs are traced with: sizes of nothing else
IN_ONE_FILE = 2**30  # bytes of weights: a file of ONNX ends at 2 GiB, and larger ones stand beside it
REASON_CHARS = 150
HOW_TO_LOAD = """
`model.onnx` takes token ids (batch, length) and gives logits (batch, length, vocabulary). `decode.onnx` takes new ids
and what it gave before, `new_NAME` as `NAME`, and needs no earlier ids again; a text begins with no earlier positions.

```python
import numpy as np
import onnxruntime
$reading
session = onnxruntime.InferenceSession("FOLDER/decode.onnx")
state = {
    x.name: np.zeros([{"batch": 1, "past": 0}.get(n, n) for n in x.shape], np.float32)
    for x in session.get_inputs()[1:]
}
ids = new = $start
for _ in range($n):
    logits, *changed = session.run(None, {"input_ids": np.array([new]), **state})
    state = dict(zip(state, changed))
    new = [int(logits[0, -1].argmax())]
    ids = ids + new
print($written)
```
"""
TEXT = {
    "reading": 'from tokenizers import Tokenizer\n\ntokenizer = Tokenizer.from_file("FOLDER/tokenizer.json")',
    "start": 'tokenizer.encode("Once").ids',
    "written": "tokenizer.decode(ids)",
}
BARE = {"reading": "", "start": "[0]", "written": "ids"}


def why_not(name: str, config: ModelConfig) -> str | None:
    """As in the base."""
    if config.variant == "original" and name == "tape":
        return "its variant original attends to later positions, which a cache cannot"
    if config.variant == "original" and getattr(config, "decoder", None) == "function":
        return "its variant original draws noise (aten.exponential) to choose functions"
    return None


class Decoder(nn.Module):
    """A model with its cache as tensors that go in and come out."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model
        self.state = GraphState(model.make_cache(1, 1))

    def forward(self, input_ids: Tensor, state: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Logits of ids (B, T), and the state after them."""
        self.state.begin(state)
        logits = self.model(input_ids, cache=self.state.cache)
        return logits, *self.state.end()


class Whole(Decoder):
    """A model without earlier positions."""

    def forward(self, input_ids: Tensor) -> Tensor:  # type: ignore[override]  # it has no state
        """Logits of ids (B, T)."""
        empty = [x.expand(-1, input_ids.shape[0], *x.shape[2:]) for x in self.state.empty.values()]
        return super().forward(input_ids, empty)[0]


def write(source: Source, folder: Path) -> None:
    """As in the base."""
    model = source.model
    n_bytes = size_on_disk(model.state_without_ties())
    require_space(folder, 2 * n_bytes)
    if source.tokenizer is not None:
        save_tokenizer(source.tokenizer, folder / "tokenizer.json")
    write_synced(folder / "README.md", source.card.to_markdown(_loading(source), [source.name], "onnxruntime").encode())
    n, length, past = EXAMPLE
    input_ids, ids_shape = torch.zeros(n, length, dtype=torch.int64), {0: BATCH, 1: LENGTH}
    source.tell("tracing", 0.0)
    _export(Whole(model), (input_ids,), (ids_shape,), ["input_ids"], ["logits"], folder / WHOLE, n_bytes)
    source.tell("tracing", 0.5)
    decoder = Decoder(model)
    names, empty = list(decoder.state.empty), decoder.state.empty.values()
    state = tuple(x.new_zeros(x.shape[0], n, *_at(x, past)) for x in empty)
    shapes = tuple({1: BATCH, 3: PAST} if _grows(x) else {1: BATCH} for x in empty)
    ins, outs = ["input_ids", *names], ["logits", *(f"new_{name}" for name in names)]
    _export(decoder, (input_ids, state), (ids_shape, shapes), ins, outs, folder / DECODE, n_bytes)


def _loading(source: Source) -> str:
    """How a model is loaded, for its card."""
    parts = BARE if source.tokenizer is None else TEXT
    return Template(HOW_TO_LOAD).substitute(parts, n=max(1, min(100, source.model.config.seq_len // 2)))


def _grows(x: Tensor) -> bool:
    """Whether a tensor of the state has positions (L, B, 2G, S, K)."""
    return x.dim() == 5


def _at(x: Tensor, past: int) -> tuple[int, ...]:
    """Sizes of a tensor of the state behind those of layers and sequences."""
    return (x.shape[2], past, x.shape[4]) if _grows(x) else tuple(x.shape[2:])


def _export(
    module: nn.Module, args: Any, shapes: Any, ins: list[str], outs: list[str], path: Path, n_bytes: int
) -> None:
    """Write a module as a graph. What torch remembers of its making, paths among it, is left out."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    try:
        with torch.no_grad(), _quietly():
            module(*args)  # once for real: what the model makes at its first pass and keeps must be no tracer's
            program = torch.onnx.export(
                module.eval(),
                args,
                dynamo=True,
                dynamic_shapes=shapes,
                input_names=ins,
                output_names=outs,
                verbose=False,
                custom_translation_table={torch.ops.prims.signbit.default: _signbit},
            )
    except torch.onnx.OnnxExporterError as error:
        raise UsageError(f"this model cannot be written as ONNX: {_reason(error)}") from error
    assert program is not None
    ClearMetadataAndDocStringPass()(program.model)
    program.save(path, external_data=n_bytes > IN_ONE_FILE)
    for written in path.parent.glob(f"{path.name}*"):
        sync_file(written)


def _reason(error: BaseException) -> str:
    """What stood in the way, in a few words of torch's many."""
    if found := re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)'", str(error)):
        return f"it has no operator for {found[1]}"
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().partition("\n")[0][:REASON_CHARS]


def _signbit(x: Any) -> Any:
    """Whether numbers are negative, which torch's exporter has no translation for."""
    import onnxscript

    op: Any = onnxscript.opset18
    return op.Less(x, op.CastLike(0.0, x))


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what torch says of packages that nothing here needs, and of its own deprecated parts."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


class Session:
    """A file of ONNX, run by onnxruntime on the CPU."""

    def __init__(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.inputs = {x.name: x.shape for x in self.session.get_inputs()}

    def run(self, input_ids: Tensor, state: Sequence[Tensor] = ()) -> list[Tensor]:
        """What the graph gives for ids (B, T) and a state."""
        given = dict(zip(self.inputs, (x.numpy() for x in (input_ids, *state)), strict=True))
        return [torch.from_numpy(y) for y in self.session.run(None, given)]

    def empty(self, n_sequences: int) -> list[Tensor]:
        """The state before a text."""
        sizes = {BATCH: n_sequences, PAST: 0}
        shapes = [[sizes.get(n, n) for n in shape] for name, shape in self.inputs.items() if name != "input_ids"]
        return [torch.zeros(shape) for shape in shapes]


def check(source: Source, folder: Path) -> Found:
    """As in the base."""
    whole, decode = Session(folder / WHOLE), Session(folder / DECODE)

    def generate(prompt: Tensor, n: int) -> Tensor:
        """`n` greedy tokens."""
        chosen, new, state = [], prompt, decode.empty(1)
        for _ in range(n):
            logits, *state = decode.run(new, state)
            new = logits[:, -1:].argmax(-1)
            chosen.append(new[0])
        return torch.cat(chosen)

    found = compare(source, lambda ids: whole.run(ids)[0], generate, TOLERANCE)
    worst = max(found.max_logit_difference, _other_shapes(source, whole, decode))
    return replace(found, max_logit_difference=worst)


@torch.inference_mode()
def _other_shapes(source: Source, whole: Session, decode: Session) -> float:
    """The largest difference of a logit for two sequences of another length: in one pass, and in parts with the cache,
    one of them of a single token."""
    ids = source.ids[:1, : max(1, source.ids.shape[1] * 2 // 3)].clone()
    ids = torch.cat((ids, ids.flip(1)))
    expected, state, parts = source.model(ids), decode.empty(2), []
    for piece in (part for part in (ids[:, :-2], ids[:, -2:-1], ids[:, -1:]) if part.shape[1]):
        logits, *state = decode.run(piece, state)
        parts.append(logits)
    found = [(expected - other).abs().max() for other in (whole.run(ids)[0], torch.cat(parts, dim=1))]
    return torch.stack(found).max().nan_to_num(nan=torch.inf).item()
