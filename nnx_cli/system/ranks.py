"""Processes that work on one thing together, a rank each: what they tell one another, and how one notices that another
is gone."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from nnx_cli import errors
from nnx_cli.errors import MissingFeature, NnxError

T = TypeVar("T")
BUCKET_BYTES = 64 * 2**20  # of small tensors that are added up as one
PATIENCE = timedelta(days=7)  # with ranks that are alive: one may prepare a text, or write to a slow disk
BEAT_S = 2.0  # between two signs of life of a rank
GONE_S = 40.0  # without one, after which a rank is gone
LOOK_S = 4 * BEAT_S  # in the second half of which a rank that is alive gives one, however busy its machine is
LEAVE_S = 10.0  # that a process may take to leave by itself once another one has
ENDED = "ended"  # key of how the first rank that left with an error did


class Ranks:
    """A process that works alone: rank 0 of 1. What `Group` shares among several, it keeps."""

    rank = 0
    count = 1

    @property
    def is_first(self) -> bool:
        """Whether this one prints, and writes files."""
        return self.rank == 0

    def first(self, make: Callable[[], T]) -> T:
        """What `make` returns on the first rank, which alone calls it; an NnxError is raised on all."""
        return make()

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in their order."""
        return [value]

    def most(self, number: float) -> float:
        """The largest of the ranks' numbers."""
        return number

    def any(self, flag: bool) -> bool:
        """Whether one of the ranks says yes."""
        return self.most(float(flag)) > 0

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Add the tensors of all ranks, in place; they are on one device."""

    def spread(self, tensors: Sequence[Tensor], source: int = 0) -> None:
        """Give all ranks the tensors of one, in place."""

    def collect(self, part: Tensor) -> Tensor:
        """The parts of all ranks, of one shape, one after the other along the first dimension."""
        return part

    def join(self, part: Tensor) -> Tensor:
        """As `collect`, of parts of which the last ones may be shorter, or empty."""
        return part

    def divide(self, whole: Tensor | None, part: Tensor) -> None:
        """Undo `join`: fill `part` from what the first rank has whole."""
        assert whole is not None
        part.copy_(whole)

    def close(self) -> None:
        """The work is done: no rank watches another any more."""


ALONE = Ranks()


class Group(Ranks):
    """One of several ranks, connected by torch.distributed: NCCL between GPUs, gloo between CPUs, and for what is said
    about the work. A thread gives signs of life and watches those of the others.

    `on_gone` is called with the reason where the process has to end while it waits for a rank that is gone. Processes
    that torchrun has started anew meet at the store of those before them, from whom `n_restarts` tells them apart.
    """

    def __init__(self, device: torch.device, on_gone: Callable[[NnxError], None], n_restarts: int = 0) -> None:
        try:
            store, self.rank, self.count = next(iter(dist.rendezvous("env://", timeout=PATIENCE)))
        except dist.DistNetworkError as error:
            raise _unreachable(error) from error
        self.store, watched = (dist.PrefixStore(f"start {n_restarts}", each) for each in (store, store.clone()))
        self.on_gone = on_gone
        self.has_first = True  # as far as is known: it shows how the others ended
        self._beats: dict[int, tuple[bytes, float]] = {}  # of each other rank: its newest sign, and when it came
        self._closed = threading.Event()
        self.store.set(f"alive/{self.rank}", "0")
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("group", self.store),
            rank=self.rank,
            world_size=self.count,
            timeout=PATIENCE,
            device_id=device if device.type == "cuda" else None,
        )
        threading.Thread(target=self._watch, args=(watched,), daemon=True).start()

    @property
    def is_closed(self) -> bool:
        """Whether this rank has closed, or left."""
        return self._closed.is_set()

    @property
    def speaks(self) -> bool:
        """Whether it is for this rank to say why all end: the first one, or where that is gone the next."""
        return self.is_first or (self.rank == 1 and not self.has_first)

    def first(self, make: Callable[[], T]) -> T:
        """As in Ranks."""
        told: list[Any] = [None]
        refused: NnxError | None = None
        if self.is_first:
            try:
                told = [(make(), None)]
            except NnxError as error:
                refused, told = error, [(None, _described(error))]
        dist.broadcast_object_list(told, src=0)
        value, failed = told[0]
        if refused is not None or failed is not None:
            raise refused or _restored(failed)
        return value

    def gather(self, value: T) -> list[T]:
        """As in Ranks."""
        told: list[Any] = [None] * self.count
        dist.all_gather_object(told, value)
        return told

    def most(self, number: float) -> float:
        """As in Ranks."""
        told = torch.tensor(number, dtype=torch.float64)
        dist.all_reduce(told, dist.ReduceOp.MAX)
        return told.item()

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """As in Ranks. Small ones go in buckets: a message for each would take longer than what is in it."""
        for bucket in _buckets(tensors):
            if len(bucket) == 1:
                dist.all_reduce(bucket[0])
                continue
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            dist.all_reduce(flat)
            parts = flat.split([tensor.numel() for tensor in bucket])
            torch._foreach_copy_(bucket, [part.view_as(t) for t, part in zip(bucket, parts, strict=True)])

    def spread(self, tensors: Sequence[Tensor], source: int = 0) -> None:
        """As in Ranks."""
        for tensor in tensors:
            flat = tensor.detach().contiguous().reshape(-1)
            dist.broadcast(flat.view(torch.uint8), src=source)
            if flat.data_ptr() != tensor.data_ptr():
                tensor.copy_(flat.view_as(tensor))

    def collect(self, part: Tensor) -> Tensor:
        """As in Ranks."""
        whole = part.new_empty(self.count * len(part), *part.shape[1:])
        dist.all_gather([*whole.chunk(self.count)], part.contiguous())
        return whole

    def join(self, part: Tensor) -> Tensor:
        """As in Ranks."""
        rows = self.gather(len(part))
        if len(part) < max(rows):
            part = torch.cat([part, part.new_zeros(max(rows) - len(part), *part.shape[1:])])
        return self.collect(part)[: sum(rows)]

    def divide(self, whole: Tensor | None, part: Tensor) -> None:
        """As in Ranks."""
        rows = self.gather(len(part))
        passed_on = part.new_empty(sum(rows), *part.shape[1:])
        if whole is not None:
            passed_on.copy_(whole)
        self.spread([passed_on])
        begin = sum(rows[: self.rank])
        part.copy_(passed_on[begin : begin + len(part)])

    def leave(self, error: BaseException) -> None:
        """Tell the others that this rank ends with an error, unless one has told them that of itself."""
        described = json.dumps([self.rank, *_described(error)])
        try:
            self.store.compare_set(ENDED, "", described)
        except dist.DistError:  # nobody is there to be told
            return
        self._closed.set()

    def close(self) -> None:
        """The work is done: no rank watches another any more."""
        self._closed.set()
        dist.barrier()
        dist.destroy_process_group()

    def why_gone(self) -> NnxError | None:
        """Why a message to another rank failed: how that ended, or that it is gone. None where all are there."""
        started = time.monotonic()
        while time.monotonic() < started + LOOK_S:
            try:
                if self.store.check([ENDED]):
                    return self._ended(self.store)
            except dist.DistError as error:
                return self._lost(error)
            time.sleep(0.1)
        silent = [rank for rank, (_, at) in self._beats.items() if at < started + LOOK_S / 2]  # seen late, if at all
        return self._missing(silent[0]) if silent else None

    def _ended(self, store: dist.Store) -> NnxError:
        rank, *described = json.loads(store.get(ENDED))
        error = _restored(described)
        told = NnxError(f"process {rank} of {self.count}: {error}", fix=error.fix)
        told.exit_code = error.exit_code
        return told

    def _missing(self, rank: int) -> NnxError:
        self.has_first = rank != 0
        return NnxError(f"process {rank} of {self.count} is gone: it was killed, or its machine is")

    def _lost(self, error: Exception) -> NnxError:
        self.has_first = False
        return _unreachable(error)

    def _watch(self, store: dist.Store) -> None:
        """Give signs of life, and look for those of the others, until this rank closes or leaves."""
        others = [rank for rank in range(self.count) if rank != self.rank]
        self._beats = {rank: (b"", time.monotonic()) for rank in others}
        why: NnxError | None = None
        for number in count(1):
            if self._closed.wait(BEAT_S):
                return
            try:
                store.set(f"alive/{self.rank}", str(number))
                for rank, beat in zip(others, store.multi_get([f"alive/{rank}" for rank in others]), strict=True):
                    if beat != self._beats[rank][0]:
                        self._beats[rank] = (beat, time.monotonic())
                gone = [rank for rank, (_, at) in self._beats.items() if time.monotonic() - at > GONE_S]
                why = self._ended(store) if store.check([ENDED]) else self._missing(gone[0]) if gone else None
            except dist.DistError as error:
                why = self._lost(error)
            if why is not None and not self._closed.wait(LEAVE_S):
                self.on_gone(why)
                os._exit(why.exit_code)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors by type, in lists of at most BUCKET_BYTES unless they are of one."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        bucket: list[Tensor] = []
        size = 0
        for tensor in tensors:
            if tensor.dtype != dtype:
                continue
            if bucket and size + tensor.nbytes > BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
            bucket.append(tensor)
            size += tensor.nbytes
        yield bucket


def _described(error: BaseException) -> tuple[str, str, str | None, int]:
    """An error in words that another process can read."""
    if isinstance(error, NnxError):
        return type(error).__name__, str(error), error.fix, error.exit_code
    return NnxError.__name__, f"{type(error).__name__}: {error}", None, NnxError.exit_code


def _restored(described: Sequence[Any]) -> NnxError:
    """Undo `_described`."""
    name, message, fix, code = described
    error: NnxError = getattr(errors, name, NnxError)(message, fix)
    error.exit_code = code
    return error


def _unreachable(error: Exception) -> NnxError:
    if "in use" in str(error) or "EADDRINUSE" in str(error):
        return MissingFeature(
            "the port at which the processes meet is in use by another program",
            fix="take another one: torchrun --master-port PORT, or --standalone",
        )
    return NnxError("the process that started the others is gone, or its machine is")
