"""Five minutes of training on any text, and what came of it beside others: bits per byte of the same held-out bytes.

    python tests/bench/five_minutes.py TEXT [--val FILE] [--seconds 300] [--vram 8GB] [--work FOLDER]
                                       [--tokenizer auto] [--options "--size small --seed 2"]
                                       [--autoresearch FOLDER [--set DEVICE_BATCH_SIZE=8 ...]]
                                       [--nanogpt FOLDER [--arguments "--n_layer=8 ..."]]
                                       [--peer-tokenizer bpe:8192:nanochat]
                                       [--parts prepare nnx autoresearch nanogpt] [--limit SECONDS]
                                       [--results FILE] [--markdown FILE]

TEXT is a file that `nnx prepare` reads; its last tenth, at most 1 MB, is held out, unless --val names that, as it has
to where TEXT is compressed. Every side has --seconds of training steps, on a GPU under the cap of --vram; what else a
side does comes on top ("whole"). All are judged here: nats of every token with bytes, over the bytes of these, in
windows of the side's own context, once without overlap and once from the beginnings of documents on ("aligned").

nnx             `nnx train` with --options, on tokens of --tokenizer, as by itself it makes them for so long a run
autoresearch    a checkout of https://github.com/karpathy/autoresearch (seen with 228791f): its train.py and prepare.py
                as they are, but that PyTorch's attention takes the place of FlashAttention 3, that what they download
                is this text, and that --set replaces constants (a micro-batch of 128 needs 45 GB)
nanogpt         a checkout of https://github.com/karpathy/nanoGPT (seen with 3adf61e1): its train.py as it is, with
                --arguments; it counts iterations, so that some are timed first

Peers read ids of --peer-tokenizer: `byte`, or `bpe:SIZE:PATTERN` as in tokenizer_race.py. A text of one document is cut
at lines into pieces of some 4,000 characters for autoresearch, which wants many. Finished parts are rows in --results
and are not done again; none is begun that would end after --limit. In calls of ten minutes, on one GPU:

    ... linux.jsonl --work FOLDER --autoresearch FOLDER --nanogpt FOLDER --limit 590 --parts prepare nnx
    ... the same with --parts autoresearch, then with --parts nanogpt
"""

from __future__ import annotations

import argparse
import datetime
import json
import pickle
import re
import shlex
import site
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from against_nanogpt import CPU_RECIPE, GPU_RECIPE, Place, nanogpt_model, peer_command, watch
from tokenizer_race import aligned_starts, bits_per_byte, cut_text, make_tokens
from torch import Tensor

from nnx_cli.config import PrepareConfig, TrainConfig
from nnx_cli.data.find import find_sources
from nnx_cli.data.prepare import prepare
from nnx_cli.data.sources import Reader, Report
from nnx_cli.data.token_folder import TokenFolder, open_token_folder
from nnx_cli.data.tokenizers.base import Tokenizer
from nnx_cli.data.tokenizers.hf_json import load_tokenizer
from nnx_cli.layers.loss import token_losses
from nnx_cli.runs.find import find_model
from nnx_cli.runs.load import load_model
from nnx_cli.system.device import describe, pick_device
from nnx_cli.training.inputs import Shape, model_vocabularies
from nnx_cli.training.session import configure_device

PARTS = ("prepare", "nnx", "autoresearch", "nanogpt")
OVERHEAD_S = 90  # what a part takes beside its training
SET = ("DEVICE_BATCH_SIZE=8", 'WINDOW_PATTERN="L"')  # what fits under 8 GB, and what PyTorch's attention can
TIMED_ITERATIONS = 60
PIECE_CHARS = 4096
ROWS_OF_A_GROUP = 1024
KEYS = ("text", "part", "seconds", "vram", "settings")  # that make two rows the same
Losses = Callable[[Tensor, Tensor], Tensor]


def judge(
    losses_of: Losses, ids: np.ndarray, token_bytes: np.ndarray, documents: np.ndarray, seq_len: int, device: Any
) -> dict[str, float]:
    """Bits per byte of a stream in windows without overlap, and in windows aligned to documents."""
    seq_len = min(seq_len, len(ids) - 1)
    contiguous = np.minimum(np.arange(0, len(ids) - 1, seq_len), len(ids) - 1 - seq_len)
    found = {"contiguous": contiguous, "aligned": aligned_starts(documents, len(ids), seq_len)}
    return {name: bits_per_byte(losses_of, ids, token_bytes, starts, seq_len, device) for name, starts in found.items()}


def documents_of(path: Path) -> Iterator[str]:
    """The documents of a file."""
    parts: list[str] = []
    for piece in Reader().pieces(find_sources([path]), Report()):
        parts.append(piece.text)
        if piece.ends:
            yield "".join(parts)
            parts.clear()
    if parts:
        yield "".join(parts)


def in_pieces(document: str) -> list[str]:
    """A document cut at lines."""
    pieces = [""]
    for line in document.splitlines(keepends=True):
        if len(pieces[-1]) >= PIECE_CHARS:
            pieces.append("")
        pieces[-1] += line
    return pieces


def prepare_all(options: argparse.Namespace, work: Path) -> None:
    """The text and its tokens in the folder `work`: for us, and for peers."""
    texts = work / "texts"
    if not texts.exists():
        if options.val is None:
            cut_text(options.text, None, texts)
        else:
            texts.mkdir(parents=True)
            for split, path in (("train", options.text), ("val", options.val)):
                (texts / f"{split}{''.join(path.suffixes)}").write_bytes(path.read_bytes())
    if not (work / "ours").exists():
        (train,), (val,) = texts.glob("train.*"), texts.glob("val.*")
        training = TrainConfig(max_time=f"{options.seconds:g}s", device=options.device or "auto", vram=options.vram)
        suited = model_vocabularies(Shape("nyx", "auto", {}), training, *configure_device(training))
        prepare([train], work / "ours", PrepareConfig(tokenizer=options.tokenizer), [val], vocabularies=suited)
    if (options.autoresearch or options.nanogpt) and not (work / "peers").exists():
        make_tokens(texts, options.peer_tokenizer, work / "peers")


# ours


def train_nnx(options: argparse.Namespace, place: Place) -> dict[str, Any]:
    """A whole `nnx train`: the best weights and the last ones."""
    data, device = open_token_folder(place.work / "ours"), pick_device(place.device)
    run = place.work / f"nnx-{int(time.time())}"
    command = [sys.executable, "-m", "nnx_cli", "train", "--data", place.work / "ours", "--out", run, "--json"]
    vram = ["--vram", place.vram] if place.device == "cuda" else []
    budget = ["--max-time", f"{options.seconds:g}s", "--device", place.device]
    words = [*map(str, command), *budget, *vram, *shlex.split(options.options)]
    done = subprocess.run(words, env=place.environment("nnx"), stdout=subprocess.PIPE, text=True, check=True)
    status = json.loads(done.stdout)
    row = {"parameters": status["parameters"], "tokens": status["tokens"], "training_s": status["time_s"]}
    assert data.tokenizer is not None
    for which in ("last", "best"):
        model = load_model(find_model(f"{run}@{which}"), device)
        losses = partial(token_losses, model)
        lengths, documents = data.tokenizer.token_bytes(), data.documents["val"]
        row[which] = judge(losses, data.val, lengths, documents, model.config.seq_len, device)
    return row | row["best"] | {"ended": status["ended"], "settings_seen": " ".join(words[len(command) :])}


# autoresearch


def train_autoresearch(options: argparse.Namespace, place: Place) -> dict[str, Any]:
    """Its train.py in a process of its own, which judges what it trained."""
    home = place.work / "autoresearch"
    shards = home / ".cache" / "autoresearch" / "data"
    shards.mkdir(parents=True, exist_ok=True)
    for split, name in (("train", "shard_00000"), ("val", "shard_06542")):
        (path,) = (place.work / "texts").glob(f"{split}.*")
        documents = list(documents_of(path))
        if len(documents) == 1 and split == "train":
            documents = in_pieces(documents[0])
        lines = "".join(json.dumps(document) + "\n" for document in documents)
        (shards / f"{name}.parquet").write_text(lines, encoding="utf-8")  # read by `shard_module`
    result = home / "result.json"
    result.unlink(missing_ok=True)
    spec = {
        "checkout": str(options.autoresearch),
        "work": str(place.work),
        "device": place.device,
        "cap": place.cap_bytes(),
        "set": dict(pair.split("=", 1) for pair in options.set),
        "seconds": options.seconds,
        "result": str(result),
    }
    environment = place.environment("autoresearch") | {"HOME": str(home), "PYTHONUSERBASE": site.getuserbase()}
    if place.device == "cpu":
        environment["TORCHDYNAMO_DISABLE"] = "1"
    else:
        environment["PYTORCH_ALLOC_CONF"] = (
            "expandable_segments:True"  # train.py sets it, but not before torch is there
        )
    command = [sys.executable, __file__, "--autoresearch-child", json.dumps(spec)]
    with open(home / "log.txt", "w", encoding="utf-8") as log:
        subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)
    if not result.exists():
        log_lines = (home / "log.txt").read_text(encoding="utf-8").replace("\r", "\n").splitlines()
        raise SystemExit("autoresearch failed:\n" + "\n".join(log_lines[-15:]))
    return dict(json.loads(result.read_text()))


def autoresearch_child(spec: dict[str, Any]) -> None:
    """Run prepare.py and train.py here, judge the model, and write what was found."""
    cpu = spec["device"] == "cpu"
    if cpu:
        answers = {"get_device_capability": (0, 0), "max_memory_allocated": 0, "manual_seed": None, "synchronize": None}
        for name, value in answers.items():
            setattr(torch.cuda, name, lambda *_, value=value: value)
    else:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(spec["cap"] / total)
    sys.modules |= {name: types.ModuleType(name) for name in ("requests", "rustbpe")}  # for downloads and its BPE
    sys.modules |= {"pyarrow": types.ModuleType("pyarrow"), "pyarrow.parquet": shard_module()}
    sys.modules["pyarrow"].parquet = sys.modules["pyarrow.parquet"]
    sys.modules["kernels"] = attention_module()
    changes = {"TIME_BUDGET": repr(spec["seconds"]), **spec["set"]}
    sources = {name: (Path(spec["checkout"]) / f"{name}.py").read_text() for name in ("prepare", "train")}
    for name, value in changes.items():
        pattern = re.compile(rf"^{name} = .*$", re.MULTILINE)
        if not any(pattern.search(source) for source in sources.values()):
            raise SystemExit(f"autoresearch has no constant {name}")
        sources = {file: pattern.sub(f"{name} = {value}", source) for file, source in sources.items()}
    if cpu:
        sources = {
            file: source.replace('"cuda"', '"cpu"').replace("pin_memory=True", "pin_memory=False")
            for file, source in sources.items()
        }
    module = execute("prepare", sources["prepare"], spec["checkout"])
    module.evaluate_bpb = lambda *_: 0.0  # it is judged here
    own = load_tokenizer(Path(spec["work"]) / "peers" / "tokenizer.json")
    token_bytes = give_tokenizer(module, own)
    trained = execute("train", sources["train"], spec["checkout"])
    model = getattr(trained.model, "_orig_mod", trained.model).eval()

    def losses(ids: Tensor, targets: Tensor) -> Tensor:
        with trained.autocast_ctx:
            return model(ids, targets, reduction="none").view(ids.shape)

    ids, starts = stream(module.Tokenizer.from_directory(), Path(spec["work"]))
    found = judge(losses, ids, token_bytes, starts, module.MAX_SEQ_LEN, trained.device)
    found |= {"parameters": sum(p.numel() for p in model.parameters()), "tokens": trained.total_tokens}
    found |= {"training_s": trained.total_training_time, "peak_mb": trained.peak_vram_mb}
    Path(spec["result"]).write_text(json.dumps(found))


def execute(name: str, source: str, checkout: str) -> Any:
    """Run a script as the module of that name."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    module.__file__ = str(Path(checkout) / f"{name}.py")
    exec(compile(source, module.__file__, "exec"), module.__dict__)
    return module


def give_tokenizer(module: Any, own: Tokenizer) -> np.ndarray:
    """Put our vocabulary where prepare.py leaves its own, as tiktoken's encoding; returns the bytes of every token."""
    import tiktoken

    ranks = getattr(own, "ranks", {bytes([value]): value for value in range(256)})
    specials = {name: len(ranks) + n for n, name in enumerate(module.SPECIAL_TOKENS)}
    encoding = tiktoken.Encoding("own", pat_str=module.SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=specials)
    folder = Path(module.TOKENIZER_DIR)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(encoding))
    lengths = [len(token) for token, _ in sorted(ranks.items(), key=lambda item: item[1])] + [0] * len(specials)
    torch.save(torch.tensor(lengths, dtype=torch.int32), folder / "token_bytes.pt")
    return np.array(lengths)


def stream(tokenizer: Any, work: Path) -> tuple[np.ndarray, np.ndarray]:
    """The held-out documents as autoresearch encodes them, and the first token of each behind its BOS."""
    (path,) = (work / "texts").glob("val.*")
    bos = tokenizer.get_bos_token_id()
    rows = [tokenizer.encode(document, prepend=bos) for document in documents_of(path)]
    lengths = np.cumsum([0, *map(len, rows)])
    return np.array([token for row in rows for token in row]), lengths[:-1] + 1


def shard_module() -> Any:
    """What prepare.py asks of pyarrow.parquet, of files with a JSON string a line."""

    class ParquetFile:
        def __init__(self, path: str) -> None:
            self.texts = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
            self.num_row_groups = -(-len(self.texts) // ROWS_OF_A_GROUP)

        def read_row_group(self, index: int) -> Any:
            group = self.texts[index * ROWS_OF_A_GROUP : (index + 1) * ROWS_OF_A_GROUP]
            return types.SimpleNamespace(column=lambda name: types.SimpleNamespace(to_pylist=lambda: group))

    module = types.ModuleType("pyarrow.parquet")
    module.ParquetFile = ParquetFile
    return module


def attention_module() -> Any:
    """What train.py asks of Hugging Face's kernels: causal attention (B, T, H, K), by PyTorch."""

    def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, window_size: tuple[int, int]) -> Tensor:
        assert causal and window_size[0] >= q.shape[1], 'give --set WINDOW_PATTERN="L"'
        heads = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True).transpose(1, 2)

    module = types.ModuleType("kernels")
    flash = types.SimpleNamespace(flash_attn_func=attend)
    module.get_kernel = lambda repository: types.SimpleNamespace(flash_attn_interface=flash)
    return module


# nanoGPT


def train_nanogpt(options: argparse.Namespace, place: Place) -> dict[str, Any]:
    """Its train.py for as many iterations as the budget has room for, by the speed of some."""
    data, folder = open_token_folder(place.work / "peers"), place.work / "nanogpt"
    folder.mkdir(exist_ok=True)
    for split in ("train", "val"):
        np.asarray(getattr(data, split)).astype(np.uint16).tofile(folder / f"{split}.bin")
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": data.vocab_size}))
    recipe = CPU_RECIPE if place.device == "cpu" else GPU_RECIPE
    common = [*recipe, f"--dataset={folder}", f"--out_dir={folder}", "--eval_iters=1", *shlex.split(options.arguments)]

    def run(iterations: int, log_every: int) -> tuple[list[float], float]:
        own = [f"--max_iters={iterations}", f"--lr_decay_iters={iterations}", f"--eval_interval={iterations}"]
        own += [f"--log_interval={log_every}", "--always_save_checkpoint=True"]
        command = peer_command(place, "train.py", *common, *own)
        seen = watch(command, place, place.environment("nanogpt"), place.limit_s)
        if seen.code:
            raise SystemExit("nanoGPT failed:\n" + "\n".join(line for _, line in seen.lines[-15:]))
        times = [re.match(r"iter \d+: .*time ([\d.]+)ms", line) for _, line in seen.lines]
        steps = [at for at, line in seen.lines if line.startswith("iter ")]
        return [float(found[1]) / 1e3 for found in times if found], steps[-1] - steps[0]

    times, _ = run(TIMED_ITERATIONS, 1)
    iterations = max(TIMED_ITERATIONS, round(options.seconds / statistics.median(times[TIMED_ITERATIONS // 2 :])))
    _, seconds = run(iterations, 10)
    found = torch.load(folder / "ckpt.pt", map_location="cpu", weights_only=True)
    tokens = iterations * found["config"]["batch_size"] * found["model_args"]["block_size"]
    logits, seq_len, _ = nanogpt_model(place, folder / "ckpt.pt")
    return judge_logits(logits, data, seq_len, place) | {
        "parameters": sum(x.numel() for x in found["model"].values()),
        "tokens": tokens * found["config"]["gradient_accumulation_steps"],
        "training_s": seconds,
        "iterations": iterations,
    }


def judge_logits(logits: Callable[[Tensor], Tensor], data: TokenFolder, seq_len: int, place: Place) -> dict[str, float]:
    """`judge` of a model that gives logits (B, T, V)."""

    def losses(ids: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits(ids).float().transpose(1, 2), targets, reduction="none")

    assert data.tokenizer is not None
    lengths = data.tokenizer.token_bytes()
    return judge(losses, data.val, lengths, data.documents["val"], seq_len, pick_device(place.device))


# all of them


def table(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each finished part."""
    lines = [
        "| text | side | settings | parameters | tokens | training s | whole s | bits per byte | aligned |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in sorted(rows, key=lambda row: (row["text"], row["contiguous"])):
        lines.append(
            f"| {row['text']} | {row['part']} | `{row['settings']}` | {row['parameters'] / 1e6:.2f} M "
            f"| {row['tokens']:,} | {row['training_s']:.1f} | {row['whole_s']:.1f} "
            f"| {row['contiguous']:.4f} | {row['aligned']:.4f} |"
        )
    return lines


def settings_of(part: str, options: argparse.Namespace) -> str:
    """What distinguishes two runs of a part."""
    if part == "nnx":
        return f"{options.tokenizer} {options.options}".strip()
    own = " ".join(options.set) if part == "autoresearch" else options.arguments
    return f"{options.peer_tokenizer} {own}".strip()


def race(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Do what is asked for and missing; returns all rows that are there."""
    started, results = time.monotonic(), options.results
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    work = options.work.resolve()
    nanogpt = (options.nanogpt or Path()).resolve()
    place = Place(nanogpt, work, options.text, options.vram, device, options.limit, None, None)
    sides = {"nnx": train_nnx, "autoresearch": train_autoresearch, "nanogpt": train_nanogpt}
    for part in options.parts:
        if part == "prepare" or part in sides and not (work / "ours").exists():
            prepare_all(options, work)
        if part == "prepare" or part != "nnx" and getattr(options, part) is None:
            continue
        key = {"text": options.text.stem, "part": part, "seconds": options.seconds, "vram": options.vram}
        key["settings"] = settings_of(part, options)
        if any(all(row[name] == key[name] for name in KEYS) for row in rows):
            continue
        if time.monotonic() - started + options.seconds + OVERHEAD_S > options.limit:
            print(f"no time left for {part}: call again with the same --work and --results", file=sys.stderr)
            continue
        began = time.monotonic()
        row = key | sides[part](options, place)
        where = {"device": describe(pick_device(device)), "torch": torch.__version__}
        row |= {"whole_s": time.monotonic() - began, "date": datetime.date.today().isoformat()} | where
        rows.append(row)
        with open(results, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    return rows


def main() -> None:
    if sys.argv[1:2] == ["--autoresearch-child"]:
        autoresearch_child(json.loads(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, metavar="TEXT")
    parser.add_argument("--val", type=Path)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--vram", default="8GB")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--work", type=Path, default=Path("five_minutes"))
    parser.add_argument("--tokenizer", default="auto")
    parser.add_argument("--options", default="", help="of nnx train")
    parser.add_argument("--autoresearch", type=Path)
    parser.add_argument("--set", nargs="+", default=list(SET), metavar="NAME=VALUE")
    parser.add_argument("--nanogpt", type=Path)
    parser.add_argument("--arguments", default="", help="of nanoGPT's train.py")
    parser.add_argument("--peer-tokenizer", default="bpe:8192:nanochat")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--limit", type=float, default=1e9)
    parser.add_argument("--results", type=Path, default=Path("five_minutes.jsonl"))
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    output = "\n".join([*table(race(options)), ""])
    print(output)
    if options.markdown:
        options.markdown.write_text(output, encoding="utf-8")


if __name__ == "__main__":
    main()
