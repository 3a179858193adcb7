"""Several processes for one command: started here, or found started by torchrun."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from nnx_cli.console.output import Output
from nnx_cli.errors import Interrupted, MissingFeature, NnxError, UsageError, counted

if TYPE_CHECKING:
    import torch

    from nnx_cli.planning.parallel import RankDevice
    from nnx_cli.system.ranks import Ranks

STARTED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun tells a process
SAVE_S = 600  # that processes have to save and leave when they are asked to stop


def is_started() -> bool:
    """Whether this is one of several processes that torchrun, or `start_all`, has started."""
    return all(name in os.environ for name in STARTED) and int(os.environ["WORLD_SIZE"]) > 1


def count_restarts() -> int:
    """How often torchrun has started all processes anew since one died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) if is_started() else 0


def how_many(gpus: str | None, device: str) -> int:
    """The processes that --gpus asks for on a device: one for each GPU, of which there must be as many.

    Raises UsageError for what is no number, MissingFeature where there are fewer GPUs.
    """
    if gpus is None:
        return 1
    if gpus != "all" and not (gpus.isascii() and gpus.isdecimal() and 0 < int(gpus) <= 1024):
        raise UsageError(f"--gpus is {gpus!r}; it must be a number of GPUs, or all")
    if device.partition(":")[1]:
        raise UsageError(f"--device {device} is one GPU, and --gpus takes the first ones", fix="leave out --device")
    import torch

    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu" or (device == "mps" and gpus in ("1", "all")):
        return 1 if gpus == "all" else int(gpus)
    n = there if gpus == "all" else int(gpus)
    if not there and gpus != "1":
        raise MissingFeature(
            f"--gpus {gpus}: there is no GPU here", fix="see what is there: nnx doctor; to try it: --device cpu"
        )
    if n > max(1, there):
        have = f"there {'is' if there == 1 else 'are'} {counted(there, 'GPU')} here"
        raise MissingFeature(f"--gpus {gpus}: {have}", fix=f"take --gpus {'all' if there > 1 else 1}")
    return n


def start_all(n: int, device: str) -> None:
    """Run this command line in `n` processes of this machine, as torchrun does; ends as the one that failed first."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from nnx_cli.system.torch_private import seconds_to_leave

    logging.disable(logging.CRITICAL)  # what went wrong, a process says itself
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if device == "cpu":
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // n)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=n,
        run_id=str(os.getpid()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        **seconds_to_leave(SAVE_S),
    )
    try:
        elastic_launch(config, sys.executable)("-m", "nnx_cli", *sys.argv[1:])
    except SignalException:
        raise typer.Exit(Interrupted.exit_code) from None
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            raise NnxError(
                f"process {rank} of {n} was ended by {failure.signal_name()}", fix="resume: nnx train --resume last"
            ) from None
        raise typer.Exit(failure.exitcode) from None


@contextmanager
def connected(output: Output, device: str) -> Iterator[Ranks]:
    """Be one of several processes meanwhile, or alone. Of an error that ends all, the first one tells."""
    if not is_started():
        from nnx_cli.system.ranks import ALONE

        yield ALONE
        return
    from nnx_cli.system.ranks import Group
    from nnx_cli.system.signals import stop_signals
    from nnx_cli.training.distributed import check_versions

    group = Group(_own_device(device), lambda why: output.warn(str(why)) if group.speaks else None, count_restarts())
    try:
        check_versions(group)
        yield group
        if group.is_first and not group.is_closed:  # there was nothing to train, for which the others wait
            group.first(lambda: None)
            group.close()
    except Exception as error:
        with stop_signals():  # torchrun stops those that are left, which are about to say why
            gone = None if isinstance(error, NnxError) else group.why_gone()
        group.leave(gone or error)
        if not group.speaks:
            raise typer.Exit(getattr(gone or error, "exit_code", NnxError.exit_code)) from None
        if gone is None:
            raise
        gone.fix = gone.fix or "resume from the newest checkpoint: nnx train --resume last"
        raise gone from error


def devices_of(ranks: Ranks, n: int, device: str, vram_bytes: int | None) -> list[RankDevice]:
    """The devices of all ranks, who ask each other; alone, those that `n` processes would have; of one process none."""
    if ranks.count == n == 1:
        return []
    import torch

    from nnx_cli.planning.parallel import rank_device
    from nnx_cli.system.device import pick_device, pick_precision

    def described(device: torch.device, n_sharing: int) -> RankDevice:
        return rank_device(device, pick_precision("auto", device), vram_bytes, n_sharing)

    own = pick_device(device)
    if ranks.count > 1:
        return ranks.gather(described(own, int(os.environ["LOCAL_WORLD_SIZE"])))
    return [described(torch.device("cuda", i) if own.type == "cuda" else own, n) for i in range(n)]


def _own_device(device: str) -> torch.device:
    """The device of this process: of several GPUs its own."""
    import torch

    local, kind = int(os.environ["LOCAL_RANK"]), device.partition(":")[0]
    if kind == "cpu" or (kind == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if kind == "mps" or device != kind:
        raise UsageError(f"--device {device} is one GPU, and there are several processes", fix="leave out --device")
    if local >= (there := torch.cuda.device_count()):
        raise MissingFeature(
            f"there is no GPU for process {local + 1} of this machine: it has {counted(there, 'GPU')}",
            fix="start as many processes as there are GPUs: torchrun --nproc-per-node",
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)
