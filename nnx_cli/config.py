"""The settings of every command: frozen dataclasses that own each default and check themselves. No torch here.

A field's name is the option's name, its comment the option's help: `read_fields` hands both to the command line.
"""

from __future__ import annotations

import ast
import codecs
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from encodings.aliases import aliases
from functools import cache
from pathlib import Path
from typing import Any

from nnx_cli.errors import UsageError, nearest, nearest_file

GIB = 2**30
LENGTHS = ("max_steps", "max_time", "epochs")  # of a run: one is given, or derived
TOKENIZERS = ("auto", "byte", "char", "bpe", "gpt2", "cl100k_base", "o200k_base")
LEAST_IDS, MOST_IDS = {"auto": 256, "byte": 256, "char": 256, "bpe": 257}, {"byte": 256}  # of a vocabulary
BPE_IDS = 4096  # of a vocabulary of byte pairs of one's own, unless the text suits more
NO_TEXT = (
    "base64_codec",
    "bz2_codec",
    "hex_codec",
    "quopri_codec",
    "rot_13",
    "uu_codec",
    "zlib_codec",
)  # Python's codecs
# parts of a run after which it is looked at
MILESTONES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
MOST_WEIGHT_DECAY = 1e3
BUDGETS = {"tokens": "2M", "time": "2m", "flops": "1e14"}  # of a run in a race, by what is equal
MODULES_OF = re.compile(r"\{(\w+)\}")  # in a field's comment: the names of that package's modules


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Text to token folder."""

    tokenizer: str = "auto"  # kind: auto (byte or bpe), byte, char, bpe, gpt2, cl100k_base, o200k_base, or a file
    vocab_size: int | None = None  # ids of a trained tokenizer (bpe, char); default: what suits the text
    val_fraction: float = 0.1  # part of the text held out for validation
    text_key: str = "text"  # field of a JSONL row, column of a table; a path if it lies deeper: messages.content
    prompt_key: str | None = None  # field with a question, of rows that are no text but conversations; default: none
    answer_key: str | None = None  # field with the answer to it, which is what a model learns to write; default: none
    encoding: str | None = None  # encoding of text, such as cp1251 or gb18030; default: found out for every file
    separator: str | None = None  # text between two documents of a file; default: a line such as <|endoftext|>
    errors: str = "replace"  # invalid bytes, bad rows, files of many: strict refuses, replace counts and reports
    workers: int | None = None  # encoding threads; default: one per core
    max_memory_bytes: int = 256 * 2**20  # bound on what preparing holds at once
    xray: bool = True  # end with an X-ray of the text: copies, odd characters, what an n-gram model gets on it

    def __post_init__(self) -> None:
        check_range("val-fraction", self.val_fraction, 0.0, 0.5, low_open=True)
        check_encoding(self.encoding)
        if (self.prompt_key is None) != (self.answer_key is None):
            lacking = "--answer-key" if self.answer_key is None else "--prompt-key"
            raise UsageError("--prompt-key and --answer-key belong together", fix=f"add {lacking} NAME")
        if self.prompt_key is not None and self.text_key != PrepareConfig.text_key:
            raise UsageError("--text-key and --prompt-key: give one", fix="leave out --text-key")
        if self.separator == "":
            raise UsageError("--separator is empty; it stands between documents", fix="write it like '\\n---\\n'")
        check_choice("errors", self.errors, ("strict", "replace"))
        check_tokenizer(self.tokenizer)
        least, most = LEAST_IDS.get(self.tokenizer, 1), MOST_IDS.get(self.tokenizer, 2**24)
        check_range("vocab-size", self.vocab_size, least, most)
        check_range("workers", self.workers, 1, 1024)
        check_range("max-memory", self.max_memory_bytes, 32 * 2**20, 2**50)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run. None means: derived from the machine and the data."""

    max_steps: int | None = None  # length of the run in optimizer steps, in all, also after --resume
    max_time: str | None = None  # length of the run in training time (90s, 20m, 8h), in all, also after --resume
    epochs: float | None = None  # length of the run in epochs of the training text, in all, also after --resume
    stop_early: str = "auto"  # before --max-time is up: auto (where the text has given what it can), off
    batch_size: int | None = None  # sequences in a micro-batch
    grad_accum: int | None = None  # micro-batches in an optimizer step
    tokens_per_step: int | None = None  # batch size x accumulation x sequence length
    short_sequences: float | None = None  # part of the run, at its start, that reads sequences of half the length
    optimizer: str = "auto"  # algorithm: auto, {optim}
    optimizer_in_backward: bool = False  # update each weight as its gradient appears, and free that: saves memory
    lr: float | None = None  # peak learning rate
    schedule: str = "linear"  # learning rate after warm-up: linear, cosine, wsd (constant, then linear), constant
    warmup_steps: int | None = None  # steps of rising learning rate
    min_lr: float = 0.0  # learning rate at the end
    weight_decay: float | None = None  # weight decay coefficient, of matrices
    beta2: float | None = None  # coefficient of AdamW's running average of squared gradients
    grad_clip: float = 1.0  # max norm of the gradient; 0: no clipping
    device: str = "auto"  # where to compute: auto, cpu, cuda, cuda:N, mps
    precision: str = "auto"  # arithmetic: auto, fp32, bf16, fp16
    weight_precision: str = "auto"  # type of stored matrices: auto, fp32, bf16 (less memory; rounded at random)
    compile: str = "auto"  # use torch.compile and CUDA graphs: auto (if faster), on, graph (no compiler), off
    activation_checkpointing: str = "auto"  # run blocks again in the backward pass: auto (if they must), on, half, off
    vram: str | None = None  # cap on the memory of this machine's device, such as 8GB; 1 GiB of it is kept free
    parallel: str = "auto"  # on several GPUs: auto, ddp (each holds the model), fsdp (each a part of it)
    threads: int | None = None  # CPU threads
    val_every: int | None = None  # steps between validations
    val_batches: int | None = None  # validation windows are taken in this many micro-batches
    sample_every: int | None = None  # steps between samples; 0: none
    sample_prompt: str | None = None  # what the samples start with; default: what a text begins with
    save_every: int | None = None  # steps between checkpoints
    keep: int = 2  # newest checkpoints to keep
    report: bool = True  # write report.html into the run folder as the run goes
    watch: bool = True  # keep what happens inside the model at milestones, for the report and nnx visualize
    log_to: list[str] | None = None  # tracker to show the run in too, may be repeated: {trackers}; default: none
    patience: int | None = None  # stop after this many validations without a better one; default: never
    lora_rank: int | None = None  # train LoRA adapters of this rank, the weights of --init-from frozen; default: none
    seed: int = 1337  # seed of initial weights, data order and dropout
    deterministic: bool = False  # same bits on every run of the same machine, also on a GPU (slower there)

    def __post_init__(self) -> None:
        for name in (
            "max_steps",
            "batch_size",
            "grad_accum",
            "tokens_per_step",
            "val_every",
            "val_batches",
            "save_every",
            "patience",
            "keep",
            "lora_rank",
        ):
            check_range(name, getattr(self, name), 1, 2**40)
        check_range("threads", self.threads, 1, 1024)
        check_range("sample-every", self.sample_every, 0, 2**40)
        check_range("warmup-steps", self.warmup_steps, 0, 2**40)
        check_range("epochs", self.epochs, 0.0, 1e9, low_open=True)
        check_range("lr", self.lr, 0.0, 1e3, low_open=True)
        check_range("min-lr", self.min_lr, 0.0, 1e3)
        check_range("weight-decay", self.weight_decay, 0.0, MOST_WEIGHT_DECAY)
        check_range("grad-clip", self.grad_clip, 0.0, 1e9)
        check_range("short-sequences", self.short_sequences, 0.0, 1.0)
        check_range("seed", self.seed, 0, 2**63 - 1)
        check_range("beta2", self.beta2, 0.0, 0.9999999, low_open=True)  # float32 has no more below 1
        check_device(self.device)
        check_trackers(self.log_to or [])
        check_choice("stop-early", self.stop_early, ("auto", "off"))
        check_choice("optimizer", self.optimizer, ("auto", *module_names("optim")))
        check_choice("schedule", self.schedule, ("linear", "cosine", "wsd", "constant"))
        check_choice("precision", self.precision, ("auto", "fp32", "bf16", "fp16"))
        check_choice("weight-precision", self.weight_precision, ("auto", "fp32", "bf16"))
        check_choice("compile", self.compile, ("auto", "on", "graph", "off"))
        check_choice("activation-checkpointing", self.activation_checkpointing, ("auto", "on", "half", "off"))
        check_choice("parallel", self.parallel, ("auto", "ddp", "fsdp"))
        if self.optimizer_in_backward and (self.grad_accum or 1) > 1:
            raise UsageError(f"--optimizer-in-backward sees one micro-batch, not --grad-accum {self.grad_accum}")
        if self.optimizer_in_backward and self.precision == "fp16":
            raise UsageError("--optimizer-in-backward has no loss scale, which fp16 needs", fix="take --precision fp32")
        if self.parallel == "fsdp" and self.optimizer_in_backward:
            raise UsageError("--optimizer-in-backward needs whole gradients, not --parallel fsdp", fix="leave it out")
        if self.parallel == "fsdp" and self.precision == "fp16":
            raise UsageError("fp16's loss scale needs whole gradients, not --parallel fsdp", fix="take --parallel ddp")
        if self.lr is not None and self.min_lr > self.lr:
            raise UsageError(f"--min-lr {typed(self.min_lr)} is above --lr {typed(self.lr)}")
        if self.max_steps and self.warmup_steps and self.warmup_steps > self.max_steps:
            raise UsageError(f"--warmup-steps {self.warmup_steps} is more than --max-steps {self.max_steps}")
        parse_duration(self.max_time)
        parse_bytes(self.vram)

    @property
    def max_time_s(self) -> float | None:
        """`max_time` in seconds."""
        return parse_duration(self.max_time)

    @property
    def vram_bytes(self) -> int | None:
        """`vram` in bytes."""
        return parse_bytes(self.vram)

    @property
    def trackers(self) -> list[str]:
        """The trackers in `log_to`, each once."""
        return [name for name in dict.fromkeys(self.log_to or []) if name != "none"]


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How text is drawn from a model."""

    max_new_tokens: int = 300  # length of a sample
    num_samples: int = 1  # samples, drawn side by side after one reading of the prompt
    temperature: float = 0.8  # of the softmax: below 1 safer text, above 1 wilder; 0: same as --greedy
    top_k: int | None = None  # draw among the k likeliest tokens only; default: all
    top_p: float | None = None  # draw among the likeliest tokens that hold this much probability; default: all
    min_p: float | None = None  # drop tokens less likely than this part of the likeliest; default: none
    repetition_penalty: float = 1.0  # makes tokens already in the text less likely; 1: none
    greedy: bool = False  # always the likeliest token
    seed: int = 0  # seed of random draws: same seed, same text

    def __post_init__(self) -> None:
        check_range("max-new-tokens", self.max_new_tokens, 1, 10**7)
        check_range("num-samples", self.num_samples, 1, 4096)
        check_range("temperature", self.temperature, 0.0, 100.0)
        check_range("top-k", self.top_k, 1, 2**24)
        check_range("top-p", self.top_p, 0.0, 1.0, low_open=True)
        check_range("min-p", self.min_p, 0.0, 1.0)
        check_range("repetition-penalty", self.repetition_penalty, 0.0, 100.0, low_open=True)
        check_range("seed", self.seed, 0, 2**63 - 1)


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Where a model is served, and how much a request may ask for."""

    host: str = "127.0.0.1"  # address to listen at
    port: int = 8000  # port to listen at; 0: any that is free
    max_prompt_tokens: int = 32_768  # longest prompt that is read; of one longer than the context the end is seen
    max_new_tokens: int = 4096  # longest answer that is written
    queue: int = 64  # answers that may wait for others to end; with more, requests are refused
    allow_remote: bool = False  # let other machines ask: with another --host, and --api-key
    api_key: str | None = None  # key that requests have to bring; default: none

    def __post_init__(self) -> None:
        check_range("port", self.port, 0, 65_535)
        check_range("max-prompt-tokens", self.max_prompt_tokens, 1, 10**7)
        check_range("max-new-tokens", self.max_new_tokens, 1, 10**7)
        check_range("queue", self.queue, 0, 10**5)


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """How a model is quantized."""

    bits: int = 8  # bits of a weight: 8 or 4
    group_size: int = 32  # with 4 bits: neighbouring weights that share a scale
    max_drop: float | None = None  # bits per byte it may cost, else layers stay in 16 bits; default: 1 % of the model's

    def __post_init__(self) -> None:
        check_choice("bits", str(self.bits), ("8", "4"))
        check_range("group-size", self.group_size, 2, 2**16)
        check_range("max-drop", self.max_drop, 0.0, 100.0)


@dataclass(frozen=True, kw_only=True)
class RaceConfig:
    """A race between architectures. None means: derived from the device."""

    models: str = "all"  # architectures, with commas: all, {models}, files of yours; ngpt+adamw: so trained
    size: str | None = None  # named size of all, by parameters outside embedding and head; default on a GPU: tiny
    parameters: str | None = None  # instead: so many outside embedding and head, such as 10.7M; default on a CPU: 300K
    equal: str = "tokens"  # what every run may use as much of: tokens, time, flops
    budget: str | None = None  # how much of it: 20M tokens, 10m of training, 1e15 FLOPs; default 2M, 2m, 1e14
    seeds: int = 3  # runs of each architecture, with seeds from 1 on
    target: float | None = None  # bits per byte to tell the way to, in tokens, time and FLOPs; default: none
    task: str = "text"  # what is raced on: text, recall (generated text that asks for what it said before), plasticity
    keep: str = "best"  # weights to keep of runs that are done: best, none

    def __post_init__(self) -> None:
        check_choice("equal", self.equal, tuple(BUDGETS))
        check_choice("keep", self.keep, ("best", "none"))
        check_choice("task", self.task, ("text", "recall", "plasticity"))
        if self.task == "plasticity" and self.equal != "tokens":
            raise UsageError("--task plasticity compares losses at equal steps", fix="leave out --equal")
        check_range("seeds", self.seeds, 1, 1000)
        check_range("target", self.target, 0.0, 1e3, low_open=True)
        if self.size is not None and self.parameters is not None:
            raise UsageError("--size and --parameters: give one")
        check_range("parameters", parse_count("parameters", self.parameters), 1, 10**12)
        self.amount()

    def amount(self) -> float:
        """The budget of a run: seconds, tokens or FLOPs. Raises UsageError for a unit that does not suit."""
        text = (BUDGETS[self.equal] if self.budget is None else self.budget).strip()
        if self.equal == "time" and re.fullmatch(r"[\d.]+\s*(s|m|min|h|d)", text, re.ASCII):
            return parse_duration(text) or 0.0
        if self.equal == "tokens" and (count := parse_count("budget", text, silent=True)):
            return count
        if (
            self.equal == "flops"
            and re.fullmatch(r"\d+(\.\d+)?(e\+?\d{1,2})?", text, re.ASCII)
            and 0 < float(text) < 1e30
        ):
            return float(text)
        what, example = {
            "time": ("a length of time", "10m"),
            "tokens": ("a number of tokens", "20M"),
            "flops": ("a number of FLOPs", "1e15"),
        }[self.equal]
        raise UsageError(
            f"--budget {text!r} is not {what}, which --equal {self.equal} needs",
            fix=f"write it like --budget {example}",
        )


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """A sweep over settings of training."""

    sampler: str = "random"  # how settings are chosen: random, grid (all), halving (the best go on), tpe (needs Optuna)
    trials: int | None = None  # settings that are tried; default: 20, of a grid all
    budget: str | None = None  # length of a trial: 20M tokens or 2m of training; default: 2m
    eta: int | None = None  # with halving, one in so many goes on, and so many times as far; default: 3
    keep: str = "best"  # weights to keep of trials that are done: best, none

    def __post_init__(self) -> None:
        check_choice("sampler", self.sampler, ("random", "grid", "halving", "tpe"))
        check_choice("keep", self.keep, ("best", "none"))
        check_range("trials", self.trials, 1, 10_000)
        check_range("eta", self.eta, 2, 100)
        self.length()

    def length(self) -> tuple[str, float] | None:
        """The budget: max_time and seconds, or tokens and their number. Raises UsageError where it is neither."""
        text = (self.budget or "").strip()
        if self.budget is None:
            return None
        if re.fullmatch(r"[\d.]+\s*(s|m|min|h|d)", text, re.ASCII):
            return "max_time", parse_duration(text) or 0.0
        if not re.fullmatch(r"[\d.]+", text, re.ASCII) and (count := parse_count("budget", text, silent=True)):
            return "tokens", count
        raise UsageError(
            f"--budget {text!r} is neither a length of time nor a number of tokens",
            fix="write it like --budget 2m (minutes) or --budget 20M (million tokens)",
        )


@cache
def module_names(package: str) -> tuple[str, ...]:
    """The public modules of a package of this project in alphabetical order, by its files: nothing is imported."""
    return tuple(sorted(path.stem for path in (Path(__file__).parent / package).glob("[!_]*.py")))


@dataclass(frozen=True)
class Field:
    """A setting, as the source of its dataclass states it."""

    name: str
    type: str  # int, float, bool, str or list[str], whether or not None is allowed
    default: Any
    help: str

    @property
    def sentence(self) -> str:
        """Its help as a sentence."""
        return f"{self.help[:1].upper()}{self.help[1:]}." if self.help else ""

    @property
    def option(self) -> str:
        """The name with dashes."""
        return "--" + self.name.replace("_", "-")


@cache
def read_fields(path: Path, class_name: str) -> tuple[Field, ...]:
    """The fields of a dataclass of literals in a file, read from its source without running it."""
    return fields_in(path.read_text(encoding="utf-8"), class_name)


@cache
def fields_in(source: str, class_name: str) -> tuple[Field, ...]:
    """The fields of a dataclass of literals and the comments beside them. Raises LookupError without such a class."""
    found = re.search(rf"^class {class_name}\b.*\n(?:(?:[ \t].*)?\n)+", source, re.MULTILINE)
    if found is None:
        raise LookupError(f"no class {class_name}")
    lines = found[0].splitlines()
    tree = ast.parse(found[0])  # the class alone: to parse whole files would be half of the time that help takes
    return tuple(
        Field(
            item.target.id,
            ast.unparse(item.annotation).removesuffix(" | None"),
            _eval_literal(item.value),
            MODULES_OF.sub(
                lambda found: ", ".join(module_names(found[1])), lines[item.lineno - 1].partition("#")[2].strip()
            ),
        )
        for item in ast.walk(tree)
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and item.value is not None
        if not ast.unparse(item.annotation).startswith("ClassVar")
    )


def _eval_literal(node: ast.expr) -> Any:
    """The value of a literal, of a product or power of literals, or of `DERIVED`."""
    if isinstance(node, ast.Name) and node.id == "DERIVED":
        return None
    if isinstance(node, ast.BinOp):
        left, right = _eval_literal(node.left), _eval_literal(node.right)
        return left * right if isinstance(node.op, ast.Mult) else left**right
    return ast.literal_eval(node)


def own_fields(config: type) -> tuple[Field, ...]:
    """The fields of a dataclass of this file."""
    return read_fields(Path(__file__), config.__name__)


def check_range(name: str, value: float | None, low: float, high: float, *, low_open: bool = False) -> None:
    """Raise UsageError unless `value` is None, or finite and low <= value <= high (low < value with `low_open`)."""
    if value is None or (low < value if low_open else low <= value) and value <= high:  # no comparison holds for nan
        return
    option, least = "--" + name.replace("_", "-"), f"above {number(low)}" if low_open else f"at least {number(low)}"
    allowed = f"a number {least} and at most {number(high)}" if low < high else number(high)
    raise UsageError(f"{option} is {typed(value)}; it must be {allowed}")


def number(value: float) -> str:
    """A number as people write it: 1,099,511,627,776 or 0.9."""
    return f"{int(value):,}" if value == value // 1 and abs(value) < 1e16 or isinstance(value, int) else repr(value)


def typed(value: float) -> str:
    """A number as it was typed, or how long it is."""
    text = number(value).replace(",", "")
    return text if len(text) <= 40 else f"a number of {len(text.lstrip('-'))} digits"


def check_one_length(values: Mapping[str, Any]) -> None:
    """Raise UsageError where a user gave two lengths. (A derived length may have two ends; the first one counts.)"""
    lengths = [name for name in LENGTHS if values.get(name) is not None]
    if len(lengths) > 1:
        raise UsageError(f"two lengths: {' and '.join('--' + name.replace('_', '-') for name in lengths)}; give one")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise UsageError, with the nearest match, unless `value` is one of `choices`."""
    if value not in choices:
        near, known = nearest(value, choices), ", ".join(choices)
        refused = f"--{name} has no choice {value!r}"
        raise UsageError(refused + near, fix=f"choose from {known}") if near else UsageError(f"{refused}: {known}")


def check_trackers(names: list[str]) -> None:
    """Raise UsageError, with the nearest match, for a name that is no tracker's, and for none beside one."""
    for name in names:
        check_choice("log-to", name, (*module_names("trackers"), "none"))
    if len(names) > 1 and "none" in names:
        raise UsageError("--log-to none goes with no other tracker", fix="leave out --log-to none")


def check_tokenizer(kind_or_file: str) -> None:
    """Raise UsageError for a name that is no kind of tokenizer and no file."""
    if kind_or_file not in TOKENIZERS and not Path(kind_or_file).is_file():
        kinds = ", ".join(TOKENIZERS)
        near = nearest(kind_or_file, TOKENIZERS) or nearest_file(kind_or_file)
        raise UsageError(f"--tokenizer is {kind_or_file!r}{near or f'; choose from {kinds}, or name a tokenizer.json'}")


def check_device(name: str) -> None:
    """Raise UsageError for a name that means no device, here or elsewhere."""
    if not re.fullmatch(r"auto|(cpu|cuda|mps)(:\d{1,4})?", name, re.ASCII):
        raise UsageError(f"--device has no choice {name!r}: auto, cpu, cuda, cuda:N, mps")


def check_encoding(name: str | None) -> None:
    """Raise UsageError, with the nearest match, unless `name` is None or a text encoding of this Python."""
    try:
        if name is not None:
            " ".encode(name)
            codecs.getincrementaldecoder(name)
    except (LookupError, ValueError, TypeError) as error:
        names = sorted({name for pair in aliases.items() if pair[1] not in NO_TEXT for name in pair})
        raise UsageError(f"--encoding {name!r} is no encoding of text{nearest(str(name).lower(), names)}") from error


def parse_duration(text: str | None) -> float | None:
    """Seconds in "90s", "20m", "8h", "2d" or a bare number of seconds. Raises UsageError for anything else."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|min|h|d|)", text.strip(), re.ASCII)
    seconds = float(match[1]) * {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}[match[2]] if match else 0.0
    if not 0 < seconds < 1e9:
        raise UsageError(f"{text!r} is no length of time", fix="write it like 90s, 20m or 8h")
    return seconds


def parse_bytes(text: str | None) -> int | None:
    """Bytes in "8GB", "7.5GiB", "512M": a GPU's GB and a GiB are the same 2**30. Raises UsageError for anything
    else."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(?:i?B)?|B)", text.strip(), re.IGNORECASE | re.ASCII)
    n_bytes = float(match[1]) * 1024 ** " KMGT".index((match[2] or " ").upper()) if match else 0.0
    if not 0 < n_bytes < 2**60:
        raise UsageError(f"{text!r} is no amount of memory", fix="write it like 8GB or 512MB")
    return int(n_bytes)


def parse_count(name: str, text: str | None, silent: bool = False) -> int | None:
    """The number in "10.7M", "800K", "1B" or "500000". Raises UsageError for anything else, or is None if `silent`."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMBG]?)", text.strip(), re.ASCII)
    scale = {"": 1, "k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9}
    count = round(float(match[1]) * scale[match[2]]) if match and len(text) < 40 else 0
    if not 0 < count < 2**50:
        if silent:
            return None
        raise UsageError(f"--{name} is {text!r}; it must be a number", fix=f"write it like --{name} 10.7M")
    return count


def unescape(text: str) -> str:
    r"""`text` of the command line with \n, \t and \\ as what they stand for; any other backslash is one."""
    return re.sub(r"\\([nt\\])", lambda found: {"n": "\n", "t": "\t"}.get(found[1], "\\"), text)


def parse_toml(text: str, origin: str) -> dict[str, Any]:
    """Settings in a TOML text; dashes and underscores are the same, `[train]`-like tables are merged into one level.

    Raises UsageError where it is no TOML.
    """
    import tomllib

    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # besides what TOML forbids: numbers and dates out of range
        raise UsageError(f"{origin} is not TOML: {error}") from error
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= value if isinstance(value, dict) else {key: value}
    return {key.replace("-", "_"): value for key, value in flat.items()}


KINDS_IN_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "list[str]": "text, or a list of texts",
}


def coerce(fields: Iterable[Field], values: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """`values` of a file in the types of `fields`; raises UsageError for another name or a value of another type."""
    kinds = {field.name: field.type for field in fields}
    result = {}
    for name, value in values.items():
        if name not in kinds:
            raise UsageError(f"{origin}: there is no setting {name!r}{nearest(name, kinds)}")
        kind = kinds[name]
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise UsageError(f"{origin}: {name} is a number of more than 64 bits")
        if kind == "float" and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if kind == "str" and isinstance(value, (int, float)) and not isinstance(value, bool):
            value = str(value)
        if kind == "list[str]":
            value = [value] if isinstance(value, str) else value
            fits = isinstance(value, list) and all(isinstance(each, str) for each in value)
        else:
            fits = type(value).__name__ == kind
        if not fits:
            raise UsageError(f"{origin}: {name} is {value!r}; it must be {KINDS_IN_WORDS[kind]}")
        result[name] = value
    return result
