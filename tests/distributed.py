"""Runs on several processes against the same runs on one. `python -m tests.distributed --full`: every architecture,
optimizer and number of processes."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from nnx_cli import models
from nnx_cli.config import PrepareConfig, TrainConfig, module_names
from nnx_cli.data.prepare import prepare
from nnx_cli.data.token_folder import open_token_folder
from nnx_cli.planning.memory import StorageTracker, rounded
from nnx_cli.planning.plan import plan_run
from nnx_cli.runs.logs import read_log
from nnx_cli.runs.run import Run
from nnx_cli.system.ranks import ALONE, Group, Ranks
from nnx_cli.training import pace, session
from nnx_cli.training.distributed import follow
from nnx_cli.training.observer import Silent

TINY = dict(n_layers=2, dim=32, n_heads=2, seq_len=32)
SETTINGS = dict(
    max_steps=4,
    batch_size=2,
    grad_accum=3,
    val_every=2,
    val_batches=3,
    save_every=2,
    sample_every=0,
    lr=3e-3,
    optimizer="adamw",
    compile="off",
    device="cpu",
    threads=1,
)
KINDS = ("ddp", "fsdp")
SHORT = [dict(model=name, parallel=kind) for name in models.names() for kind in KINDS] + [
    *(dict(model="llama", optimizer="muon", batch_size=5, grad_accum=1, parallel=kind) for kind in KINDS),
    *(dict(model="nyx", optimizer="muon", short_sequences=0.5, parallel=kind) for kind in KINDS),
    dict(model="llama", optimizer="adamw8bit", weight_precision="bf16", optimizer_in_backward=True, grad_accum=1),
    dict(model="llama", batch_size=6, grad_accum=1, fails=True),
    dict(model="nyx", parallel="ddp", refuses=True),
]
SLOWED = [dict(model="llama", parallel=kind, slows=True) for kind in KINDS]
OWNED = dict(model="llama", optimizer="adamw8bit", parallel="fsdp", ffn_dim=129, saves=True, stop_at=2, resumes=True)
OF_PROCESSES = ("parallel", "fails", "refuses", "slows", "saves", "stop_at", "resumes")  # what a run on one has not
STOPPED = [
    dict(model="llama", optimizer="muon", ffn_dim=129, stop_at=2, parallel="fsdp"),
    dict(
        model="llama", batch_size=4, grad_accum=1, stop_at=2, parallel="fsdp"
    ),  # validates 2, 2, 1 and 1 times on four
    dict(model="nyx", stop_at=2, parallel="ddp"),
]
COMPILED = [dict(model=name, parallel=kind, compile="on") for name in models.names() for kind in KINDS]
UNEVEN = dict(model="llama", parallel="fsdp", grad_accum=1, compile="auto")  # four validate 2, 2, 1 and 1 times
FULL = [
    dict(model=name, parallel=kind, optimizer=optimizer, weight_precision=weights, grad_accum=n)
    for name in models.names()
    for kind in KINDS
    for optimizer in module_names("optim")
    for weights in ("fp32", "bf16")
    for n in (1, 3)
] + COMPILED
# nats: of sums in another order, and of weights that are rounded by other random bits, which alone set runs of one
# process up to 3.2e-2 apart
TOLERANCE = {"fp32": 2e-5, "bf16": 5e-2}
CPU = torch.device("cpu")


def start(data: Path, out: Path, case: dict, ranks: Ranks = ALONE) -> tuple:
    """A new run of a case, on these ranks."""
    tokens = open_token_folder(data)
    settings = SETTINGS | {"lr": 0.03 if case.get("optimizer") == "wolf" else 3e-3} | case
    name, shape = settings.pop("model"), TINY | {key: settings.pop(key) for key in ("ffn_dim",) if key in settings}
    plan = plan_run(
        name,
        "nano",
        shape,
        TrainConfig(**settings),
        vocab_size=tokens.vocab_size,
        train_tokens=len(tokens.train),
        val_tokens=len(tokens.val),
        device=CPU,
        precision="fp32",
        sources={},
    )
    return session.start(plan, tokens, out, CPU, Silent(), session.Sampling([10], 8), "nnx train", None, ranks)


def train(run: Run, trainer: session.Trainer, stop_at: int | None = None) -> Path:
    """Train to the end, or to a step; returns the run's folder."""
    with run.lock():
        trainer.train(run, lambda: trainer.state.step == stop_at)
    return run.folder


def losses(folder: Path) -> list[float]:
    """Training and validation losses of a run, and the norm of its gradients."""
    names = ("train_loss", "val_loss", "grad_norm")
    return [record[name] for record in read_log(folder / "metrics.jsonl") for name in names if record[name] is not None]


def work(job: Path) -> None:
    """What every process of a launch does: the cases of a job in turn."""
    torch.set_num_threads(1)
    described = json.loads(job.read_text())
    ranks = Group(CPU, lambda why: print(why, file=sys.stderr))
    for case in described["cases"]:
        out, stop_at, resumes = Path(case.pop("out")), case.pop("stop_at", None), case.pop("resumes", False)
        does = {name: case.pop(name, False) for name in ("fails", "refuses", "slows", "saves")}
        for until in (stop_at, None) if resumes else (stop_at,):
            run, trainer = opened(Path(described["data"]), out, case, ranks)
            pace.READING_S = 0.05 if does["slows"] else 1e9  # it is chance which of two is slower where all are alike
            if ranks.rank == ranks.count - 1:
                misbehave(trainer, does["fails"], does["refuses"], does["slows"])
            train(run, trainer, until)
        if does["saves"]:
            told = ranks.gather(bytes_of_a_save(run, trainer))
            if ranks.is_first:
                out.with_suffix(".json").write_text(json.dumps(told))
    ranks.close()


def opened(data: Path, out: Path, case: dict, ranks: Ranks) -> tuple:
    """The run of a case, which may have been begun, and its trainer on this rank."""
    if not ranks.is_first:
        return follow(ranks, None, None, CPU)
    if not out.exists():
        return start(data, out, case, ranks)
    restart = session.plan_restart(Run(out), {"parallel": case.get("parallel", "auto")})
    return restart.run, session.resume(restart, Silent(), ranks)[0]


def misbehave(trainer: session.Trainer, fails: bool, refuses: bool, slows: bool) -> None:
    """Let the second step of this rank run out of memory once, or its first validation, or all steps take long."""
    step, failed, refused = trainer.stepper.step, [], []
    accumulate = step.accumulate

    def failing(*args: torch.Tensor) -> torch.Tensor:
        if trainer.state.step == 1 and not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("as a GPU that others use too")
        return accumulate(*args)

    def refusing(block: torch.nn.Module, inputs: tuple) -> None:
        if not (block.training or refused):
            refused.append(True)
            raise torch.OutOfMemoryError("as before")

    if fails:
        step.accumulate = failing
    if refuses:
        trainer.model.blocks[0].register_forward_pre_hook(refusing)
    if slows:
        trainer.model.blocks[0].register_forward_pre_hook(lambda block, inputs: time.sleep(0.05))


class LocalTracker(StorageTracker):
    """Counts what a rank has itself: a DTensor is but a view of the whole."""

    def count(self, tensors: Iterable, workspace: int = 0) -> None:
        super().count([tensor for tensor in tensors if not isinstance(tensor, DTensor)], workspace)


def bytes_of_a_save(run: Run, trainer: session.Trainer) -> dict[str, int]:
    """What a rank keeps of a model, and the most that it holds besides while a checkpoint is written."""
    step, tracker = trainer.stepper.step, LocalTracker()
    moments = [tensor for fields in step.optimizer.state.values() for tensor in fields.values()]
    tracker.leave_out([*step.shards.local.values(), *trainer.model.buffers(), *moments])
    trainer.best.pending_best = {"best_step": trainer.state.step, "best_val_loss": 0.0, "best_val_bits_per_byte": 0.0}
    with tracker:
        trainer.save(run)
    return {
        "moments": sum(tensor.nbytes for tensor in moments),
        "most": max(section.peak for section in tracker.sections),
    }


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of tensors, as the tracker counts them."""
    return sum(rounded(tensor.nbytes) for tensor in tensors)


def launch(n: int, data: Path, job: Path, cases: list[dict]) -> None:
    """Take cases, with the folder of each as `out`, on `n` processes that are told what torchrun would tell them."""
    job.write_text(json.dumps({"data": str(data), "cases": cases}))
    with socket.create_server(("127.0.0.1", 0)) as free:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(n)}
    ways: Any = multiprocessing
    if os.name == "posix":
        from tests.reliability.processes import preload, warm

        preload()
        ways = warm  # forked from a process that has imported everything
    ranks = [ways.Process(target=take_part, args=(job, place | {"RANK": str(i)})) for i in range(n)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert not any(rank.exitcode for rank in ranks), [rank.exitcode for rank in ranks]


def take_part(job: Path, place: dict[str, str]) -> None:
    """In a process of its own: be one of the ranks that work on a job."""
    os.environ.update(place)
    work(job)


def label(case: dict) -> str:
    """A case in a word."""
    return "-".join(str(value) for value in case.values())


def run_of(folder: Path, case: dict, n: int) -> Path:
    """The run folder of a case on `n` processes."""
    return folder / f"{label(case)}-{n}"


def take(n: int, folder: Path, data: Path, cases: list[dict]) -> list[Path]:
    """The run folders of cases on `n` processes."""
    outs = [run_of(folder, case, n) for case in cases]
    launch(n, data, folder / f"{n}.json", [case | {"out": str(out)} for case, out in zip(cases, outs, strict=True)])
    return outs


def compare(n: int, folder: Path, data: Path, cases: list[dict]) -> dict[str, float]:
    """How far losses on `n` processes are from those on one, by case."""
    return differences(folder, data, cases, take(n, folder, data, cases))


def differences(folder: Path, data: Path, cases: list[dict], outs: list[Path]) -> dict[str, float]:
    """How far the losses of runs are from those on one process, by case."""
    found = {}
    for case, out in zip(cases, outs, strict=True):
        single = {name: value for name, value in case.items() if name not in OF_PROCESSES}
        alone = run_of(folder, single, 1)
        if not alone.exists():
            train(*start(data, alone, single))
        found[label(case)] = max(abs(a - b) for a, b in zip(losses(out), losses(alone), strict=True))
    return found


def main() -> None:
    """Compare, and say where the losses differ by more than they may."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="every architecture and optimizer, on 2, 3 and 4 processes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        text = folder / "text.txt"
        text.write_text("".join(f"{i * i} is the square of {i}, and {i * i + i} is more.\n" for i in range(500)))
        data = folder / "data"
        prepare([text], data, PrepareConfig(workers=1, tokenizer="byte"))
        wrong = 0
        for n in (2, 3, 4) if options.full else (2,):
            cases = FULL if options.full else SHORT
            for name, difference in compare(n, folder, data, cases).items():
                allowed = TOLERANCE["bf16" if "bf16" in name or "8bit" in name else "fp32"]
                wrong += difference > allowed
                print(f"{n} processes, {name}: {difference:.1e}{'' if difference <= allowed else ' TOO MUCH'}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
