"""Damaged files are noticed, never obeyed: every kind of file that a command reads, damaged in every way we know."""

from __future__ import annotations

import ast
import io
import itertools
import json
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import nnx_cli
from nnx_cli.data.token_folder import open_token_folder
from nnx_cli.errors import CheckpointError, DataError
from nnx_cli.runs.run import Run
from tests.reliability import Result, damage
from tests.reliability.scene import (
    CODES,
    SHAPE,
    STEPS,
    Outcome,
    Tally,
    check,
    check_refusal,
    fresh,
    listing,
    nnx,
    peak_rss_bytes,
    remove,
    scene,
    watched,
)

RUN, SMALL, BYTE, CHAR = "weights/run", "weights/small", "data/byte", "data/char"
NEWEST, OLDER = f"step-{STEPS:08d}", f"step-{STEPS // 2:08d}"
GROWTH = 300 * 2**20  # of resident memory, over all damaged files

pytestmark = pytest.mark.skipif(os.name != "posix", reason="pipes, links and limits of POSIX")


def cases(
    full: bool, few: int, turn: int, *sources: Iterator[tuple[str, damage.Damage]]
) -> Iterator[tuple[str, damage.Damage]]:
    """The first of each source of damage, ten times as many in the long version. The short one has every third of
    them, and files take turns: what one does not get, the next ones do."""
    for source in sources:
        yield from itertools.islice(source, few * 10) if full else itertools.islice(source, turn % 3, few, 3)


def sample(model: str) -> Outcome:
    return nnx("sample", model, "--greedy", "--max-new-tokens", 2, "--prompt", "the", "--json")


def text_in(outcome: Outcome) -> list[str]:
    return [each["text"] for each in json.loads(outcome.out)["samples"]]


def resume() -> Outcome:
    return nnx("train", "--resume", RUN, "--max-steps", STEPS + 1)


# models


def damaged_models(full: bool) -> Result:
    """Weights, tokenizer, configuration and manifest of a run and of a quantized model, as accidents damage them."""
    tally, draw = Tally(), random.Random(1)
    with scene() as folder:
        fresh(BYTE)
        for first, model in enumerate((RUN, SMALL)):
            fresh(model)
            expected = text_in(sample(model))
            names = ("config.json", "tokenizer.json", "model.safetensors", "manifest.json")
            for turn, name in enumerate(names, first):
                content = (fresh(model) / name).read_bytes()
                own = damage.any_tensors(draw) if name.endswith("tensors") else damage.any_json(draw, content.decode())
                for what, apply in cases(full, 22, turn, damage.any_bytes(draw), damage.any_place(folder), own):
                    path = fresh(model) / name
                    with tally.case(f"{model}/{name}: {what}") as case:
                        apply(path)
                        before = listing(Path("weights"))
                        with watched(folder):
                            outcome = sample(model)
                        if name == "manifest.json" and outcome.code == 0:  # it decides nothing but what is refused
                            assert text_in(outcome) == expected, case
                        else:
                            check_refusal(outcome, 5, case)
                        assert listing(Path("weights")) == before, case
                    remove(folder / name)
    return tally.result(3, "damaged models")


def signed_models(full: bool) -> Result:
    """The same by somebody who mends the checksums: what is in the files is checked too."""
    tally, draw = Tally(), random.Random(2)
    with scene() as folder:
        fresh(BYTE)
        for first, model in enumerate((RUN, SMALL)):
            for turn, name in enumerate(("config.json", "tokenizer.json", "model.safetensors"), first):
                content = (fresh(model) / name).read_bytes()
                own = damage.any_tensors(draw) if name.endswith("tensors") else damage.any_json(draw, content.decode())
                for what, apply in cases(full, 28, turn, own):
                    path = fresh(model) / name
                    with tally.case(f"{model}/{name}, signed: {what}") as case:
                        apply(path)
                        damage.sign(path.parent)
                        with watched(folder):
                            outcome = sample(model)
                            others = [nnx("list")] if name == "config.json" else []
                            others += (
                                [nnx("summarize", model, "--json")] if others and (full or tally.times % 5 == 0) else []
                            )
                        decides = name == "model.safetensors"
                        check_refusal(outcome, 5 if decides else {0, 4, 5}, case)
                        for other in others:
                            check_refusal(other, {0, 4, 5}, case)
    return tally.result(3, "damaged models with mended checksums")


def swapped_files(full: bool) -> Result:
    """Files of a run, of its checkpoints and of its data change places."""
    tally = Tally()
    with scene() as folder:
        fresh(BYTE)
        names = [
            "config.json",
            "tokenizer.json",
            "model.safetensors",
            "manifest.json",
            "metrics.jsonl",
            *(f"checkpoints/{NEWEST}/{name}" for name in ("model.safetensors", "optimizer.safetensors", "state.json")),
            f"checkpoints/{OLDER}/model.safetensors",
        ]
        for a, b in itertools.combinations(names, 2):
            run = fresh(RUN)
            contents = (run / a).read_bytes(), (run / b).read_bytes()
            if contents[0] == contents[1]:  # the best weights are those of a checkpoint
                continue
            (run / a).write_bytes(contents[1])
            (run / b).write_bytes(contents[0])
            with tally.case(f"{a} and {b}") as case, watched(folder):
                if {a, b} & set(names[:4]):
                    check_refusal(sample(RUN), 5, case)
                if any(NEWEST in name for name in (a, b)) and not {a, b} & {"config.json", "manifest.json", names[-1]}:
                    check_fallback(case)
        for name, other in ((NEWEST, "step-00000099"), (OLDER, "step-00000099")):
            run = fresh(RUN)
            (run / "checkpoints" / name).rename(run / "checkpoints" / other)
            with tally.case(f"{name} called {other}") as case, watched(folder):
                _, notes = Run(run).newest_checkpoint()
                assert len(notes) == 1 and "holds step" in notes[0], notes
    return tally.result(3, "swapped files")


# checkpoints


def check_fallback(case: str) -> None:
    """The newest checkpoint is refused as a model, and a resumed run says so and begins at the one before."""
    checkpoint, notes = Run(Path(RUN)).newest_checkpoint()
    assert checkpoint.step == STEPS // 2, case
    assert len(notes) == 1 and NEWEST in notes[0] and "going back" in notes[0], f"{case}: {notes}"


def damaged_checkpoints(full: bool) -> Result:
    """Every file of the newest checkpoint: a resumed run goes back to the one before and says so."""
    tally, draw = Tally(), random.Random(3)
    with scene() as folder:
        fresh(BYTE)
        for turn, name in enumerate(("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")):
            content = (fresh(RUN) / "checkpoints" / NEWEST / name).read_bytes()
            own = damage.any_tensors(draw) if name.endswith("tensors") else damage.any_json(draw, content.decode())
            for number, (what, apply) in enumerate(
                cases(full, 22, turn, damage.any_bytes(draw), damage.any_place(folder), own)
            ):
                path = fresh(RUN) / "checkpoints" / NEWEST / name
                with tally.case(f"{NEWEST}/{name}: {what}") as case:
                    apply(path)
                    with watched(folder):
                        if name == "manifest.json" and not manifest_refused():
                            continue
                        check_fallback(case)
                        if name in ("model.safetensors", "manifest.json"):
                            check_refusal(sample(f"{RUN}@{STEPS}"), 5 if name != "manifest.json" else {0, 5}, case)
                        if number % 15 == 0:
                            outcome = resume()
                            check_refusal(outcome, 0, case)
                            assert len(outcome.warned) == 1 and NEWEST in outcome.warned[0], outcome.err
                            assert f"at step {STEPS // 2}" in outcome.err.decode(), outcome.err
                remove(folder / name)
        for name in ("model.safetensors", "state.json"):
            with tally.case(f"{name} of all checkpoints") as case, watched(folder):
                run = fresh(RUN)
                for path in run.glob(f"checkpoints/*/{name}"):
                    path.write_bytes(path.read_bytes()[:-1])
                before = listing(run)
                check_refusal(resume(), 5, case)
                assert listing(run) == before | {f"{RUN}/lock": "lock"}, case
    return tally.result(3, "damaged checkpoints")


def manifest_refused() -> bool:
    """Whether a damaged manifest is noticed; where it is not, it must read as the one that was written."""
    run = Run(Path(RUN))
    if (found := run.newest_checkpoint()[0]).step != STEPS:
        return True
    fresh(RUN)
    whole = run.newest_checkpoint()[0]
    assert found.state == whole.state
    assert all(torch.equal(tensor, whole.model[name]) for name, tensor in found.model.items())
    return False


def signed_checkpoints(full: bool) -> Result:
    """Contents of a checkpoint that cannot be, under right checksums: refused in a line, or passed over."""
    tally, draw = Tally(), random.Random(4)
    with scene() as folder:
        fresh(BYTE)
        for turn, name in enumerate(("state.json", "optimizer.safetensors", "model.safetensors")):
            content = (fresh(RUN) / "checkpoints" / NEWEST / name).read_bytes()
            own = damage.any_tensors(draw) if name.endswith("tensors") else damage.any_json(draw, content.decode())
            for what, apply in cases(full, 9, turn, own):
                path = fresh(RUN) / "checkpoints" / NEWEST / name
                with tally.case(f"{NEWEST}/{name}, signed: {what}") as case:
                    apply(path)
                    damage.sign(path.parent)
                    with watched(folder):
                        check_refusal(resume(), {0, 5}, case)
    return tally.result(3, "damaged checkpoints with mended checksums")


# logs


def damaged_logs(full: bool) -> Result:
    """A log that is damaged costs its damaged lines and one warning that names the first of them."""
    tally, draw = Tally(), random.Random(5)
    with scene() as folder:
        fresh(BYTE)
        for turn, name in enumerate(("metrics.jsonl", "samples.jsonl")):
            lines = (fresh(RUN) / name).read_bytes().splitlines()
            own = damage.any_json(draw, lines[0].decode())
            for what, apply in cases(full, 22, turn, damage.any_bytes(draw), damage.any_place(folder), own):
                path = fresh(RUN) / name
                with tally.case(f"{name}: {what}") as case:
                    apply(path)
                    first = first_damaged(path)
                    with watched(folder):
                        notes = Run(Path(RUN)).cut_logs(STEPS)
                    check_note(notes, name, first, case)
                    assert first_damaged(path) is None, case
                remove(folder / name)
        for what, apply in (("one line", damage.overwrite(b'{"step": 1}\n{"st\n{"step": 3}\n')), ("a pipe", None)):
            with tally.case(f"metrics.jsonl: {what}") as case, watched(folder):
                path = fresh(RUN) / "metrics.jsonl"
                apply(path) if apply else dict(damage.any_place(folder))["pipe"](path)
                outcome = resume()
                check_refusal(outcome, 0, case)
                assert len(outcome.warned) == 1 and "metrics.jsonl" in outcome.warned[0], outcome.err
                assert not apply or "line 2 " in outcome.warned[0], outcome.err
    return tally.result(3, "damaged logs")


def first_damaged(path: Path) -> int | str | None:
    """The number of the first line that is no object with a step; "all" where the log is no file."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        return "all"
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True) if path.exists() else [], 1):
        try:
            step = json.loads(line)["step"]
        except (ValueError, TypeError, KeyError, IndexError, RecursionError):
            return number
        if not line.endswith(b"\n") or isinstance(step, bool) or not isinstance(step, int) or step < 0:
            return number
    return None


def check_note(notes: list[str], name: str, first: int | str | None, case: str) -> None:
    if first is None:
        assert not notes, f"{case}: {notes}"
        return
    assert len(notes) == 1 and name in notes[0], f"{case}: {notes}"
    assert first == "all" or f"line {first:,} " in notes[0], f"{case}: {notes}, not {first}"


def damaged_status(full: bool) -> Result:
    """run.json decides nothing: a run goes on without it, and `nnx list` shows that it is damaged."""
    tally, draw = Tally(), random.Random(6)
    with scene() as folder:
        fresh(BYTE)
        text = (fresh(RUN) / "run.json").read_text()
        for number, (what, apply) in enumerate(
            cases(full, 25, 0, damage.any_bytes(draw), damage.any_place(folder), damage.any_json(draw, text))
        ):
            path = fresh(RUN) / "run.json"
            with tally.case(f"run.json: {what}") as case:
                apply(path)
                with watched(folder):
                    check_refusal(nnx("list"), 0, case)
                    check_refusal(nnx("list", "--json"), 0, case)
                    if number % 6 == 0:
                        outcome = resume()
                        check_refusal(outcome, 0, case)
                        assert len(outcome.warned) <= 1, outcome.err
                        status = json.loads((Path(RUN) / "run.json").read_bytes())
                        assert status["status"] == "finished" and status["step"] == STEPS + 1, status
            remove(folder / "run.json")
    return tally.result(3, "damaged run.json")


# tokens


SPLIT_FILES = ("train.bin", "train.documents", "val.bin", "val.documents")


def damaged_tokens(full: bool) -> Result:
    """Every file of a token folder: refused with exit 3, or what is read is what was written."""
    tally, draw = Tally(), random.Random(7)
    with scene() as folder:
        for data in (BYTE, CHAR):
            whole = open_token_folder(fresh(data))
            expected = loaded(whole)
            for turn, name in enumerate((*SPLIT_FILES, "meta.json", "tokenizer.json")):
                content = (fresh(data) / name).read_bytes()
                own = damage.any_json(draw, content.decode()) if name.endswith("json") else damage.any_bytes(draw)
                for what, apply in cases(full, 22, turn, damage.any_bytes(draw), damage.any_place(folder), own):
                    path = fresh(data) / name
                    with tally.case(f"{data}/{name}: {what}") as case:
                        apply(path)
                        with watched(folder):
                            try:
                                found = open_token_folder(data)
                            except DataError as error:
                                assert str(error) and "\n" not in str(error)
                                continue
                            assert loaded(found) == expected, case
                            assert name.endswith("json") or what == "link to an equal file", case
                    remove(folder / name)
    return tally.result(3, "damaged token folders")


def loaded(data) -> tuple:
    """What of a token folder decides a result."""
    documents = {split: starts.tobytes() for split, starts in data.documents.items()}
    return (
        data.train.tobytes(),
        data.val.tobytes(),
        documents,
        data.vocab_size,
        data.tokenizer.fingerprint,
        data.fingerprint,
    )


def commands_verify_tokens(full: bool) -> Result:
    """Every command that reads tokens notices one changed byte in either file, before anything else happens."""
    tally = Tally()
    with scene() as folder:
        for name in SPLIT_FILES:
            for words in (
                ("train", "--data", BYTE, *SHAPE, "--max-steps", 1),
                ("train", "--data", BYTE, "--dry-run"),
                ("train", "--resume", RUN, "--max-steps", STEPS + 1),
                ("train", "--init-from", RUN, "--data", BYTE, "--max-steps", 1),
                ("eval", RUN),
                ("eval", f"{RUN}@last"),
                ("quantize", RUN, "--out", "weights/other"),
            ):
                fresh(RUN)
                path = fresh(BYTE) / name
                data = path.read_bytes()
                path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
                with tally.case(f"{name}: {' '.join(map(str, words))}") as case, watched(folder):
                    before = listing(folder)
                    check_refusal(nnx(*words), 3, case)
                    after = listing(folder)
                    after.pop(f"{folder}/{RUN}/lock", None)
                    before.pop(f"{folder}/{RUN}/lock", None)
                    assert after == before, case
    return tally.result(3, "tokens that every command verifies")


# settings


def damaged_settings(full: bool) -> Result:
    """A TOML file of settings: refused as usage or data, or taken."""
    tally, draw = Tally(), random.Random(8)
    with scene() as folder:
        fresh(BYTE)
        fixed = {
            "empty": b"",
            "deep": b"a = " + b"[" * 50_000,
            "long number": b"seed = " + b"9" * 5000,
            "hexadecimal": b"seed = 0x" + b"f" * 5000,
            "date": b"lr = 9999-99-99",
            "twice": b"lr = 1.0\nlr = 2.0",
            "nan": b"lr = nan",
            "inf": b"lr = inf",
            "no UTF-8": b"model = '\xff'",
            "a table": b"[lr]\nx = 1",
            "control": b'model = "\\u001b[2J"',
            "key": b'"\\u001b]52;c;" = 1',
            "class": b"__class__ = 'os.system'",
            "long": b"#" * 2**21,
            "zeros": bytes(100),
            "bool": b"lr = true",
            "list": b"model = ['nyx']",
            "huge": b"max_steps = 1" + b"0" * 400,
            "negative": b"dim = -5",
            "size": b"size = 3",
            "half a step": b"max_steps = 1.5",
        }
        settled = [(name, damage.overwrite(content)) for name, content in fixed.items()]
        for what, apply in [*settled, *cases(full, 12, 0, damage.any_bytes(draw), damage.any_place(folder))]:
            if what in ("pipe", "link to an equal file", "sparse"):  # all of them are as good as a file to read once
                continue
            path = fresh("settings.toml")
            with tally.case(f"settings.toml: {what}") as case:
                apply(path)
                before = listing(folder)
                with watched(folder):
                    check_refusal(nnx("train", "--config", path, "--data", BYTE, "--dry-run"), {0, 2, 3}, case)
                assert listing(folder) == before, case
    return tally.result(3, "damaged settings")


# foreign checkpoints


def damaged_foreign(full: bool) -> Result:
    """A foreign checkpoint is refused with exit 5, or gives a model; of a torch archive the same model, bit by bit."""
    tally, draw = Tally(), random.Random(9)
    with scene() as folder:
        for turn, name in enumerate(("foreign/seed.pth", "foreign/old.pt", "foreign/seed.safetensors")):
            remove(Path("made"))
            assert bring(fresh(name)).code == 0
            expected = Path("made/model.safetensors").read_bytes()
            sources = [damage.any_bytes(draw), damage.any_place(folder)]
            sources += [damage.any_tensors(draw)] if name.endswith("safetensors") else []
            for what, apply in cases(full, 25, turn, *sources):
                path = fresh(name)
                remove(Path("made"))
                with tally.case(f"{name}: {what}") as case:
                    apply(path)
                    with watched(folder):
                        outcome = bring(path)
                    check_refusal(outcome, {0, 5}, case)
                    assert Path("made").exists() == (outcome.code == 0), case
                    if outcome.code == 0 and name.endswith(".pth"):
                        assert Path("made/model.safetensors").read_bytes() == expected, case
                remove(folder / path.name)
    return tally.result(3, "damaged foreign checkpoints")


def bring(path: Path) -> Outcome:
    return nnx("import", "--model", "nyx", path, "--out", "made")


class Bomb:
    """What unpickling it would run."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.made = function, arguments

    def __reduce__(self) -> tuple:
        return self.made


def malicious(canary: Path) -> Iterator[tuple[str, bytes]]:
    """Files that would leave `canary` behind, or fill the memory, if what they hold were done."""
    command = f"touch {canary}"
    bombs = {
        "os.system": Bomb(os.system, command),
        "eval": Bomb(eval, f"open({str(canary)!r}, 'w')"),
        "exec": Bomb(exec, f"open({str(canary)!r}, 'w').close()"),
        "open": Bomb(open, str(canary), "w"),
        "getattr": Bomb(getattr, dict, "get"),
        "nested": {"model": {"a": Bomb(os.system, command)}},
        "beside tensors": {"a": torch.zeros(2), "b": Bomb(os.system, command)},
        "torch.load again": Bomb(torch.load, "seed.pth"),
        "bytearray": Bomb(bytearray, 2**36),
        "torch.zeros": Bomb(torch.zeros, 2**36),
        "range": Bomb(range, 2**62),
    }
    for name, bomb in bombs.items():
        for protocol in (0, 2, 4):
            with_modules = pickle.dumps(bomb, protocol)
            yield f"{name}, plain pickle {protocol}", with_modules
            yield f"{name}, torch archive {protocol}", archive(with_modules)
    code = b"cposix\nsystem\n(S'" + command.encode() + b"'\ntR."
    yield "global by hand", code
    yield "global by hand, archive", archive(code)
    yield "instance by hand", b"(S'" + command.encode() + b"'\niposix\nsystem\n."
    yield "builtins by hand", archive(b"cbuiltins\neval\n(S'1'\ntR.")
    yield "torch function", archive(b"ctorch\nload\n(S'seed.pth'\ntR.")
    yield "extension", archive(b"\x82\x01.")
    yield "endless memo", archive(b"(" * 10**6 + b".")
    yield "deep", archive(b"\x80\x02" + b"]" * 10**5 + b"a" * 10**5 + b".")
    yield "huge long", archive(b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b".")
    yield "huge string", archive(b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b".")
    for n in (2**36, 2**62):
        yield f"storage of {n}", archive(storage(n, (4,), (1,)), {"data/0": bytes(16)})
        yield f"view of {n}", archive(storage(4, (n,), (0,)), {"data/0": bytes(16)})
    yield "negative view", archive(storage(4, (4,), (-1,)), {"data/0": bytes(16)})
    yield "view beyond", archive(storage(4, (4,), (1,), 10**6), {"data/0": bytes(16)})
    yield "missing storage", archive(storage(4, (4,), (1,)))
    yield "zip bomb", archive(storage(2**24, (2**24,), (1,)), {"data/0": bytes(2**26)}, zipfile.ZIP_DEFLATED)
    yield "many names of one", overlapping()
    yield "traversal", archive(storage(4, (4,), (1,)), {"data/0": bytes(16), "../../" + canary.name: b"x"})
    yield (
        "script",
        archive(b"}.", {"code/__torch__.py": f"import os; os.system({command!r})".encode(), "constants.pkl": code}),
    )
    yield "tar", b"storages" + bytes(600)
    yield "numpy pickle", npy(Bomb(os.system, command))
    yield "empty", b""
    yield "python", f"import os\nos.system({command!r})\n".encode()


def archive(program: bytes, records: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED) -> bytes:
    """The zip archive that torch.save makes, around a pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, content in {
            "data.pkl": program,
            "byteorder": b"little",
            "version": b"3\n",
            **(records or {}),
        }.items():
            file.writestr(name if name.startswith("..") else f"archive/{name}", content)
    return buffer.getvalue()


def storage(n: int, shape: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> bytes:
    """The pickle of {"token_embedding.weight": a tensor} with a storage of n floats, as torch writes it."""

    class Pickler(pickle._Pickler):  # in Python, because it must write a persistent id by hand
        def persistent_id(self, value: object) -> object:
            return ("storage", torch.FloatStorage, "0", "cpu", n) if value is marker else None

    marker = object()
    buffer = io.BytesIO()
    from collections import OrderedDict

    bomb = Bomb(torch._utils._rebuild_tensor_v2, marker, offset, shape, stride, False, OrderedDict())
    Pickler(buffer, 2).dump({"token_embedding.weight": bomb})
    return buffer.getvalue()


def overlapping() -> bytes:
    """An archive whose entries all name the same megabyte."""
    data = bytearray(archive(b"}.", {"data/0": bytes(2**20)}))
    end = data.rindex(b"PK\x05\x06")
    start = struct.unpack("<I", data[end + 16 : end + 20])[0]
    entries = bytes(data[start:end])
    last = entries[entries.rindex(b"PK\x01\x02") :]
    many = entries + last * 5000
    tail = bytearray(data[end:])
    tail[8:12] = struct.pack("<HH", 5004, 5004)
    tail[12:16] = struct.pack("<I", len(many))
    return bytes(data[:start]) + many + bytes(tail)


def npy(bomb: object) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([bomb], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def malicious_checkpoints(full: bool) -> Result:
    """Files made to run something, as a foreign checkpoint and in the place of a model's own files."""
    tally = Tally()
    with scene() as folder:
        canary = folder / "canary"
        fresh(BYTE)
        names = ("bad.pth", "bad.safetensors", "bad.pt", "bad.bin")
        for number, (what, content) in enumerate(malicious(canary)):
            for name in names if full else (names[number // 2 % 2],):  # pairs are alike
                with tally.case(f"{what} as {name}") as case:
                    Path(name).write_bytes(content)
                    before = listing(folder)
                    with watched(folder):
                        check_refusal(bring(Path(name)), 5, case)
                    assert listing(folder) == before and not canary.exists(), case
                remove(Path(name))
        some = [(what, content) for what, content in malicious(canary) if "by hand" in what or "os.system" in what]
        for what, content in some:
            for name in (
                "model.safetensors",
                f"checkpoints/{NEWEST}/model.safetensors",
                f"checkpoints/{NEWEST}/optimizer.safetensors",
            ):
                with tally.case(f"{what} as {name}") as case:
                    path = fresh(RUN) / name
                    path.write_bytes(content)
                    damage.sign(path.parent)
                    with watched(folder):
                        model = RUN if name == "model.safetensors" else f"{RUN}@{STEPS}"
                        if "optimizer" not in name:
                            check_refusal(sample(model), 5, case)
                        if name != "model.safetensors":
                            check_fallback(case)
                    assert not canary.exists(), case
    return tally.result(3, "malicious files")


# places


def path_tricks(full: bool) -> Result:
    """Links out of the run folder, and files where folders should be: nothing outside changes."""
    tally = Tally()
    with scene() as folder:
        outside = folder.parent / f"{folder.name}-outside"
        outside.mkdir()
        try:
            for number, (what, make) in enumerate(tricks(outside)):
                fresh(BYTE)
                fresh(RUN)
                for path in outside.iterdir():
                    remove(path)
                (outside / "precious").write_text("{}\n")
                with tally.case(what) as case:
                    make(Path(RUN))
                    before = listing(outside)
                    with watched(folder):
                        readers = (("list",), ("eval", RUN), ("eval", f"{RUN}@last"), ("summarize", RUN))
                        outcomes = [resume(), sample(RUN)]
                        outcomes += [nnx(*words) for words in (readers if full else (readers[number % 4],))]
                    assert listing(outside) == before, case
                    for outcome in outcomes:
                        check_refusal(outcome, CODES, case)
        finally:
            remove(outside)
    return tally.result(3, "links and other tricks with places")


def tricks(outside: Path) -> Iterator[tuple[str, Callable[[Path], None]]]:
    def link(name: str, target: Path, copy: bool = False) -> Callable[[Path], None]:
        def make(run: Path) -> None:
            path = run / name
            if path.is_dir():
                path.rename(target)
            elif copy:
                target.write_bytes(path.read_bytes())
                path.unlink()
            else:
                path.unlink(missing_ok=True)
            path.symlink_to(target)

        return make

    precious = outside / "precious"
    for name in ("lock", "metrics.jsonl", "samples.jsonl", "run.json", "config.json", "manifest.json"):
        yield f"{name} is a link", link(name, precious)
    for name in ("metrics.jsonl", "run.json", "config.json", "manifest.json", "tokenizer.json", "model.safetensors"):
        yield f"{name} is a link to its content", link(name, outside / "copy", copy=True)
    yield "checkpoints is a link", link("checkpoints", outside / "moved")
    yield "a checkpoint is a link", link(f"checkpoints/{NEWEST}", outside / "moved")
    yield "an old checkpoint is a link", link(f"checkpoints/{OLDER}", outside / "moved")
    yield "a leftover is a link", lambda run: (run / ".tmp-x-1").symlink_to(outside)
    yield "a leftover checkpoint is a link", lambda run: (run / "checkpoints" / ".tmp-step-1").symlink_to(outside)
    yield "the next checkpoint is a link", link(f"checkpoints/step-{STEPS + 1:08d}", outside)
    yield "the temporary file is a link", link(f".tmp-run.json-{os.getpid()}", precious)
    yield "the temporary weights are a link", link(f".tmp-best-{os.getpid()}", precious)
    yield "the temporary configuration is a link", link(f".tmp-config.json-{os.getpid()}", precious)
    for name in ("../../../../etc", "/etc", "/etc/passwd", "../../../nothing", "x" * 5000, "a\0b", "~"):
        yield f"data in {name[:20]}", data_in(name)
    for name in ("../../precious", "/etc/passwd", "C:\\x", "\0", ".", "x" * 5000):
        yield f"a manifest that lists {name[:20]!r}", listing_of(name)


def data_in(name: str) -> Callable[[Path], None]:
    def make(run: Path) -> None:
        config = json.loads((run / "config.json").read_bytes())
        config["data"]["folder"] = name
        (run / "config.json").write_text(json.dumps(config))
        damage.sign(run)

    return make


def listing_of(name: str) -> Callable[[Path], None]:
    def make(run: Path) -> None:
        manifest = json.loads((run / "manifest.json").read_bytes())
        manifest["files"][name] = "0" * 64
        manifest["replacing"] = {name: "1" * 64}
        (run / "manifest.json").write_text(json.dumps(manifest))

    return make


# the source


def no_pickle(full: bool) -> Result:
    """Nothing in the package writes a pickle or reads one, but the importer through the loader that builds tensors."""
    tally = Tally()
    for path in sorted(Path(nnx_cli.__file__).parent.rglob("*.py")):
        with tally.case(path.name):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                check_node(node, path)
    return tally.result(3, "source files without a pickle")


FORBIDDEN = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "breakpoint",
    "input",
    "pickle.load",
    "pickle.loads",
    "pickle.dump",
    "pickle.dumps",
    "pickle.Pickler",
    "pickle.Unpickler",
    "torch.save",
    "torch.jit.load",
    "torch.hub.load",
    "os.system",
    "os.popen",
    "marshal.load",
    "marshal.loads",
    "shelve.open",
    "joblib.load",
    "np.lib.format.read_array",
    "yaml.load",
    "runpy.run_path",
    "runpy.run_module",
    "importlib.util.spec_from_file_location",
    "torch.package.PackageImporter",
    "torch.distributed.checkpoint.load",
    "dcp.load",
    "np.fromfile",
}


def check_node(node: ast.AST, path: Path) -> None:
    if isinstance(node, ast.Call):
        called = ast.unparse(node.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        asks = (called, path.name) == ("input", "line_input.py")  # the line that somebody types to a model
        assert called not in FORBIDDEN or asks, f"{path}:{node.lineno} {called}"
        if called == "torch.load":
            assert path.name == "checkpoint_file.py" and options["weights_only"] == "True", f"{path}:{node.lineno}"
        assert options.get("allow_pickle", "False") == "False", f"{path}:{node.lineno}"
        assert options.get("shell", "False") == "False", f"{path}:{node.lineno}"
        if called in ("importlib.import_module", "import_module"):  # names of our own only, checked against the folder
            told = path.name == "_follow.py"  # by the process of ours that starts it
            assert told or ast.unparse(node.args[0]).startswith(("f'nnx_cli.", "'")), f"{path}:{node.lineno}"
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
        assert not names & {"marshal", "shelve", "dill", "joblib", "cloudpickle"}, f"{path}:{node.lineno}"
        assert "pickle" not in names or path.name == "checkpoint_file.py", f"{path}:{node.lineno}"


def giant(path: Path) -> None:
    """A file of 100 GB, none of it on the disk."""
    with open(path, "r+b") as file:
        file.truncate(100 * 2**30)


def bounded_memory(full: bool) -> Result:
    """Over all of this, memory stays where it was."""
    tally = Tally()
    with tally.case(f"peak of {peak_rss_bytes() >> 20} MiB"):
        with scene():
            fresh(BYTE), fresh(RUN)
            sample(RUN), resume()
            before = peak_rss_bytes()
        for part in (damaged_models, damaged_foreign) if full else ():
            part(False)
        with scene() as folder:
            fresh(BYTE)
            for name in ("model.safetensors", "config.json", "manifest.json", "tokenizer.json"):
                for lie in (damage.header_length(10**11), giant):
                    path = fresh(RUN) / name
                    lie(path)
                    with watched(folder):
                        check_refusal(sample(RUN), 5, name)
            for name in ("train.bin", "train.documents", "meta.json", "tokenizer.json"):
                giant(fresh(BYTE) / name)
                with watched(folder), pytest.raises(DataError):
                    open_token_folder(BYTE)
        grown = peak_rss_bytes() - before
        assert grown < GROWTH, f"{grown >> 20} MiB more"
    return tally.result(3, "memory over damaged files")


PARTS = {
    "damaged models": damaged_models,
    "signed models": signed_models,
    "swapped files": swapped_files,
    "damaged checkpoints": damaged_checkpoints,
    "signed checkpoints": signed_checkpoints,
    "damaged logs": damaged_logs,
    "damaged run.json": damaged_status,
    "damaged tokens": damaged_tokens,
    "verified tokens": commands_verify_tokens,
    "damaged settings": damaged_settings,
    "damaged foreign checkpoints": damaged_foreign,
    "malicious files": malicious_checkpoints,
    "path tricks": path_tricks,
    "no pickle": no_pickle,
    "bounded memory": bounded_memory,
}


@pytest.mark.parametrize("name", PARTS)
def test_damage(name):
    check(PARTS[name](False))


def test_all_checkpoints_damaged_names_the_first(tmp_path):
    with scene():
        run = Run(fresh(RUN))
        for path in run.checkpoints.glob("*/manifest.json"):
            path.unlink()
        with pytest.raises(CheckpointError, match="no intact checkpoint"):
            run.newest_checkpoint()
