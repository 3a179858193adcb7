"""One web page that holds a model and runs it: opened from a disk, on a phone, without a network.

The page is that of `nnx_cli.webpage`, and html_runtime.js beside this module computes. Weights are the ones that `nnx
quantize` makes. They stand in the page as text of what zlib compressed, 7 bits a character: the length of a JSON header
in four bytes, the header, and the tensors that it lists, one after the other, as in a quantized folder.
"""

from __future__ import annotations

import copy
import json
import re
import zlib
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnx_cli.convert.export._base import Found, Source
from nnx_cli.convert.export._compare import compare
from nnx_cli.convert.quantize import quantized_state
from nnx_cli.errors import QualityError, UsageError
from nnx_cli.layers.quantized import (
    Quantization,
    dequantize_layers,
    quantize_layers,
    quantize_rows,
    stored_in_int8,
    widen,
)
from nnx_cli.models._base import LanguageModel, ModelConfig
from nnx_cli.runs.load import fill_model
from nnx_cli.system.chromium import ChromiumError, ScriptError, find_chromium, opened_page
from nnx_cli.system.files import require_space, write_synced
from nnx_cli.webpage.page import About, describe_tokenizer, fill_page

LIBRARIES = ()
FILE = "model.html"
TOLERANCE = 1e-3  # of a logit
MAX_BYTES = 100_000_000  # of a page
BYTES_PER_WEIGHT = {8: 1.05, 4: 0.58}  # in the page, at least: those of a trained model
PIECE = 7 * 2**17  # bytes that become text at a time
GROUP_SIZE = 32  # columns that share a scale, with 4 bits
TYPES = {torch.int8: "i8", torch.uint8: "u4", torch.float16: "f16", torch.bfloat16: "bf16", torch.int64: "i64"}
DTYPES = {name: dtype for dtype, name in TYPES.items()}
ARCHITECTURE = re.compile(r"^ARCHITECTURES\.(\w+) = class .*?^};\n\n", re.DOTALL | re.MULTILINE)
FUNCTION = re.compile(r"^(?:/\*\*(?:(?!\*/).)*\*/\n)?function (\w+)\(.*?^}\n\n", re.DOTALL | re.MULTILINE)
MAX_TOKENS = 100_000  # that may be asked for at a time
WHERE = "It is in this page and runs on your device: nothing is sent anywhere."

# What Chromium is asked for, with a list of ids. A step of the check reads one token.
LOGITS = (
    "opened.then((m) => (m.network.reset(), IDS.map((id, i) => Array.from(m.network.head(m.network.step(id, i))))))"
)
GREEDY = """opened.then(async (m) => {
  const ids = IDS, start = ids.length;
  for (m.read = []; ids.length < start + N; ) ids.push(likeliest(await m.logits(ids), 1)[0]);
  return ids.slice(start);
})"""
ENCODE = "opened.then((m) => TEXTS.map((text) => m.tokenizer.encode(text)))"
PROBE = "It's 12 o'clock,\r\n we'd say 1234567: a_b == 'd'\u2014\x00été \t小猫 🙂 e\u0301\u0085\ufeff\u00a0 END!\n\n  "
CHECKED_MACS = 3e9  # multiply-adds of the logits: half a minute of a slow computer
CHECKED_TOKENS = 16, 256  # at least and at most
CHECKED_LOGITS = 2**20  # at most
PATIENCE_S = 600


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a page may be like."""

    bits: int | None = None  # bits of a weight, 8 or 4; default those of a quantized MODEL, else 8

    def __post_init__(self) -> None:
        if self.bits not in (None, 8, 4):
            raise UsageError(f"--bits is {self.bits}; choose from 8, 4")


def why_not(name: str, config: ModelConfig) -> str | None:
    """As in the base."""
    if name == "tape" and config.variant == "original":
        return "its variant original attends to later positions, which a step does not know"
    if name == "ngpt" and getattr(config, "normalize_on_use", False):
        return "it normalizes its matrices at every use, which the page would do for every token"
    if getattr(config, "kv_latent_dim", None) is not None:
        return "the page has no keys and values that rise from latents"
    if name == "neon" and (config.variant == "original" or getattr(config, "normalized", False)):
        return "the page has neither Neon's variant original nor its normalized form"
    return None


def _stored_bits(source: Source) -> int | None:
    """Bits of a weight in a quantized MODEL."""
    quantization = source.ref.config.get("quantization")
    return None if quantization is None else quantization["bits"]


def _bits(source: Source) -> int:
    """Bits of a weight in the page."""
    return source.options.bits or _stored_bits(source) or 8


@dataclass(frozen=True)
class Packed:
    """A model as the page has it: its tensors as `nnx quantize` stores them, and how."""

    quantization: Quantization
    state: dict[str, Tensor]

    @classmethod
    def of(cls, source: Source) -> Packed:
        """A quantized MODEL as it is stored, where it has as many bits as are asked for; else what `nnx quantize` makes
        of it. Matrices that its int4 leaves in 16 bits and its int8 does not have 8 in both cases."""
        bits = _bits(source)
        if bits == _stored_bits(source):
            how, state = Quantization.read(source.ref.config["quantization"]), dict(source.ref.weights()[1])
        else:
            how = Quantization(bits=bits, group_size=GROUP_SIZE if bits == 4 else None, kept=[])
            state = quantized_state(source.model, how)
        for name in stored_in_int8(source.model, replace(how, bits=8)) if bits == 4 else ():
            weight = source.model.get_parameter(f"{name}.weight")
            state[f"{name}.weight"], state[f"{name}.scale"] = quantize_rows(weight)
        return cls(how, state)

    def model(self, source: Source) -> LanguageModel:
        """The model in Python, in float32."""
        model = copy.deepcopy(source.model)
        quantize_layers(model, self.quantization)
        fill_model(model, widen(self.state), source.ref.folder, torch.device("cpu"), "fp32")
        dequantize_layers(model)
        return model

    def pieces(self, source: Source) -> tuple[list[dict[str, Any]], list[bytes]]:
        """What the header says of each tensor, and their bytes."""
        axes = dict(getattr(source.model, "unit_axes", tuple)())
        shapes = {name: list(tensor.shape) for name, tensor in source.model.state_without_ties().items()}
        listed, raw = [], []
        for name, tensor in self.state.items():
            if name not in shapes:  # scales, which stand behind their codes
                continue
            scale = self.state[_scale_of(name)] if tensor.dtype in (torch.int8, torch.uint8) else None
            parts = [_raw(each) for each in (tensor, scale) if each is not None]
            entry = {"name": name, "type": TYPES[tensor.dtype], "shape": shapes[name], "size": len(parts[0])}
            entry["group"] = self.quantization.group_size if tensor.dtype == torch.uint8 else None
            entry["unit_axis"] = None if scale is None else axes.get(name)
            listed.append(entry | {"scales": 0 if scale is None else len(parts[1])})
            raw += parts
        return listed, raw


def _scale_of(name: str) -> str:
    """The name of a matrix's scales."""
    return f"{name.removesuffix('.weight')}.scale"


def _raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def write(source: Source, folder: Path) -> None:
    """As in the base."""
    model = source.model
    n_parameters = sum(tensor.numel() for tensor in model.state_without_ties().values())
    bits = _bits(source)
    _check_size(n_parameters, bits, int(n_parameters * BYTES_PER_WEIGHT[bits]))
    require_space(folder, MAX_BYTES)
    source.tell("packing", 0.0)
    listed, raw = Packed.of(source).pieces(source)
    header = json.dumps(
        {
            "architecture": source.name,
            "config": asdict(model.config),
            "tokenizer": describe_tokenizer(source.tokenizer, source.ref.start_ids),
            "tensors": listed,
        },
        separators=(",", ":"),
    ).encode()
    content = b"".join([len(header).to_bytes(4, "little"), header, *raw])
    weights = to_text(zlib.compress(content, 9))
    about = About.of(source.card, source.ref, bits)
    filled = fill_page(about, source.tokenizer, _runtime(source.name), weights, where=WHERE, most=MAX_TOKENS)
    page = filled.text.encode()
    _check_size(n_parameters, bits, len(page))
    write_synced(folder / FILE, page)


def _check_size(n_parameters: int, bits: int, n_bytes: int) -> None:
    """Raise UsageError for a page that is too large."""
    if n_bytes <= MAX_BYTES:
        return
    smaller = int(n_parameters * BYTES_PER_WEIGHT[4])
    int4 = f"take --bits 4 (int4, {smaller / 1e6:.0f} MB), or " if bits == 8 and smaller < 0.95 * MAX_BYTES else ""
    most = f"a page has at most {MAX_BYTES // 10**6} MB"
    raise UsageError(
        f"the page would have {n_bytes / 1e6:.0f} MB of int{bits} weights, and {most}",
        fix=f"{int4}train a smaller size: --size small (30 million parameters) or tiny"
        + ("" if int4 else f"; int4 holds {MAX_BYTES / BYTES_PER_WEIGHT[4] / 1e6:.0f} million"),
    )


def _runtime(architecture: str) -> str:
    """The script that computes, without the other architectures and functions that they alone use."""
    script = resources.files(__package__).joinpath("html_runtime.js").read_text(encoding="utf-8")
    script = ARCHITECTURE.sub(lambda found: found[0] * (found[1] == architecture), script)
    return FUNCTION.sub(lambda found: found[0] * (len(re.findall(rf"\b{found[1]}\b", script)) > 1), script)


def to_text(content: bytes) -> str:
    """Bytes as text with 7 bits a character, an eighth shorter than base64. A DEL stands before those characters that
    markup cannot hold, which have a bit turned."""
    codes = []
    for piece in np.split(np.frombuffer(content, np.uint8), range(PIECE, len(content), PIECE)):
        bits = np.unpackbits(piece)
        sevens = np.pad(bits, (0, -len(bits) % 7)).reshape(-1, 7)
        codes.append(np.packbits(np.pad(sevens, ((0, 0), (1, 0))), axis=1).tobytes())
    return re.sub(rb"[\0\r<\x7f]", lambda found: bytes((127, found[0][0] ^ 64)), b"".join(codes)).decode("ascii")


def from_text(text: str) -> bytes:
    """The bytes that `to_text` was given."""
    codes = re.sub(rb"\x7f(.)", lambda found: bytes((found[1][0] ^ 64,)), text.encode("ascii"), flags=re.DOTALL)
    content, step = [], PIECE // 7 * 8
    for piece in np.split(np.frombuffer(codes, np.uint8), range(step, len(codes), step)):
        bits = np.unpackbits(piece[:, None], axis=1)[:, 1:].ravel()
        content.append(np.packbits(bits[: len(bits) // 8 * 8]).tobytes())
    return b"".join(content)


def read_page(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the tensors of a page."""
    found = re.search(r'<script id="model"[^>]*>([^<]*)<', path.read_bytes().decode())
    assert found is not None
    content = zlib.decompress(from_text(found[1]))
    end = 4 + int.from_bytes(content[:4], "little")
    header, state = json.loads(content[4:end]), {}
    for entry in header["tensors"]:
        shape = entry["shape"] if entry["type"] != "u4" else [entry["shape"][0], -1]
        start, end = end, end + entry["size"]
        state[entry["name"]] = _tensor(content[start:end], DTYPES[entry["type"]]).reshape(shape)
        if entry["scales"]:
            start, end = end, end + entry["scales"]
            scale = _tensor(content[start:end], torch.float16)
            state[_scale_of(entry["name"])] = scale if entry["group"] is None else scale.reshape(shape[0], -1)
    return header, state


def _tensor(raw: bytes, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(raw), dtype=dtype)


def check(source: Source, folder: Path) -> Found:
    """As in the base: in a Chromium where there is one, against the quantized model in Python."""
    packed, program = Packed.of(source), find_chromium()
    why = "no Chromium is installed"
    if program is not None:
        try:
            return _check_in_browser(source, packed, program, folder / FILE)
        except ChromiumError as error:
            why = str(error)
    _, state = read_page(folder / FILE)
    read = Packed(packed.quantization, state).model(source)

    def generate(prompt: Tensor, n: int) -> Tensor:
        """`n` greedy tokens."""
        ids = prompt
        for _ in range(n):
            ids = torch.cat((ids, read(ids)[:, -1:].argmax(-1)), dim=1)
        return ids[0, prompt.shape[1] :]

    found = compare(_checked(source, packed), read, generate, TOLERANCE)
    note = f"{why}: the weights in the page were read back in Python; its JavaScript was not run"
    return replace(found, more=_more(packed, "python"), notes=[note])


def _check_in_browser(source: Source, packed: Packed, program: str, path: Path) -> Found:
    """Open the page itself. Raises QualityError where it gives other ids, logs something or asks for anything."""
    with opened_page(program, path) as page:

        def logits(ids: Tensor) -> Tensor:
            """Logits (1, T, V) of ids (1, T)."""
            return torch.tensor([page(LOGITS.replace("IDS", str(ids[0].tolist())), PATIENCE_S)])

        def generate(prompt: Tensor, n: int) -> Tensor:
            """`n` greedy tokens."""
            asked = GREEDY.replace("IDS", str(prompt[0].tolist())).replace("N;", f"{n};")
            return torch.tensor(page(asked, PATIENCE_S))

        try:
            found = compare(_checked(source, packed), logits, generate, TOLERANCE)
            if source.tokenizer is not None:
                texts = [source.tokenizer.decode(source.ids.flatten().numpy()), PROBE]
                if page(ENCODE.replace("TEXTS", json.dumps(texts))) != [
                    source.tokenizer.encode(t).tolist() for t in texts
                ]:
                    raise QualityError("in the browser the tokenizer gives other ids; nothing was kept")
        except ScriptError as error:
            raise QualityError(f"the page fails in the browser: {str(error).splitlines()[0]}") from error
        if page.complaints or page.requests:
            raise QualityError(
                f"the page complains, or asks the network, in the browser: {(page.requests or page.complaints)[0]}"
            )
    return replace(found, more=_more(packed, "chromium"))


def _more(packed: Packed, checked_with: str) -> dict[str, Any]:
    """Further keys of the receipt."""
    return {"bits": packed.quantization.bits, "checked_with": [checked_with]}


def _checked(source: Source, packed: Packed) -> Source:
    """The quantized model, and as much of the text as a browser soon computes."""
    config, n_parameters = source.model.config, sum(tensor.numel() for tensor in packed.state.values())
    most = min(CHECKED_TOKENS[1], CHECKED_LOGITS // config.vocab_size)
    n_tokens = max(CHECKED_TOKENS[0], min(most, int(CHECKED_MACS / n_parameters)))
    return replace(source, model=packed.model(source), ids=source.ids[:1, :n_tokens])
