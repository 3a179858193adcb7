"""Decoding speed, beside nanoGPT, `transformers`, and a step of decoding written out by hand.

    python tests/bench/decode.py [--models llama,nyx] [--sizes base,large,xl] [--precisions fp32,bf16,int8,int4]
                                 [--batches 1,8,32] [--tokens 512] [--nanogpt CHECKOUT] [--plain] [--quick]
                                 [--parts ours,transformers,nanogpt,originals,hand,alone,pieces,profile]
                                 [--originals FOLDER]
                                 [--results FILE] [--markdown FILE]

Temperature 0.8, top-k 200, random weights. `tokens/s` is what `nnx sample` calls its decoding speed, all it does after
the first token included, of --tokens new tokens of --batches sequences side by side: median of three, after one that
warms up. `steps/s` is the same without a host that reads: steps alone, once they are captured. `bandwidth` is the share
of the copy rate, measured in the same run (on a CPU of the rate of `torch.sum` over 512 MiB), that reading weights and
cache once a step takes. `base` is 124 million parameters; `gpt2` has the vocabulary of GPT-2 (50,304) at 124 million.

- transformers: Llama of the same shape, static cache, which it compiles, and dynamic cache; where it is installed.
- nanogpt: `generate` of CHECKOUT's model.py as its sample.py calls it, GPT-2 124M.
- originals: each architecture (or --models) beside its authors' code, which FOLDER holds as `originals.py` says, in the
  configuration that they publish, at batch 1, first precision, in turns. NYX writes by its `generate`, N4 by its
  `generate_n4c`, Neon by `transformers` as in its generate.py, nGPT by the loop over its forward of its train.py: all
  without a cache; Tape by the loop of its notebook, with its cache; `llama` by `transformers`, with its static cache on
  a GPU, its dynamic one on a CPU. An original whose weights cannot be bf16 runs under autocast.
- hand: greedy steps of NYX `nano` in plain operators of torch, at every thread count, and ours with those it takes.
- alone: of 32 sequences of 300 tokens, those that are the same drawn alone, in the first size.
- pieces: matrices of the sizes, read by cuBLAS and by our kernels; attention; an empty kernel in a graph.
- profile: what the kernels of one captured step take.

--plain leaves our Triton kernels out. --quick: `base` at batch 1 and 32 in the best precision, 256 tokens.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.util
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import cycle
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import torch.nn.functional as F
from against_nanogpt import SHAPES
from originals import CASES, our_config
from torch import Tensor, nn

from nnx_cli import models
from nnx_cli.config import SampleConfig
from nnx_cli.experiments.benchmark import calls_per_s
from nnx_cli.inference.decoding import Decoder
from nnx_cli.inference.generate import generate, ready_to_decode, useful_threads
from nnx_cli.inference.sampler import stream_seed
from nnx_cli.kernels import next_token, one_token
from nnx_cli.layers.quantized import Quantization, quantizable, quantize, quantize_layers, unpack_slow_layers
from nnx_cli.models._base import LanguageModel, ModelConfig
from nnx_cli.models.nyx import xpos_tables
from nnx_cli.planning.flops import count_parameters, meta_model
from nnx_cli.system import hardware
from nnx_cli.system.cuda_graph import CudaGraph
from nnx_cli.system.device import DTYPES, describe, pick_device, pick_precision, synchronize

PARTS = ("ours", "transformers", "nanogpt", "originals", "hand", "alone", "pieces", "profile")
HOW = dict(temperature=0.8, top_k=200)
PROMPT = [1, 2, 3, 4, 5, 6, 7, 8]
QUANTIZED = {"int8": (8, None), "int4": (4, 32)}
STEPS = 100  # of a measurement without a host
CONTEXT = 1024  # of ours beside an original
COPY_BYTES = {"cpu": 2**29, "cuda": 2**31}


@dataclass
class Row:
    """One measurement."""

    what: str
    model: str
    size: str
    precision: str
    batch: int
    parameters: int
    tokens_per_s: float
    steps_per_s: float | None = None
    bytes_per_step: int | None = None
    bandwidth: float | None = None  # share of the copy rate
    note: str = ""


def rate(device: torch.device) -> float:
    """Bytes a second: read and written by a copy on a GPU, read by `torch.sum` on a CPU."""
    x = torch.ones(COPY_BYTES[device.type] // 4, device=device)
    if device.type == "cpu":
        return x.nbytes * calls_per_s(x.sum, device, 2.0)
    y = torch.empty_like(x)
    return 2 * x.nbytes * calls_per_s(lambda: y.copy_(x), device, 0.5)


def build(name: str, size: str, precision: str, device: torch.device) -> LanguageModel:
    """A model with random weights, quantized where the precision says so."""
    torch.manual_seed(0)
    with device:
        fields = SHAPES["speed-124m"][name] if size == "gpt2" else {"size": size}
        model = models.build(name, **fields)
    if precision in QUANTIZED:
        bits, group_size = QUANTIZED[precision]
        how = Quantization(bits=bits, group_size=group_size, kept=[])
        stored = {key: quantize(module.weight.detach(), how) for key, module in quantizable(model).items()}
        quantize_layers(model, how)
        for key, (codes, scale) in stored.items():
            module = model.get_submodule(key)
            module.weight.copy_(codes)
            module.scale.copy_(scale)
        precision = "bf16" if device.type == "cuda" else "fp32"
    return ready(model, precision)


def ready(model: LanguageModel, precision: str) -> LanguageModel:
    """A model that decodes in a floating-point precision."""
    model.compute_dtype = DTYPES[precision]
    unpack_slow_layers(model, model.compute_dtype)
    return model.eval().requires_grad_(False)


def bytes_per_step(model: LanguageModel, precision: str, batch: int, positions: int) -> int:
    """What one step must read: every matrix but a table of embeddings that is not the head's, and the cache."""
    head = {id(x) for x in (*model.head.parameters(), *model.head.buffers())}
    table = {id(x) for x in (*model.embedding.parameters(), *model.embedding.buffers())} - head
    tensors = {id(x): x for x in (*model.parameters(), *model.buffers())}
    width = model.compute_dtype.itemsize
    read = 0
    for key, x in tensors.items():
        if key not in table:
            read += x.nbytes if precision in QUANTIZED and not x.dtype.is_floating_point else x.numel() * width
    cache = model.make_cache(1, 16).n_bytes // 16
    return read + batch * positions * cache


def ours(model: LanguageModel, batch: int, n: int, rounds: int = 3) -> tuple[float, float]:
    """Tokens a second of `generate`, and steps a second without a host."""

    def once(tokens: int) -> float:
        config = SampleConfig(max_new_tokens=tokens, num_samples=batch, **HOW)
        return generate(model, None, [PROMPT], config).decode_tokens_per_s

    once(40)
    speed = median(once(n) for _ in range(rounds))
    with torch.inference_mode(), ready_to_decode(model, batch):
        decoder = Decoder(model, [PROMPT], SampleConfig(max_new_tokens=n, num_samples=batch, **HOW))
        timed = min(STEPS, n // 2)
        for _ in range((n - timed) // 2):
            decoder.step()
        synchronize(model.device)
        started = time.perf_counter()
        for _ in range(timed):
            decoder.step()
        synchronize(model.device)
        return speed, timed / (time.perf_counter() - started)


def measure_ours(options: argparse.Namespace, device: torch.device, limit: float) -> Iterator[Row]:
    for name in options.models:
        for size in options.sizes:
            if size == "gpt2" and name not in SHAPES["speed-124m"]:
                continue
            for precision in options.precisions:
                model = build(name, size, precision, device)
                parameters = count_parameters(meta_model(name, model.config))["total"]
                n = min(options.tokens, model.config.seq_len - len(PROMPT))
                for batch in options.batches:
                    speed, steps = ours(model, batch, n)
                    read = bytes_per_step(model, precision, batch, len(PROMPT) + n // 2)
                    yield Row(
                        "nnx, plain" if options.plain else "nnx",
                        name,
                        size,
                        precision,
                        batch,
                        parameters,
                        speed,
                        steps,
                        read,
                        read * steps / limit,
                        f"work for {useful_threads(model, batch)} threads" if device.type == "cpu" else "",
                    )
                del model
                gc.collect()


@contextmanager
def without_kernels(on: bool) -> Iterator[None]:
    """Operations of torch in place of our kernels for one token, for a while."""
    before = one_token.takes_triton
    one_token.takes_triton = next_token.takes_triton = (lambda x: False) if on else before
    try:
        yield
    finally:
        one_token.takes_triton = next_token.takes_triton = before


def once_per_precision(options: argparse.Namespace) -> list[str]:
    """Precisions that a peer has: floating-point ones."""
    return [precision for precision in options.precisions if precision in DTYPES]


def measure_transformers(options: argparse.Namespace, device: torch.device, limit: float) -> Iterator[Row]:
    """Llama of `transformers` in the shape of ours, whole calls of `generate`."""
    if importlib.util.find_spec("transformers") is None:
        print("transformers is not installed", flush=True)
        return
    import transformers

    for size in options.sizes:
        shape = build("llama", size, "fp32", torch.device("meta")).config
        n = min(options.tokens, shape.seq_len - len(PROMPT))
        for precision in once_per_precision(options):
            model = llama_of_transformers(shape, precision, device)
            for batch in options.batches:
                ids = torch.tensor([PROMPT] * batch, device=device)
                for kind in ("static", "dynamic"):
                    call = partial(write_by_transformers, model, kind, ids, n)
                    note = f"transformers {transformers.__version__}, {kind} cache"
                    speed = peer_speed(call, device, batch * n)
                    yield peer_row("transformers", "llama", size, precision, batch, model, speed, note)
            gc.collect()


def llama_of_transformers(shape: ModelConfig, precision: str, device: torch.device) -> nn.Module:
    """Llama of `transformers` in the shape of ours."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.dim,
        intermediate_size=shape.ffn_dim,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads,
        max_position_embeddings=shape.seq_len,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    with device:
        return transformers.LlamaForCausalLM(config).to(DTYPES[precision]).eval()


def write_by_transformers(model: nn.Module, kind: str, ids: Tensor, n: int) -> Tensor:
    """Its `generate`, with a static or dynamic cache."""
    return model.generate(ids, do_sample=True, min_new_tokens=n, max_new_tokens=n, cache_implementation=kind, **HOW)


def measure_originals(options: argparse.Namespace, device: torch.device, limit: float) -> Iterator[Row]:
    """Each original beside ours, in a process of its own: they want different versions of what they import."""
    if options.originals is None:
        print("no --originals", flush=True)
        return
    for name in options.models:
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            try:
                yield from process.submit(beside_original, name, options, device).result()
            except Exception as error:  # whatever keeps one original from running must not keep the others
                print(f"{name}: {type(error).__name__}: {error}", flush=True)


def beside_original(name: str, options: argparse.Namespace, device: torch.device) -> list[Row]:
    """Rows of an original and of ours at batch 1, in turns: ours, the original, ours."""
    sides = llama_sides if name == "llama" else original_sides
    model, theirs, write, note = sides(name, options, device)
    n = min(options.tokens, model.config.seq_len - len(PROMPT))
    size, precision = options.sizes[0] if name == "llama" else "original", options.precisions[0]
    with without_kernels(options.plain):
        speeds = [ours(model, 1, n, 1)]
        print(f"{name}: nnx {speeds[0][0]:,.0f} tokens/s; the original:", end=" ", flush=True)
        synchronize(device)
        started = time.perf_counter()
        write(n)
        synchronize(device)
        speed = n / (time.perf_counter() - started)
        print(f"{speed:,.0f}", flush=True)
        speeds.append(ours(model, 1, n, 1))
    tokens, steps = map(mean, zip(*speeds, strict=True))
    row = peer_row("original", name, size, precision, 1, theirs, speed, f"{n} tokens; {note}")
    note = f"{n} tokens; {tokens / speed:.1f} times the original"
    return [row, replace(peer_row("nnx", name, size, precision, 1, model, tokens, note), steps_per_s=steps)]


Sides = tuple[LanguageModel, nn.Module, Callable[[int], Any], str]  # ours, the original, its way to write, in words too


def original_sides(name: str, options: argparse.Namespace, device: torch.device) -> Sides:
    """Sides in the configuration that the original was published with; the original has written 16 tokens."""
    folder, precision = options.originals.resolve(), options.precisions[0]
    sys.path.insert(0, str(folder / "packages"))
    case = CASES["ngpt-manual" if name == "ngpt" else name]
    original = case.build(folder, case.config, device)
    model = models.from_config(name, our_config(case, CONTEXT)).to(device)
    theirs, ids = original.model.eval(), torch.tensor([PROMPT], device=device)
    write = partial(original.write, ids)
    try:
        theirs.to(DTYPES[precision])
        write(16)
        return ready(model, precision), theirs, write, original.way
    except RuntimeError:  # somewhere it computes with numbers of two types
        theirs.float()

    def under_autocast(n: int) -> Any:
        with torch.autocast(device.type, DTYPES[precision]):
            return write(n)

    under_autocast(16)
    return ready(model, precision), theirs, under_autocast, f"{original.way}; under autocast"


def llama_sides(name: str, options: argparse.Namespace, device: torch.device) -> Sides:
    """Sides in the first size; what is compiled is compiled."""
    import transformers

    model = build(name, options.sizes[0], options.precisions[0], device)
    theirs = llama_of_transformers(model.config, options.precisions[0], device)
    kind = "static" if device.type == "cuda" else "dynamic"
    write = partial(write_by_transformers, theirs, kind, torch.tensor([PROMPT], device=device))
    write(options.tokens if device.type == "cuda" else 16)
    return model, theirs, write, f"transformers {transformers.__version__}, {kind} cache"


def measure_nanogpt(options: argparse.Namespace, device: torch.device, limit: float) -> Iterator[Row]:
    """nanoGPT's `generate`, as its sample.py calls it, whole calls."""
    if options.nanogpt is None:
        print("no --nanogpt", flush=True)
        return
    spec = importlib.util.spec_from_file_location("nanogpt_model", options.nanogpt / "model.py")
    assert spec is not None and spec.loader is not None
    nanogpt = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = nanogpt
    spec.loader.exec_module(nanogpt)
    with device:
        model = nanogpt.GPT(nanogpt.GPTConfig(vocab_size=50304, dropout=0.0, bias=False)).eval()
    for precision in once_per_precision(options):
        cast = torch.amp.autocast(device.type, DTYPES[precision]) if precision != "fp32" else nullcontext()
        for batch in options.batches:
            ids = torch.tensor([PROMPT] * batch, device=device)
            n = min(options.tokens, 256)  # it reads everything anew for every token
            with torch.no_grad(), cast:
                speed = peer_speed(partial(model.generate, ids, n, **HOW), device, batch * n, 1)
            yield peer_row("nanogpt", "gpt", "gpt2", precision, batch, model, speed, f"{n} tokens")


def peer_speed(call: Callable[[], Any], device: torch.device, n_tokens: int, rounds: int = 3) -> float:
    """Tokens a second of a call: the median of some, after two that warm up and compile."""
    for _ in range(2 if rounds > 1 else 1):
        call()
    seconds = []
    for _ in range(rounds):
        synchronize(device)
        started = time.perf_counter()
        call()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return n_tokens / median(seconds)


def peer_row(
    what: str, name: str, size: str, precision: str, batch: int, model: nn.Module, speed: float, note: str
) -> Row:
    n = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    return Row(what, name, size, precision, batch, n, speed, note=note)


def by_hand(model: LanguageModel, n: int) -> Callable[[], list[int]]:
    """`n` greedy tokens of NYX in plain operators of torch: tables made before, a cache of its own, one sequence."""
    config = model.config
    H, K, D, S = config.n_heads, config.head_dim, config.dim, n + 1
    splits, half = (H * K, K, K, config.ffn_dim, config.ffn_dim), config.head_dim // 2
    weights = [(b.norm.weight, b.in_proj.weight, b.attn_out.weight, b.ffn_out.weight) for b in model.blocks]
    gain, table = model.norm.weight, model.embedding.weight
    tables = xpos_tables(torch.arange(S), K, config.xpos_scale_base, config.seq_len // 2)
    keys, values = (torch.zeros(len(weights), 1, 1, S, K) for _ in range(2))

    def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x[..., :half], x[..., half:]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    @torch.inference_mode()
    def decode() -> list[int]:
        token, tokens = torch.tensor([PROMPT[0]]), []
        for t in range(n):
            x = F.embedding(token, table)
            q_cos, q_sin, k_cos, k_sin = (each[t] for each in tables)
            for layer, (norm, in_proj, attn_out, ffn_out) in enumerate(weights):
                q, k, v, value, gate = F.linear(F.layer_norm(x, (D,), norm), in_proj).split(splits, -1)
                keys[layer, 0, 0, t] = turn(k[0], k_cos, k_sin)
                values[layer, 0, 0, t] = v[0]
                q = turn(q.view(1, 1, H, K), q_cos, q_sin)
                seen = keys[layer, :, :, : t + 1], values[layer, :, :, : t + 1]
                y = F.scaled_dot_product_attention(q, *seen, scale=K**-0.5).view(1, H * K)
                x = x + F.linear(y, attn_out) + F.linear(F.silu(gate) * value, ffn_out)
            token = F.linear(F.layer_norm(x, (D,), gain), table).argmax(-1)
            tokens.append(token.item())
        return tokens

    return decode


def measure_hand(options: argparse.Namespace, device: torch.device, limit: float) -> Iterator[Row]:
    """Greedy steps by hand at every thread count, and ours, in turn; on a CPU."""
    if device.type != "cpu":
        return
    model, n, cores = build("nyx", "nano", "fp32", device), 200, torch.get_num_threads()
    hand = by_hand(model, n)

    def generated() -> list[int]:
        return generate(model, None, [PROMPT[:1]], SampleConfig(max_new_tokens=n, greedy=True)).samples[0].tokens

    assert hand() == generated(), "the step by hand is another model's"
    ways: dict[str, tuple[Callable[[], list[int]], int]] = {"nnx": (generated, cores), "nnx, 1 thread": (generated, 1)}
    ways |= {f"by hand, {threads} threads": (hand, threads) for threads in range(1, cores + 1)}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    used: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(5 if options.quick else 15):
        for way, (call, threads) in ways.items():
            torch.set_num_threads(threads)
            started, began = time.perf_counter(), time.process_time()
            call()
            used[way].append(time.process_time() - began)
            seconds[way].append(time.perf_counter() - started)
    torch.set_num_threads(cores)
    for way in ways:
        note = f"greedy; least processor time a token {1e6 * min(used[way]) / n:.0f} us"
        yield peer_row(way, "nyx", "nano", "fp32", 1, model, n / median(seconds[way]), note)


def alone(options: argparse.Namespace, device: torch.device) -> None:
    """How many sequences of a batch are the same when each is drawn by itself, with the random numbers that it has."""
    n_tokens, n_sequences, seed = 300, 32, 11
    for name in options.models:
        for precision in once_per_precision(options):
            model = build(name, options.sizes[0], precision, device)

            def draw(number: int | None, model: LanguageModel = model) -> list[tuple[int, ...]]:
                n_samples = n_sequences if number is None else 1
                config = SampleConfig(max_new_tokens=n_tokens, num_samples=n_samples, seed=seed, **HOW)
                decoder = Decoder(model, [PROMPT], config)
                if number is not None:
                    decoder.uniforms.generators[0].manual_seed(stream_seed(seed, number))
                return list(zip(*decoder.tokens(n_tokens), strict=True))

            with torch.inference_mode(), ready_to_decode(model, n_sequences):
                same = sum(draw(number) == [row] for number, row in enumerate(draw(None)))
            print(f"{name} {options.sizes[0]} {precision}: {same} of {n_sequences} are the same alone", flush=True)


def in_graph(call: Callable[[], Any], n: int) -> float:
    """Microseconds of a call, captured `n` times in one graph."""
    with torch.inference_mode():
        graph = CudaGraph(lambda: [call() for _ in range(n)])
        seconds = []
        for _ in range(5):
            torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(10):
                graph()
            torch.cuda.synchronize()
            seconds.append((time.perf_counter() - started) / 10 / n)
    return 1e6 * median(seconds)


def pieces(options: argparse.Namespace, device: torch.device) -> None:
    """What a step's operations take in a graph, one after the other."""
    if device.type != "cuda":
        return
    dtype = DTYPES[pick_precision("auto", device)]
    nothing = torch.zeros(8, device=device)
    print(f"an addition of 8 numbers: {in_graph(lambda: nothing.add_(1), 200):.2f} us")
    for size in options.sizes:
        config = build("nyx", size, "fp32", torch.device("meta")).config
        dim, hidden, heads = config.dim, config.ffn_dim, (config.n_heads + 2) * config.head_dim
        for shape in ((heads + 2 * hidden, dim), (dim, hidden), (dim, dim), (3 * dim, dim)):
            for batch in options.batches:
                gate = one_token.Gate(hidden if shape[0] > 3 * dim else 0, first=False)
                found = matrix_piece(shape, batch, gate, device, dtype)
                rates = {name: f"{us:.2f} us, {torch.Size(shape).numel() * 2e-6 / us:.2f} TB/s" for name, us in found}
                print(f"{size} {shape} batch {batch}: {rates}", flush=True)
        for n_kv_heads in (1, config.n_heads // 2):
            for batch in options.batches:
                for span in (256, 1024):
                    found = attention_piece(config.n_heads, n_kv_heads, config.head_dim, batch, span, device, dtype)
                    times = {name: f"{us:.2f} us" for name, us in found}
                    print(
                        f"{size} attention, {n_kv_heads} heads of keys, batch {batch}, span {span}: {times}", flush=True
                    )


def matrix_piece(
    shape: tuple[int, int], batch: int, gate: one_token.Gate, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, float]]:
    """Microseconds of reading a matrix; several take turns, so that no cache has them."""
    N, K = shape
    n = max(4, 2**28 // (N * K * dtype.itemsize))
    matrices = cycle([torch.randn(N, K, device=device).to(dtype) for _ in range(n)])
    norm = one_token.Norm(torch.ones(K, device=device), 1e-5, True)
    x, y = (torch.randn(batch, 1, width, device=device).to(dtype) for width in (K, N))
    yield "linear", in_graph(lambda: F.linear(x, next(matrices)), n)
    if batch > one_token.FEW or not one_token.takes_triton(x):
        return
    from nnx_cli.kernels import one_token_triton as kernels

    for kernels.TILE, kernels.WARPS in ((2048, 4), (4096, 4), (8192, 4), (8192, 8), (16384, 8)):
        how = f"{kernels.TILE}/{kernels.WARPS}"
        yield f"project {how}", in_graph(lambda: one_token.project(x, norm, next(matrices), gate), n)
        yield f"add_products {how}", in_graph(lambda: one_token.add_products(y, (x, next(matrices))), n)
    kernels.TILE, kernels.WARPS = 4096, 4


def attention_piece(
    H: int, G: int, K: int, batch: int, span: int, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, float]]:
    """Microseconds of attention to a full span."""
    stored = torch.randn(batch, 2 * G, span, K, device=device).to(dtype)
    qkv = torch.randn(batch, 1, (H + 2 * G) * K, device=device).to(dtype)
    tables = torch.randn(batch, 1, 2, 3, K, device=device)
    lengths = torch.full((batch,), span - 1, device=device)
    for name, call in (("attend", one_token.attend), ("plain", one_token.plain_attend)):
        yield name, in_graph(partial(call, qkv, tables, stored, lengths, span, H, 0.1), 20)


def profile(options: argparse.Namespace, device: torch.device) -> None:
    """Kernels of a captured step, by the time they take."""
    if device.type != "cuda":
        return
    for name in options.models:
        for batch in (options.batches[0], options.batches[-1]):
            size, precision = options.sizes[0], options.precisions[0]
            model = build(name, size, precision, device)
            config = SampleConfig(max_new_tokens=200, num_samples=batch, **HOW)
            with torch.inference_mode(), ready_to_decode(model, batch):
                decoder = Decoder(model, [PROMPT], config)
                for _ in range(60):
                    decoder.step()
                torch.cuda.synchronize()
                with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
                    for _ in range(10):
                        decoder.step()
                    torch.cuda.synchronize()
            events = [event for event in found.key_averages() if event.device_time_total > 0]
            total = sum(event.device_time_total for event in events) / 10
            count = sum(event.count for event in events) / 10
            print(f"{name} {size} {precision} batch {batch}: {total:.1f} us in {count:.0f} kernels a step")
            for event in sorted(events, key=lambda event: -event.device_time_total)[:25]:
                each = event.device_time_total / event.count
                print(
                    f"  {event.device_time_total / 10:8.1f} us  {event.count / 10:6.1f} x {each:6.2f}  {event.key[:90]}"
                )
            sys.stdout.flush()
            del model, decoder
            gc.collect()


def described(device: torch.device, limit: float) -> dict[str, Any]:
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    if importlib.util.find_spec("triton") is not None:
        import triton

        versions["triton"] = triton.__version__
    return {
        "date": datetime.date.today().isoformat(),
        "device": describe(device),
        "bytes_per_s": limit,
        "triton": hardware.of_device(device).triton,
        "versions": versions,
    }


def as_markdown(machine: dict[str, Any], rows: list[Row]) -> str:
    lines = [
        f"{machine['date']}, {machine['device']}, {machine['versions']}, {machine['bytes_per_s'] / 1e9:,.0f} GB/s",
        "",
        "| | model | size | precision | batch | tokens/s | steps/s | bandwidth | |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in rows:
        steps = "" if row.steps_per_s is None else f"{row.steps_per_s:,.0f}"
        share = "" if row.bandwidth is None else f"{row.bandwidth:.0%}"
        lines.append(
            f"| {row.what} | {row.model} | {row.size} ({row.parameters / 1e6:,.0f}M) | {row.precision} | {row.batch} "
            f"| {row.tokens_per_s:,.0f} | {steps} | {share} | {row.note} |"
        )
    return "\n".join(lines) + "\n"


def parse() -> tuple[argparse.Namespace, torch.device]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    words = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("--models", type=words, help="default: llama,nyx; beside originals alone all")
    parser.add_argument("--sizes", type=words)
    parser.add_argument("--precisions", type=words)
    parser.add_argument("--batches", type=lambda text: [int(word) for word in words(text)])
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--parts", type=words, default=list(PARTS))
    parser.add_argument("--nanogpt", type=Path)
    parser.add_argument("--originals", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    device = pick_device(options.device)
    gpu = device.type == "cuda"
    best = pick_precision("auto", device)
    options.models = options.models or (models.names() if options.parts == ["originals"] else ["llama", "nyx"])
    options.sizes = options.sizes or (
        ["base"] if options.quick else ["base", "large", "xl"] if gpu else ["nano", "small"]
    )
    options.precisions = options.precisions or ([best] if options.quick else [best, "fp32", *QUANTIZED])
    options.precisions = list(dict.fromkeys(options.precisions))
    options.batches = options.batches or ([1, 32] if options.quick else [1, 8, 32])
    options.tokens = options.tokens or (256 if options.quick else 512)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    return options, device


def main() -> int:
    options, device = parse()
    limit = rate(device)
    machine = described(device, limit)
    print(json.dumps(machine), flush=True)
    measures = {
        "ours": measure_ours,
        "transformers": measure_transformers,
        "nanogpt": measure_nanogpt,
        "originals": measure_originals,
        "hand": measure_hand,
    }
    told = {"alone": alone, "pieces": pieces, "profile": profile}
    rows = []
    with without_kernels(options.plain):
        for part in options.parts:
            if part in told:
                told[part](options, device)
                continue
            for row in measures[part](options, device, limit):
                rows.append(row)
                print(json.dumps(asdict(row)), flush=True)
                if options.results is not None:
                    with options.results.open("a") as file:
                        file.write(json.dumps(machine | asdict(row)) + "\n")
    text = as_markdown(machine, rows)
    print(text)
    if options.markdown is not None:
        options.markdown.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
