"""Prompts to text."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from nnx_cli.config import SampleConfig
from nnx_cli.data.tokenizers.base import Tokenizer
from nnx_cli.inference.decoding import Decoder
from nnx_cli.inference.text_stream import TextStream
from nnx_cli.layers.blocks import direct_calls
from nnx_cli.layers.linear import weights_cast
from nnx_cli.layers.quantized import unpack_slow_layers
from nnx_cli.models._base import LanguageModel

BYTES_FOR_A_THREAD = 80 * 2**10  # of a matrix: two threads write 1.02 to 1.21 times as fast with `nano`: decode.md


@dataclass(frozen=True)
class Sample:
    """One generated text. `stop_reason` is length, stop (a stop string), eot (end-of-text token) or interrupted."""

    text: str
    tokens: list[int]
    stop_reason: str


@dataclass
class Generation:
    """Samples, prompt after prompt, and what reading the prompts and drawing the tokens took."""

    samples: list[Sample] = field(default_factory=list)
    prefill_tokens: int = 0
    prefill_s: float = 0.0
    decode_tokens: int = 0
    decode_s: float = 0.0

    @property
    def prefill_tokens_per_s(self) -> float:
        """Speed of reading prompts."""
        return self.prefill_tokens / max(self.prefill_s, 1e-9)

    @property
    def decode_tokens_per_s(self) -> float:
        """Speed of drawing, over all samples."""
        return self.decode_tokens / max(self.decode_s, 1e-9)


@torch.inference_mode()
def generate(
    model: LanguageModel,
    tokenizer: Tokenizer | None,
    prompts: Sequence[Sequence[int]],
    config: SampleConfig,
    *,
    stops: Sequence[str] = (),
    use_cache: bool = True,
    on_text: Callable[[int, str], None] = lambda sample, text: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Generation:
    """Draw `num_samples` continuations of every prompt (token ids, at least one each) side by side.

    `on_text(number of the sample, piece of text)` is called as text appears; all end early where `should_stop` says so.
    Of a prompt longer than the context the model sees the end.
    """
    n_samples = len(prompts) * config.num_samples
    result = Generation(prefill_tokens=sum(min(len(p), model.config.seq_len) for p in prompts))
    streams = [TextStream(tokenizer, stops, partial(on_text, number)) for number in range(n_samples)]
    started, interrupted = time.perf_counter(), False
    with ready_to_decode(model, n_samples):
        for tokens in Decoder(model, prompts, config, use_cache).tokens(config.max_new_tokens):
            if not result.decode_tokens:
                result.prefill_s = time.perf_counter() - started
            for stream, token in zip(streams, tokens, strict=True):
                if stream.stop_reason is None:
                    stream.push(token)
                    result.decode_tokens += 1
            if all(stream.stop_reason for stream in streams) or (interrupted := should_stop()):
                break
    for stream in streams:
        stream.finish("interrupted" if interrupted else "length")
        result.samples.append(Sample(stream.text, stream.tokens, stream.stop_reason or "length"))
    result.decode_s = time.perf_counter() - started - result.prefill_s
    return result


@contextmanager
def ready_to_decode(model: LanguageModel, n_sequences: int) -> Iterator[None]:
    """Meanwhile the model is in evaluation mode, with its matrices at hand in the type that it computes in, and a CPU's
    threads are as many as have something to do. Quantized matrices that a GPU multiplies no faster with for so many
    sequences are unpacked for good."""
    was_training, threads = model.training, torch.get_num_threads()
    model.eval()
    if model.device.type == "cpu":
        torch.set_num_threads(min(threads, useful_threads(model, n_sequences)))
    else:
        unpack_slow_layers(model, model.compute_dtype, n_sequences)
    if model.device.type == "cuda":
        torch.cuda.set_device(model.device)  # each thread has one of its own
    try:
        with weights_cast(model, model.compute_dtype), direct_calls(model, model.compute_dtype):
            yield
    finally:
        torch.set_num_threads(threads)
        model.train(was_training)


def useful_threads(model: nn.Module, n_sequences: int) -> int:
    """CPU threads that a step of so many sequences has work for: one for every BYTES_FOR_A_THREAD that it reads of a
    matrix on average, since all wait for each other after every one. Two weights in a byte are the work of two."""
    named = [pair for pair in (*model.named_parameters(), *model.named_buffers()) if not pair[0].endswith("scale")]
    matrices = {id(p): p for _, p in named if p.dim() == 2}.values()
    n_bytes = sum(p.nbytes * (2 if p.dtype == torch.uint8 else 1) for p in matrices)
    return max(1, n_bytes * n_sequences // (max(1, len(matrices)) * BYTES_FOR_A_THREAD))
