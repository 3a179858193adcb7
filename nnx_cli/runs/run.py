"""A run folder: what a run is, how it went, and its weights; and how a MODEL on the command line is found."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnx_cli import models
from nnx_cli.config import coerce
from nnx_cli.data.tokenizers.base import Tokenizer, load_tokenizer
from nnx_cli.errors import CheckpointError, DataError, NnxError, OutputError, UsageError
from nnx_cli.layers.lora import add_adapters
from nnx_cli.layers.quantized import Quantization, quantize_layers, widen
from nnx_cli.models._base import LanguageModel
from nnx_cli.runs import checkpoint as ckpt
from nnx_cli.runs.checkpoint import Checkpoint
from nnx_cli.system.device import DTYPES
from nnx_cli.system.files import (
    check_types,
    cleared,
    new_folder,
    open_regular,
    plain_opener,
    read_json,
    refused_output,
    relative,
    replace_file,
    require_space,
    sha256_file,
    sha256_regular,
    sync_file,
    sync_folder,
    to_json,
    write_synced,
)

WEIGHTS = Path("weights")
BEST = "model.safetensors"
LOCKED_BYTE = 2**30
MAX_LINE_BYTES = 2**24  # of a log
NUMBER = (int, float, type(None))
CONFIG_TYPES = {  # of what config.json may hold, that which something here relies on
    "model": {"name": str},
    "parameters": int,
    "tokenizer": {},
    "training": {},
    "sampling": {"max_new_tokens": int},
    "data": {"folder": str, "fingerprint": str},
    "lora": {"rank": int},
    "quantization": {"kept": list},
    "versions": {"torch": str},
}
STATUS_TYPES = {
    "status": str,
    "step": int,
    "max_steps": (int, type(None)),
    "max_time_s": NUMBER,
    "time_s": NUMBER,
    "tokens": NUMBER,
    "train_loss": NUMBER,
    "val_loss": NUMBER,
    "val_bits_per_byte": NUMBER,
    "best_step": NUMBER,
    "best_val_loss": NUMBER,
    "best_val_bits_per_byte": NUMBER,
    "skipped_steps": NUMBER,
    "events": list,
}


class Run:
    """An existing run folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self.config = read_verified_config(folder)

    @classmethod
    def create(
        cls,
        folder: Path,
        config: Mapping[str, Any],
        tokenizer: Tokenizer | None,
        status: Mapping[str, Any],
        first: Checkpoint,
    ) -> Run:
        """Make a run folder in one step, with its first checkpoint, so that a run that exists can be resumed.

        Raises OutputError where the folder exists or cannot be written.
        """
        if os.path.lexists(folder):
            raise OutputError(
                f"{folder} exists already", fix="name another folder with --out, or resume it with --resume"
            )
        with new_folder(folder) as temporary:
            (temporary / "checkpoints").mkdir()
            write_model_folder(temporary, config, tokenizer, None)
            write_synced(temporary / "run.json", to_json(dict(status)))
            write_synced(temporary / "metrics.jsonl", b"")
            write_synced(temporary / "samples.jsonl", b"")
            ckpt.save_checkpoint(temporary / "checkpoints", first)
        return cls(folder)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for this process; it is free again when the process ends, however it ends.

        Raises OutputError, naming the other process, where another one holds it. Reads config.json again, which the one
        before may have changed.
        """
        path = self.folder / "lock"
        with refused_output(path):
            file = open(path, "a+b", opener=plain_opener)
        with file:
            if not try_lock(file):
                file.seek(0)
                holder = file.read(40).decode("ascii", "replace").strip() or "another process"
                raise OutputError(f"{self.folder} is in use by process {holder}", fix="wait for it or stop it")
            with contextlib.suppress(OSError):  # a full disk: the lock holds without its owner's name
                file.truncate(0)
                os.write(file.fileno(), str(os.getpid()).encode())
            for leftover in [*self.folder.glob(".tmp-*"), *self.checkpoints.glob(".*-step-*")]:
                remove(leftover)
            self.config = read_verified_config(self.folder)
            yield
            file.truncate(0)

    def status(self) -> dict[str, Any]:
        """The contents of run.json. Raises CheckpointError where it is damaged."""
        return read_status(self.folder)

    def set_status(self, **values: Any) -> dict[str, Any]:
        """Change some values of run.json, whatever it holds; returns all."""
        blank = {"format": ckpt.FORMAT, **dict.fromkeys(STATUS_TYPES.keys() - {"events"})}
        try:
            status = blank | self.status() | values
        except CheckpointError:  # it decides nothing
            status = blank | values
        replace_file(self.folder / "run.json", to_json(status))
        return status

    def set_config(self, config: dict[str, Any]) -> None:
        """Replace config.json."""
        data = to_json(config)
        self._replace_listed("config.json", hashlib.sha256(data).hexdigest(), lambda path: write_synced(path, data))
        self.config = config

    def save_best(self, weights: Mapping[str, Tensor], found: Mapping[str, Any] | None = None) -> None:
        """Replace the weights that the run is known by; `found` (their step and losses) is written into the file.

        Raises OutputError; then the old ones stand.
        """
        temporary = self.folder / f".tmp-best-{os.getpid()}"
        with refused_output(self.folder / BEST), cleared(temporary):
            require_space(self.folder, ckpt.size_on_disk(weights))
            digest = ckpt.write_tensors(temporary, weights, found and {"found": json.dumps(dict(found))})
            self._replace_listed(BEST, digest, lambda path: os.replace(temporary, path))

    def best_found(self) -> dict[str, Any] | None:
        """What `save_best` wrote beside the best weights, {} where it wrote nothing, None where they are missing or
        damaged."""
        path = self.folder / BEST
        if not path.is_file() or sha256_file(path) not in allowed_digests(self.folder, BEST):
            return None
        with open_regular(path) as file:
            found = ckpt.check_size(file, path).get("__metadata__", {}).get("found")
        return {} if found is None else json.loads(found)

    def _replace_listed(self, name: str, digest: str, write: Callable[[Path], Any]) -> None:
        """Replace a file of the manifest: while it changes, the manifest allows the old content and the new; a file
        that was not there does not count until it is listed."""
        path = self.folder / "manifest.json"
        manifest = read_json(path)
        files, replacing = manifest["files"], manifest.pop("replacing", {})
        if name in files:
            replace_file(path, to_json(manifest | {"replacing": replacing | {name: digest}}))
        temporary = self.folder / f".tmp-{name}-{os.getpid()}"
        with refused_output(path), cleared(temporary):
            write(temporary)
            os.replace(temporary, self.folder / name)
            sync_folder(self.folder)
        replacing.pop(name, None)
        manifest |= {"files": files | {name: digest}} | ({"replacing": replacing} if replacing else {})
        replace_file(path, to_json(manifest))

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        """Add a line to metrics.jsonl or samples.jsonl; numbers that are not finite become null.

        Raises OutputError; then nothing of the line is there.
        """
        clean = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in record.items()}
        line = (json.dumps(clean, ensure_ascii=True) + "\n").encode()
        path = self.folder / name
        with refused_output(path), open(path, "ab", buffering=0, opener=plain_opener) as file:
            end = file.tell()
            try:
                if file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(end)
                raise

    def sync_logs(self) -> None:
        """Wait until the logs are on the disk. Raises OutputError."""
        for name in ("metrics.jsonl", "samples.jsonl"):
            with refused_output(self.folder / name), contextlib.suppress(FileNotFoundError):
                sync_file(self.folder / name)

    def cut_logs(self, step: int) -> list[str]:
        """Forget what the logs say of steps after `step`, and lines that are damaged; returns a note on each log that
        had such lines."""
        notes = []
        for name in ("metrics.jsonl", "samples.jsonl"):
            path = self.folder / name
            if not path.is_symlink() and not path.exists():
                continue
            try:
                steps = [logged_step(line) for line in log_lines(path)]
            except CheckpointError as error:
                notes.append(f"{error}; it begins anew")
                with refused_output(path):
                    os.replace(path, path.with_name(f"{name}.damaged"))
                continue
            damaged = [number for number, logged in enumerate(steps, 1) if logged is None]
            if damaged:
                more = f", and {len(damaged) - 1:,} more lines" if len(damaged) > 1 else ""
                notes.append(f"{path}: line {damaged[0]:,} is damaged{more}; left out")
            kept = [logged is not None and logged <= step for logged in steps]
            if not all(kept):
                self._keep_lines(path, kept)
        return notes

    def _keep_lines(self, path: Path, kept: Sequence[bool]) -> None:
        """Replace a log by some of its lines."""
        temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
        with refused_output(path), cleared(temporary):
            with open(temporary, "wb") as file:
                file.writelines(line for line, keep in zip(log_lines(path), kept, strict=True) if keep)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)

    def newest_checkpoint(self) -> tuple[Checkpoint, list[str]]:
        """The newest intact checkpoint, and a line for each damaged one that was passed over.

        Raises CheckpointError where there is none.
        """
        notes = []
        ckpt.check_no_link(self.checkpoints)
        for step in reversed(ckpt.steps_in(self.checkpoints)):
            try:
                return ckpt.load_checkpoint(self.checkpoints, step), notes
            except CheckpointError as error:
                notes.append(f"{error}; going back to the checkpoint before it")
        raise CheckpointError(f"{self.folder} has no intact checkpoint" + "".join(f"; {note}" for note in notes[:1]))


def log_lines(path: Path) -> Iterator[bytes]:
    """The lines of a log, of a very long one only the beginning. Raises CheckpointError where it is no file."""
    with open_regular(path) as file:
        while line := file.readline(MAX_LINE_BYTES):
            rest = line
            while len(rest) == MAX_LINE_BYTES and not rest.endswith(b"\n"):
                rest = file.readline(MAX_LINE_BYTES)
            yield line


def logged_step(line: bytes) -> int | None:
    """The step of a line of a log; None where the line is damaged."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return step if type(step) is int and step >= 0 else None


def try_lock(file: Any) -> bool:
    """Take an exclusive lock on an open file, unless somebody has it."""
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(LOCKED_BYTE)  # Windows locks bytes: one beyond what is written, so that the rest can be read
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def remove(path: Path) -> None:
    """Delete a file or a folder."""
    import shutil

    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_model_folder(
    folder: Path, config: Mapping[str, Any], tokenizer: Tokenizer | None, weights: Mapping[str, Tensor] | None
) -> None:
    """Write config.json, tokenizer.json, the weights where there are any, and their manifest into an empty folder."""
    write_synced(folder / "config.json", to_json(dict(config)))
    files = {"config.json": sha256_file(folder / "config.json")}
    if tokenizer is not None:
        tokenizer.save(folder / "tokenizer.json")
        files["tokenizer.json"] = sha256_file(folder / "tokenizer.json")
    if weights is not None:
        files[BEST] = ckpt.write_tensors(folder / BEST, weights)
    write_synced(folder / "manifest.json", to_json({"format": ckpt.FORMAT, "files": files}))


def allowed_digests(folder: Path, name: str) -> set[str]:
    """SHA-256 that the manifest allows a file of a model folder to have: two while it is being replaced."""
    manifest = read_json(folder / "manifest.json")
    files, replacing = (
        value if isinstance(value, dict) else {} for value in (manifest.get("files"), manifest.get("replacing"))
    )
    return {str(table[name]) for table in (files, replacing) if name in table}


def read_verified_config(folder: Path) -> dict[str, Any]:
    """config.json of a run or model folder. Raises CheckpointError where there is none or it was altered."""
    path = folder / "config.json"
    if not os.path.lexists(path):
        raise CheckpointError(f"{folder} is no run of nnx: it has no config.json", fix="see the runs: nnx list")
    if sha256_regular(path) not in allowed_digests(folder, "config.json"):
        raise CheckpointError(f"{path} is damaged: its checksum is not the recorded one")
    config = read_json(path)
    ckpt.check_format(config, path)
    described = config.get("model")
    if not isinstance(described, dict) or "name" not in described or "parameters" not in config:
        raise CheckpointError(f"{path} is damaged: it describes no model")
    check_types(config, CONFIG_TYPES, path)
    return config


def read_status(folder: Path) -> dict[str, Any]:
    """The contents of a run's run.json. Raises CheckpointError where it is missing or damaged."""
    path = folder / "run.json"
    status = read_json(path)
    check_types(status, STATUS_TYPES, path)
    return status


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a run or model folder, or None for a model over bare ids. Raises CheckpointError."""
    path = folder / "tokenizer.json"
    allowed = allowed_digests(folder, "tokenizer.json")
    if not allowed and not os.path.lexists(path):
        return None
    if sha256_regular(path) not in allowed:
        raise CheckpointError(f"{path} is damaged: its checksum is not the recorded one")
    try:
        return load_tokenizer(path)
    except DataError as error:
        raise CheckpointError(f"{error}") from error


@dataclass(frozen=True)
class ModelRef:
    """A MODEL of the command line: a folder and which of its weights."""

    folder: Path
    which: str = "best"  # best, last or a step

    @property
    def label(self) -> str:
        return str(self.folder) if self.which == "best" else f"{self.folder}@{self.which}"

    @property
    def config(self) -> dict[str, Any]:
        return read_verified_config(self.folder)

    def config_at(self, out: Path) -> dict[str, Any]:
        """The config.json of a model made from this one in the folder `out`: the way to the data is another."""
        config = self.config
        if data := config.get("data"):
            config["data"] = data | {"folder": relative(self.folder / data["folder"], out)}
        return config

    @property
    def tokenizer(self) -> Tokenizer | None:
        return read_tokenizer(self.folder)

    def weights(self) -> tuple[Path, dict[str, Tensor]]:
        """The tensors and where they were read. Without a validated best, `best` is the last checkpoint."""
        best = allowed_digests(self.folder, BEST)
        if self.which == "best" and best:
            path = self.folder / BEST
            try:
                return path, ckpt.read_tensors(path, *best)
            except CheckpointError as error:
                others = (self.folder / "checkpoints").is_dir()
                fix = f"try the last checkpoint: {self.folder}@last" if others else None
                raise CheckpointError(f"{error}", fix=fix) from error
        folder = self.folder / "checkpoints"
        ckpt.check_no_link(folder)
        steps = ckpt.steps_in(folder)
        step = int(self.which) if self.which.isdecimal() else (steps[-1] if steps else -1)
        if step not in steps:
            have = f"it has {', '.join(map(str, steps))}" if steps else "it has none"
            raise CheckpointError(f"{self.folder} has no checkpoint {self.which}; {have}")
        path = ckpt.step_folder(folder, step)
        ckpt.check_no_link(path)
        name = "model.safetensors"
        return path / name, ckpt.read_tensors(path / name, ckpt.read_manifest(path, (name,))[name])


def find_model(spec: str | None) -> ModelRef:
    """A run folder, its name, RUN@best, RUN@last, RUN@500, a quantized folder; None: the newest run.

    Raises CheckpointError where there is no such thing.
    """
    if spec is None:
        runs = find_runs()
        if not runs:
            raise CheckpointError(f"there is no run in {WEIGHTS}/ yet", fix="train one: nnx train --filepath FILE")
        return ModelRef(runs[0])
    is_folder = any(os.path.lexists(folder / "config.json") for folder in (Path(spec), WEIGHTS / spec))
    name, _, which = (spec, "", "best") if is_folder or "@" not in spec else spec.rpartition("@")
    if not (which in ("best", "last") or (which.isdecimal() and len(which) <= 18)):
        raise UsageError(f"{spec!r}: after @ comes best, last or a step")
    return ModelRef(find_folder(name), which)


def find_folder(name: str) -> Path:
    """A run or model folder by its path or its name in weights/. Raises CheckpointError where there is none."""
    for folder in (Path(name), WEIGHTS / name):
        if name and os.path.lexists(folder / "config.json"):
            return folder
    known = ", ".join(run.name for run in find_runs()[:5])
    raise CheckpointError(
        f"there is no run or model {name!r}" + (f"; the newest are {known}" if known else ""),
        fix="see the runs: nnx list",
    )


def find_runs() -> list[Path]:
    """The run folders in weights/, the one that changed last first."""
    found = [path.parent for path in WEIGHTS.glob("*/run.json") if not path.parent.name.startswith(".")]
    return sorted(found, key=lambda folder: (folder / "run.json").stat().st_mtime, reverse=True)


def model_from_config(config: Mapping[str, Any], source: Path) -> LanguageModel:
    """The model that a config.json describes, on the meta device. Raises CheckpointError where it describes none."""
    described = config.get("model")
    if not isinstance(described, dict) or described.get("name") not in models.names():
        raise CheckpointError(f"{source / 'config.json'} names no model of this version of nnx")
    fields = {key: value for key, value in described.items() if key not in ("name", "size")}
    try:
        stated = {key: value for key, value in fields.items() if value is not None}
        coerce(models.config_fields(described["name"]), stated, "its model")
        with torch.device("meta"):
            model = models.build(described["name"], **fields)
            if config.get("lora"):
                add_adapters(model, config["lora"]["rank"])
            return model
    except (UsageError, TypeError, KeyError, RuntimeError) as error:  # the last: a size beyond what torch can count
        raise CheckpointError(f"{source / 'config.json'} describes no {described['name']}: {error}") from error


def load_model(ref: ModelRef, device: torch.device, precision: str = "fp32") -> LanguageModel:
    """The model of a MODEL, in evaluation mode, computing in `precision` on `device`. Raises CheckpointError."""
    config = ref.config
    model = model_from_config(config, ref.folder)
    path, state = ref.weights()
    if "quantization" in config:
        quantize_layers(model, read_quantization(config["quantization"], ref.folder))
        state = widen(state)
    ckpt.load_weights(model, state, path, device)
    model.compute_dtype = DTYPES[precision]
    return model.eval()


def read_quantization(described: Mapping[str, Any], source: Path) -> Quantization:
    """How the matrices of a model are stored. Raises CheckpointError where that cannot be."""
    try:
        found = Quantization.read(described)
    except TypeError as error:
        raise CheckpointError(f"{source / 'config.json'} describes no quantization: {error}") from error
    group = found.group_size
    if not (group is None if found.bits == 8 else type(group) is int and 2 <= group <= 2**16):
        raise CheckpointError(f"{source / 'config.json'} describes no quantization: groups of {str(group)[:20]}")
    return found


def list_runs() -> list[dict[str, Any]]:
    """What `nnx list` shows of every run, newest first."""
    rows = []
    for folder in find_runs():
        row: dict[str, Any] = {"name": folder.name, "out": str(folder)}
        try:
            config, status = read_verified_config(folder), read_status(folder)
            row |= {
                "model": config["model"]["name"],
                "size": config["model"].get("size"),
                "status": live_status(folder, status),
                "steps": status.get("step"),
                "best_val_bits_per_byte": status.get("best_val_bits_per_byte"),
                "best_val_loss": status.get("best_val_loss"),
            }
        except (NnxError, KeyError) as error:
            row |= {"status": "damaged", "error": str(error)}
        row["age_s"] = round(time.time() - (folder / "run.json").stat().st_mtime)
        rows.append(row)
    return rows


def live_status(folder: Path, status: Mapping[str, Any]) -> str:
    """A run's status; one that says "running" while nobody holds its lock was killed: "interrupted"."""
    stated = str(status.get("status"))
    if stated != "running":
        return stated
    if not (folder / "lock").is_file():
        return "interrupted"
    with open(folder / "lock", "rb") as file:
        return "interrupted" if try_lock(file) else "running"
