"""Validation loss of our architectures beside the code they come from: same shapes, same tokens, same batch.

    python tests/bench/quality.py --originals FOLDER --text tinyshakespeare.txt [--models nyx,n4] [--seeds 0,1,2]
                                  [--time-limit SECONDS] [--results FILE] [--markdown FILE]

FOLDER holds the originals as `originals.py` says. Sizes are our `tiny` (10.7 million parameters), tokens bytes,
the context 256; a run has --tokens training tokens in steps of --tokens-per-step, which is what `nnx train` takes for
this size on a GPU. Both sides see the same windows in the same order, in bf16 on CUDA, else in float32. One evaluator
judges both: float32, the whole validation split in windows of the context, the weights at the end.

Ours trains with its default recipe. An original trains with its published one (optimizer, clipping, schedule, shortened
with the run: see RECIPES) at the published learning rate and at a second one; the better of them on the first seed goes
on to the other seeds, and is the one that counts. nGPT has its hash restored, as without it no parameter can be listed.
The original Tape sees the tokens it is to predict and cannot be compared: ours stands beside its own `sound` variant.

Every finished run is a row in --results; runs that are there are not done again, so that the work can be cut into
pieces: give --time-limit, and call it again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from against_nanogpt import common_loss
from lion_pytorch import Lion
from originals import CASES
from torch import Tensor, nn
from zoo import take_step

from nnx_cli import models
from nnx_cli.config import PrepareConfig, TrainConfig
from nnx_cli.data.loader import Loader
from nnx_cli.data.prepare import prepare
from nnx_cli.data.token_folder import TokenFolder, open_token_folder
from nnx_cli.layers.blocks import eagerly
from nnx_cli.planning.plan import plan_run
from nnx_cli.system.device import DTYPES, describe, pick_device, pick_precision, set_seed
from nnx_cli.training import session
from nnx_cli.training.observer import Silent
from nnx_cli.training.sampling import Sampling

SEQ_LEN = 256
MARGIN = 0.02  # nats that ours may be above the original
BATCH = 32  # sequences at once where an original's step does not fit in a GPU otherwise


def constant(progress: float) -> float:
    return 1.0


def warmed(progress: float) -> float:
    """A tenth of the run to warm up: the published 2,000 steps are more than the run has."""
    return min(1.0, progress / 0.1)


def cosine(progress: float) -> float:
    """500 of 10,000 steps to warm up, then half a cosine to zero."""
    if progress < 0.05:
        return progress / 0.05
    return 0.5 * (1 + math.cos(math.pi * (progress - 0.05) / 0.95))


@dataclass(frozen=True)
class Recipe:
    """How an original is trained, and its constructor arguments at our `tiny` shapes."""

    config: dict[str, Any]
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    lrs: tuple[float, ...]  # the published one first
    clip: float | None
    schedule: Callable[[float], float]  # of progress 0 to 1, a factor on the learning rate


RECIPES = {
    "nyx": Recipe(
        dict(
            model_dim=384, vocab_size=256, layer_depth=5, head_dimension=64, num_attention_heads=6, feedforward_scale=4
        ),
        lambda parameters: Lion(parameters, betas=(0.9, 0.99), weight_decay=0.0),
        (1e-4, 3e-4),
        0.5,
        constant,
    ),
    "n4": Recipe(
        dict(vocab_size=256, hidden_size=384, inter_size=768, heads=6, layers=6),
        lambda parameters: torch.optim.AdamW(parameters, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1),
        (6e-4, 2e-3),
        None,
        warmed,
    ),
    "neon": Recipe(  # clipping is what its trainer does unless told otherwise; its AdamW keeps 8 bits, this one 32
        dict(
            vocab_size=256,
            hidden_size=320,
            intermediate_size=960,
            num_hidden_layers=6,
            num_attention_heads=5,
            num_key_value_heads=5,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
        ),
        lambda parameters: torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.01),
        (3.2e-4, 1e-3),
        1.0,
        cosine,
    ),
    "ngpt": Recipe(
        dict(
            num_tokens=256,
            dim=384,
            depth=6,
            heads=6,
            dim_head=64,
            tied_embedding=True,
            attn_norm_qk=False,
            manual_norm_weights=False,
        ),
        lambda parameters: torch.optim.Adam(parameters),
        (1e-3, 3e-3),
        None,
        constant,
    ),
}
SIDES = dict.fromkeys(RECIPES, ("original", "ours")) | {"tape": ("sound", "ours")}


class OutOfTime(Exception):
    """The time limit came in the middle of a run."""


@dataclass(frozen=True)
class Job:
    """What every run of a call has in common."""

    folder: Path
    data: TokenFolder
    device: torch.device
    tokens: int
    tokens_per_step: int
    deadline: float

    @property
    def steps(self) -> int:
        return self.tokens // self.tokens_per_step

    def check_time(self) -> None:
        if time.monotonic() > self.deadline:
            raise OutOfTime

    def judge(self, logits: Callable[[Tensor], Tensor]) -> float:
        return common_loss(logits, self.data.val, SEQ_LEN, self.device)


def run_original(job: Job, name: str, lr: float, seed: int) -> dict[str, Any]:
    """Train an original with its recipe."""
    recipe, cuda = RECIPES[name], job.device.type == "cuda"
    set_seed(seed)
    sys.path.insert(0, str(job.folder / "packages"))
    original = CASES[name].build(job.folder, recipe.config, job.device)
    sys.path.remove(str(job.folder / "packages"))
    parameters = [p for p in original.model.parameters() if p.requires_grad]
    optimizer = recipe.optimizer(parameters)
    loader = Loader(job.data.train, SEQ_LEN, seed)
    samples = job.tokens_per_step // SEQ_LEN
    original.model.train()
    for step in range(job.steps):
        job.check_time()
        for group in optimizer.param_groups:
            group["lr"] = lr * recipe.schedule((step + 1) / job.steps)
        input_ids, targets = loader.batch(step * samples, samples)
        tokens = torch.cat((input_ids, targets[:, -1:]), dim=1).to(job.device)
        for part in tokens.split(BATCH):
            with torch.autocast("cuda", DTYPES["bf16"]) if cuda else nullcontext():
                loss = original.loss(part)
            (loss * len(part) / len(tokens)).backward()
        if recipe.clip:
            torch.nn.utils.clip_grad_norm_(parameters, recipe.clip)
        optimizer.step()
        original.after_step()
        optimizer.zero_grad(set_to_none=True)
    original.model.eval()
    unique = {id(p): p.numel() for p in original.model.parameters()}
    return {"loss": job.judge(lambda ids: logits_of(original.model(ids))), "parameters": sum(unique.values())}


def logits_of(output: Any) -> Tensor:
    """The logits (B, T, V) in what a forward pass returns: themselves, first of a tuple, or a field."""
    if isinstance(output, tuple):
        return output[0]
    return output if isinstance(output, Tensor) else output.logits


def run_ours(job: Job, name: str, variant: str | None, seed: int) -> dict[str, Any]:
    """Train ours as `nnx train` would, without a run folder."""
    plan = plan_run(
        name,
        "tiny",
        {"seq_len": SEQ_LEN} | ({} if variant is None else {"variant": variant}),
        TrainConfig(max_steps=job.steps, tokens_per_step=job.tokens_per_step, seed=seed),
        vocab_size=job.data.vocab_size,
        train_tokens=len(job.data.train),
        val_tokens=len(job.data.val),
        device=job.device,
        precision=pick_precision("auto", job.device),
        sources={},
    )
    set_seed(seed)
    model = models.from_config(name, plan.model_config)
    trainer = session.make_trainer(model, job.data, plan.train, job.device, Silent(), Sampling([10]))
    trainer.choose_execution(plan.train.compile, postpone=False)
    config = trainer.config
    model.train()
    for step in range(job.steps):
        job.check_time()
        take_step(trainer, step / job.steps)
    model.eval()
    model.compute_dtype = torch.float32
    with eagerly(config.compile == "on"):
        loss = job.judge(model)
    parameters = sum({id(p): p.numel() for p in model.parameters()}.values())
    return {"loss": loss, "parameters": parameters, "lr": config.lr, "optimizer": config.optimizer}


def runs(
    name: str, seeds: list[int], known: Callable[[], list[dict[str, Any]]]
) -> Iterator[tuple[str, float | None, int]]:
    """Side, learning rate (None: the recipe's) and seed of every run of a model, the first seeds of both sides first.

    From the second seed on an original runs at the learning rate that was better before; `known` returns its rows.
    """
    for seed in seeds:
        for side in SIDES[name]:
            if side != "original":
                yield side, None, seed
            elif seed == 0:
                yield from ((side, lr, seed) for lr in RECIPES[name].lrs)
            else:
                yield side, best_lr([row for row in known() if row["model"] == name and row["side"] == side]), seed


def best_lr(rows: list[dict[str, Any]]) -> float:
    """The learning rate whose first seed ended lowest."""
    return min((row for row in rows if row["seed"] == 0), key=lambda row: row["loss"])["lr"]


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def work(job: Job, names: list[str], seeds: list[int], results: Path) -> None:
    """Do the runs that are not in `results` yet, until the time is over."""
    machine = f"{describe(job.device)}, torch {torch.__version__}, {date.today()}"
    for name in names:
        for side, lr, seed in runs(name, seeds, lambda: of_length(read_rows(results), job)):
            done = of_length(read_rows(results), job)
            if any(
                (row["model"], row["side"], row["seed"]) == (name, side, seed) and lr in (None, row["lr"])
                for row in done
            ):
                continue
            started = time.monotonic()
            try:
                if side == "original":
                    found = run_original(job, name, lr, seed) | {"lr": lr}
                else:
                    found = run_ours(job, name, None if side == "ours" else side, seed)
            except OutOfTime:
                print(f"out of time during {name}, {side}, seed {seed}: call again", flush=True)
                return
            row = {
                "model": name,
                "side": side,
                "seed": seed,
                "tokens": job.tokens,
                "tokens_per_step": job.tokens_per_step,
                "seconds": round(time.monotonic() - started, 1),
                "machine": machine,
            } | found
            if not math.isfinite(row["loss"]):
                row["loss"] = math.inf
            with open(results, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{name} {side} lr {row['lr']:g} seed {seed}: {row['loss']:.4f} in {row['seconds']} s", flush=True)


def of_length(rows: list[dict[str, Any]], job: Job) -> list[dict[str, Any]]:
    return [row for row in rows if (row["tokens"], row["tokens_per_step"]) == (job.tokens, job.tokens_per_step)]


# the report


def report(rows: list[dict[str, Any]]) -> str:
    """Markdown: a table for every length of run, the lost rows included."""
    lines = [
        "# Quality beside the originals",
        "",
        "Made by [quality.py](quality.py), which says what is compared and how. Loss in nats over the whole validation "
        f"split, mean of the seeds (lowest to highest); ours should be at most {MARGIN} above.",
    ]
    for tokens, per_step in dict.fromkeys((row["tokens"], row["tokens_per_step"]) for row in rows):
        own = [row for row in rows if (row["tokens"], row["tokens_per_step"]) == (tokens, per_step)]
        machines = "; ".join(dict.fromkeys(row["machine"] for row in own))
        lines += ["", f"## {tokens:,} tokens in {tokens // per_step} steps of {per_step:,}", "", f"{machines}.", ""]
        lines += table(own)
    return "\n".join(lines) + "\n"


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "| model | beside | parameters | learning rate | loss | our parameters | recipe | loss | difference | |"
    yield "| --- | --- | ---: | ---: | --- | ---: | --- | --- | ---: | --- |"
    for name in dict.fromkeys(row["model"] for row in rows):
        other, _ = SIDES[name]
        theirs = [row for row in rows if row["model"] == name and row["side"] == other]
        ours = [row for row in rows if row["model"] == name and row["side"] == "ours"]
        if not theirs or not ours:
            continue
        if other == "original":
            lr = best_lr(theirs)
            tried = ", ".join(
                f"{row['lr']:g}: {row['loss']:.3f}" for row in theirs if row["seed"] == 0 and row["lr"] != lr
            )
            theirs = [row for row in theirs if row["lr"] == lr]
            rate = f"{lr:g}" + (f" ({tried} on one seed)" if tried else "")
        else:
            rate = f"{theirs[0]['lr']:g}"
        difference = mean(ours) - mean(theirs)
        allowed = MARGIN if other == "original" else 0.0
        yield (
            f"| {name} | {other} | {theirs[0]['parameters']:,} | {rate} | {spread(theirs)} | "
            f"{ours[0]['parameters']:,} | {ours[0]['optimizer']} {ours[0]['lr']:g} | {spread(ours)} | "
            f"{difference:+.4f} | {'reached' if difference <= allowed else 'short'} |"
        )


def mean(rows: list[dict[str, Any]]) -> float:
    return statistics.mean(row["loss"] for row in rows)


def spread(rows: list[dict[str, Any]]) -> str:
    """Mean, and from lowest to highest where there are several seeds."""
    losses = sorted(row["loss"] for row in rows)
    return f"{mean(rows):.4f}" + (f" ({losses[0]:.3f} to {losses[-1]:.3f}, {len(rows)} seeds)" if rows[1:] else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--originals", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--models", default=",".join(SIDES), help="with commas between them; default: all")
    parser.add_argument("--seeds", default="0,1,2", help="with commas between them; 0 before the others")
    parser.add_argument("--tokens", type=int, default=4_000_000)
    parser.add_argument("--tokens-per-step", type=int, default=8192)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--time-limit", type=float, default=math.inf, metavar="SECONDS")
    parser.add_argument("--results", type=Path, default=Path("quality.jsonl"))
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    names = options.models.split(",")
    if unknown := set(names) - set(SIDES):
        parser.error(f"there is no {unknown.pop()}; choose from {', '.join(SIDES)}")
    deadline = time.monotonic() + options.time_limit
    with tempfile.TemporaryDirectory() as folder:
        prepare([options.text], Path(folder) / "tokens", PrepareConfig())
        job = Job(
            options.originals.resolve(),
            open_token_folder(Path(folder) / "tokens"),
            pick_device(options.device),
            options.tokens,
            options.tokens_per_step,
            deadline,
        )
        work(job, names, [int(seed) for seed in options.seeds.split(",")], options.results)
    text = report(read_rows(options.results))
    print(text)
    if options.markdown:
        options.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
