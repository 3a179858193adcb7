"""Hostile text: what data, prompts, names and models say never drives the terminal and never breaks the JSON."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nnx_cli.data.tokenizers.base import Tokenizer
from nnx_cli.runs.load import ModelRef
from nnx_cli.system.text import printable, well_formed
from tests.reliability import Result, damage
from tests.reliability.scene import (
    CODES,
    HABITS,
    SHAPE,
    Outcome,
    Tally,
    check,
    check_speech,
    fresh,
    live_controls,
    nnx,
    remove,
    scene,
    watched,
)

ROOT = Path(__file__).parents[2]
RUN, SMALL, BYTE = "weights/run", "weights/small", "data/byte"

PAYLOADS = {
    "colour": "\x1b[31mred\x1b[0m",
    "clear": "\x1b[2J\x1b[H",
    "title": "\x1b]0;owned\x07",
    "title to the end": "\x1b]2;x\x1b\\",
    "link": "\x1b]8;;https://evil.example\x1b\\here\x1b]8;;\x1b\\",
    "clipboard": "\x1b]52;c;cm0gLXJmIC8=\x07",
    "clipboard asked": "\x1b]52;c;?\x07",
    "palette": "\x1b]4;1;rgb:00/00/00\x07",
    "notify": "\x1b]9;hello\x07",
    "iterm": "\x1b]1337;File=inline=1:AAAA\x07",
    "device status": "\x1b[6n",
    "attributes": "\x1b[c",
    "answerback": "\x05",
    "alternate screen": "\x1b[?1049h",
    "mouse": "\x1b[?1003h",
    "bracketed paste": "\x1b[?2004l",
    "reset": "\x1bc",
    "charset": "\x1b(0lqk",
    "device string": '\x1bP$q"p\x1b\\',
    "sixel": "\x1bPq#0~~\x1b\\",
    "private": "\x1b^x\x1b\\",
    "application": "\x1b_Gf=100;AAAA\x1b\\",
    "bell": "\x07" * 5,
    "backspace": "rm\x08\x08ls",
    "carriage return": "all is well\rpwned      ",
    "form feed": "\x0c",
    "vertical tab": "\x0b",
    "delete": "\x7f" * 3,
    "shift out": "\x0e\x0f",
    "escape at the end": "x\x1b",
    "split escape": "\x1b[",
    "nul": "a\x00b",
    "c1 csi": "\x9b31m",
    "c1 osc": "\x9d0;x\x9c",
    "c1 string": "\x90q\x9c",
    "c1 all": "".join(map(chr, range(0x80, 0xA0))),
    "c0 all": "".join(map(chr, range(1, 0x20))),
    "override": "\u202etxt.exe",
    "embedding": "\u202a\u202b\u202c\u202d",
    "isolates": "\u2066\u2067\u2068\u2069",
    "marks": "\u200e\u200f\u061c",
    "separators": "a\u2028b\u2029c",
    "lone high": "\ud800",
    "lone low": "x\udfff",
    "reversed pair": "\udc00\ud800",
    "bytes": "\udc80\udcff\udc9b31m",
    "bom": "\ufeffx\ufeff",
    "not a character": "\uffff\ufffe",
    "markup": "[/foo]",
    "markup colour": "[red]x[/red]",
    "markup link": "[link=https://evil.example]x[/link]",
    "markup broken": "[[/]]\\[",
    "markup event": "[@click=app.bell]x[/]",
    "emoji code": ":skull: :pile_of_poo:",
    "combining": "e" + "\u0301" * 500,
    "zero width": "\u200b\u200c\u200d\u2060" * 20,
    "tags": "".join(chr(0xE0000 + ord(char)) for char in "hidden"),
    "variation": "x\ufe0f\U000e0100",
    "wide": "漢" * 200,
    "script": "</script><script>alert(1)</script>",
    "format": "%s %n {0} {x!r} ${HOME} `id` $(id)",
    "long": "A" * 20_000,
    "newlines": "x\n\n\nnnx: all is well\n",
    "json": '"},{"a":"',
    "tab": "\t\t\t",
}

pytestmark = pytest.mark.skipif(os.name != "posix", reason="names that other systems cannot have")


def said(outcome: Outcome, case: str, product: bool = False) -> None:
    """Nothing live on either stream, an exit code of the contract, one line for an error, and JSON where asked for."""
    check_speech(outcome, case, debug="--debug" in case)
    assert outcome.code in CODES, f"{case}: exit {outcome.code}, {outcome.err.decode()[-500:]}"
    assert len(outcome.problems) == (outcome.code != 0) or "newlines" in case, f"{case}: {outcome.err.decode()[-500:]}"
    if product and outcome.code == 0:
        json.loads(outcome.out)


WORST = ("clipboard", "markup", "bytes", "override", "c1 csi", "delete", "nul")


def payloads(full: bool, few: int | None = None) -> Iterator[tuple[str, str]]:
    """All payloads in the long version, else `few` of the worst, or (None) the worst and every third of the others."""
    for number, (name, text) in enumerate(PAYLOADS.items()):
        if full or name in WORST[:few] or (few is None and number % 3 == 0):
            yield name, text


def shown(full: bool) -> Result:
    """The one function that makes text printable."""
    tally = Tally()
    for name, text in PAYLOADS.items():
        with tally.case(name):
            result = printable(text)
            assert not live_controls(result.encode()), result  # also: it can be encoded
            assert printable(result) == result
            assert printable(f"ab{text}") == f"ab{result}"  # nothing depends on what is beside it
            wanted = (
                text if name in ("markup", "wide", "combining", "tab", "script", "json", "newlines", "long") else result
            )
            assert result == wanted
    with tally.case("every character there is"):
        assert not live_controls(printable("".join(map(chr, range(0x110000)))).encode())
    return tally.result(9, "texts made printable")


# arguments

WORDS: tuple[tuple[Any, ...], ...] = (
    ("{}",),
    ("--{}",),
    ("train", "--{}"),
    ("sample", "{}"),
    ("sample", "{}@best"),
    ("sample", "x@{}"),
    ("eval", "{}"),
    ("summarize", "{}"),
    ("summarize", "--model", "{}"),
    ("summarize", "--size", "{}"),
    ("summarize", "--vram", "{}"),
    ("quantize", "{}"),
    ("merge", "{}"),
    ("train", "--resume", "{}"),
    ("train", "--model", "{}"),
    ("train", "--size", "{}"),
    ("train", "--config", "{}"),
    ("train", "--data", "{}"),
    ("train", "--filepath", "{}"),
    ("train", "--init-from", "{}"),
    ("train", "--optimizer", "{}"),
    ("train", "--max-time", "{}"),
    ("train", "--device", "{}"),
    ("train", "--lr", "{}"),
    ("train", "--variant", "{}"),
    ("train", "--checkpoint_path", "{}"),
    ("prepare", "{}"),
    ("prepare", "words", "--val", "{}"),
    ("prepare", "words", "--tokenizer", "{}"),
    ("prepare", "words", "--errors", "{}"),
    ("import", "{}", "--model", "nyx"),
    ("import", "words", "--model", "{}"),
    ("sample", RUN, "--device", "{}"),
    ("sample", RUN, "--precision", "{}"),
    ("sample", RUN, "--prompt-file", "{}"),
    ("sample", RUN, "--temperature", "{}"),
    ("quantize", RUN, "--keep", "{}"),
    ("quantize", RUN, "--bits", "{}"),
    ("eval", RUN, "--filepath", "{}"),
    ("doctor", "{}"),
    ("list", "{}"),
    ("bench", "{}"),
    ("sample", "{}", "--debug"),
    ("train", "--resume", "{}", "--json", "--debug"),
    ("train", "--data", BYTE, "--tokenizer", "{}"),
)


def arguments(full: bool) -> Result:
    """Every place of a command line that takes words of the user's."""
    tally = Tally()
    with scene() as folder:
        fresh(BYTE), fresh(RUN)
        Path("words").write_text("some words\n" * 50)
        for number, words in enumerate(WORDS):
            for name, text in list(payloads(full))[number % 3 :: 1 if full else 4]:
                line = [str(word).replace("{}", text) for word in words]
                with tally.case(f"{' '.join(words)} with {name}") as case, watched(folder):
                    said(nnx(*line), case)
    return tally.result(9, "hostile arguments")


# what a model says


class Stub(Tokenizer):
    """Whatever a model draws, its text is a payload."""

    def __init__(self, text: str) -> None:
        super().__init__("byte", [text.encode(errors="surrogatepass")] * 256)

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(bytearray(well_formed(text).encode()), np.uint8)


def model_output(full: bool) -> Result:
    """A model whose every token is a payload, through `sample` in all its ways; a prompt that is one."""
    tally = Tally()
    with scene() as folder, pytest.MonkeyPatch.context() as patch:
        fresh(BYTE), fresh(RUN)
        for name, text in payloads(True):
            text = text[:300]
            patch.setattr(ModelRef, "tokenizer", Stub(text))
            ways = [(), ("--json",), ("--num-samples", 2), ("--prompt", text), ("--stop", text)]
            for way in ways if full or name in ("clipboard", "c1 csi") else ways[:2]:
                with tally.case(f"{name} {' '.join(way[:1])}") as case, watched(folder):
                    outcome = nnx("sample", RUN, "--max-new-tokens", 3, *way)
                    said(outcome, case, "--json" in way)
                    assert outcome.code == 0, outcome.err
                    if "--json" in way:
                        assert len(json.loads(outcome.out)["samples"][0]["text"]) > 0
        patch.undo()
        for name, text in payloads(full):
            for way in (("--prompt", text), ("--prompt", text, "--json"), ("--prompt", "-")):
                with tally.case(f"prompt of {name}") as case, watched(folder):
                    stdin = text.encode(errors="surrogatepass")
                    outcome = nnx("sample", RUN, "--max-new-tokens", 2, *way, stdin=stdin)
                    said(outcome, case, "--json" in way)
                    unknown = way[-1] == "-" and outcome.code == 3 and b"its encoding cannot be told" in outcome.err
                    assert outcome.code == 0 or unknown, outcome.err
                    if "--json" in way and name != "long":
                        assert json.loads(outcome.out)["prompt"] == well_formed(text)
    return tally.result(9, "hostile model output and prompts")


def trained_on(full: bool) -> Result:
    """A run on nothing but payloads: prepared, trained with samples on the screen, sampled, listed, measured."""
    tally = Tally()
    with scene() as folder:
        text = "\n".join(PAYLOADS.values())
        Path("hostile.txt").write_bytes(text.encode(errors="surrogatepass") * 2)
        rows = [{"text": payload, "\x1b[2J": payload} for payload in PAYLOADS.values()]
        Path("hostile.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        for source, kind in (("hostile.txt", "byte"), ("hostile.jsonl", "char")):
            with watched(folder, limit=False):
                for json_too in ((), ("--json",)):
                    out = f"weights/{kind}{len(json_too)}"
                    steps = [
                        ("prepare", source, "--tokenizer", kind, "--out", f"data/{kind}{len(json_too)}"),
                        (
                            "train",
                            "--data",
                            f"data/{kind}{len(json_too)}",
                            *SHAPE,
                            *HABITS,
                            "--max-steps",
                            6,
                            "--out",
                            out,
                            "--sample-every",
                            2,
                            "--sample-prompt",
                            PAYLOADS["clipboard"],
                        ),
                        ("sample", out, "--max-new-tokens", 60),
                        ("sample", f"{out}@last", "--num-samples", 2),
                        ("eval", out),
                        ("list",),
                        ("eval", out, "--filepath", source),
                    ]
                    for words in steps:
                        with tally.case(f"{kind}: {' '.join(map(str, words[:2]))} {json_too}") as case:
                            outcome = nnx(*words, *json_too)
                            said(outcome, case, bool(json_too))
                            assert outcome.code == 0, outcome.err
                    for line in Path(out, "samples.jsonl").read_bytes().splitlines():
                        assert isinstance(json.loads(line)["text"], str)
    return tally.result(9, "runs on hostile text")


# names of files


def file_names(full: bool) -> Result:
    """Data, runs and foreign checkpoints whose names are payloads, those that are no UTF-8 among them."""
    tally = Tally()
    with scene() as folder:
        names = {name: text.replace("\0", "0").replace("/", "-")[:60] for name, text in payloads(full, 2)}
        names = {name: text for name, text in names.items() if storable(text)}
        names["no UTF-8"] = os.fsdecode(b"\xff\xfe\x9b31m")
        for what, name in names.items():
            fresh(BYTE)
            text = Path(f"{name}.txt")
            text.write_text("hello world\n" * 100)
            foreign = Path(f"{name}.pth")
            foreign.write_bytes(b"no")
            Path("weights").mkdir(exist_ok=True)
            fresh(RUN).rename(Path("weights", name))
            lines = [
                ("prepare", text, "--out", f"data/{name}"),
                ("prepare", text, "--json"),
                ("prepare", text, "--tokenizer", foreign),
                ("list",),
                ("list", "--json"),
                ("sample", "--max-new-tokens", 1),
                ("sample", "--max-new-tokens", 1, "--json"),
                ("eval", f"weights/{name}"),
                ("eval", f"{name}@last", "--json"),
                ("eval", name, "--filepath", text),
                ("quantize", name, "--max-drop", 100, "--out", f"weights/{name}-8"),
                ("quantize", name, "--max-drop", 0.0),
                ("summarize", name),
                ("merge", name),
                ("import", foreign, "--model", "nyx"),
                ("sample", f"{name}@7"),
                ("train", "--resume", name, "--max-steps", 13),
                ("train", "--resume", name, "--max-steps", 14, "--json"),
                ("train", "--resume", name, "--dry-run"),
                ("train", "--data", f"data/{name}", "--dry-run"),
                (
                    "train",
                    "--data",
                    BYTE,
                    *SHAPE,
                    "--max-steps",
                    1,
                    "--compile",
                    "off",
                    "--out",
                    f"weights/{name}-2",
                    "--init-from",
                    name,
                    "--sample-every",
                    0,
                ),
                ("train", "--config", foreign, "--data", BYTE),
                ("sample", name, "--prompt-file", text, "--max-new-tokens", 1),
            ]
            for words in lines:
                with tally.case(
                    f"{what}: {words[0]} {words[1] if len(words) > 1 and words[1] != name else ''}"
                ) as case:
                    with watched(folder, limit=False):
                        outcome = nnx(*words)
                    said(outcome, case, "--json" in words)
                    quiet = words[0] in ("list", "eval") or "--resume" in words
                    assert outcome.code == 0 or not quiet or what == "markup link", f"{case}: {outcome.err}"
            for path in (Path("weights"), Path("data"), text, foreign):
                remove(path)
    return tally.result(9, "hostile file names")


def storable(name: str) -> bool:
    """Whether the disk takes a file of that name, in a folder too."""
    with contextlib.suppress(OSError, ValueError):
        Path(name + ".txt").write_bytes(b"")
        Path(name + ".txt").unlink()
        return len(os.fsencode(name)) < 200 and "/" not in name and name.strip(". \t\n") != ""
    return False


# inside of files


def inside_files(full: bool) -> Result:
    """Payloads as tensor names, keys and values of JSON and TOML, columns, members of archives."""
    tally = Tally()
    with scene() as folder:
        fresh(BYTE)
        for name, text in payloads(full, 2):
            for what, lines in planted(text):
                for words in lines:
                    with tally.case(f"{what} of {name}: {words[0]}") as case, watched(folder, limit=False):
                        said(nnx(*words), case, "--json" in words)
    return tally.result(9, "hostile text inside of files")


def planted(text: str) -> Iterator[tuple[str, list[tuple[Any, ...]]]]:
    """What was planted, and the commands that come across it."""
    run = fresh(RUN)
    rename_tensor(run / "model.safetensors", text)
    damage.sign(run)
    yield "tensor name", [("sample", RUN), ("eval", RUN)]
    fresh("foreign/seed.safetensors")
    rename_tensor(Path("foreign/seed.safetensors"), text)
    yield "foreign tensor name", [("import", "foreign/seed.safetensors", "--model", "nyx", "--out", "made")]
    for keys in (
        ("model", "name"),
        ("model", "size"),
        ("versions", "torch"),
        ("data", "folder"),
        ("data", "fingerprint"),
        ("quantization",),
        ("training", "optimizer"),
        ("format",),
        ("init_from",),
        ("model", text),
    ):
        run = fresh(RUN)
        config = json.loads((run / "config.json").read_bytes())
        inner = config
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = text
        (run / "config.json").write_text(json.dumps(config))
        damage.sign(run)
        commands = [("list",), ("summarize", RUN), ("sample", RUN, "--max-new-tokens", 1), ("eval", RUN)]
        yield f"config.json {keys[0]}", [*commands, ("train", "--resume", RUN, "--dry-run")]
    for key in ("status", "command", "device", "best_val_bits_per_byte"):
        run = fresh(RUN)
        status = json.loads((run / "run.json").read_bytes()) | {key: text}
        (run / "run.json").write_text(json.dumps(status))
        yield f"run.json {key}", [("list",), ("list", "--json"), ("train", "--resume", RUN)]
    run = fresh(RUN)
    manifest = json.loads((run / "manifest.json").read_bytes())
    (run / "manifest.json").write_text(json.dumps({"format": text, "files": manifest["files"] | {text: text}}))
    yield "manifest.json", [("sample", RUN, "--max-new-tokens", 1)]
    fresh(RUN)
    for key in ("format", "dtype", "tokenizer"):
        path = fresh(BYTE) / "meta.json"
        path.write_text(json.dumps(json.loads(path.read_bytes()) | {key: text}))
        yield f"meta.json {key}", [("train", "--data", BYTE, "--dry-run"), ("eval", RUN)]
    path = fresh(BYTE) / "tokenizer.json"
    content = json.loads(path.read_bytes())
    content["model"] = content["model"] | {"type": text, "vocab": {text: 0}}
    path.write_text(json.dumps(content))
    yield "tokenizer.json", [("train", "--data", BYTE, "--dry-run"), ("prepare", "words.txt", "--tokenizer", path)]
    fresh(BYTE)
    Path("settings.toml").write_text(f"{json.dumps(printable_or_escaped(text))} = 1\n", encoding="utf-8")
    yield "TOML key", [("train", "--config", "settings.toml", "--data", BYTE, "--dry-run")]
    Path("settings.toml").write_text(f"model = {json.dumps(printable_or_escaped(text))}\n", encoding="utf-8")
    yield "TOML value", [("train", "--config", "settings.toml", "--data", BYTE, "--dry-run")]
    Path("table.csv").write_bytes(f'"{text}",b\n1,2\n'.encode(errors="surrogatepass"))
    yield "column", [("prepare", "table.csv", "--out", "data/x")]
    Path("rows.jsonl").write_text(
        json.dumps({text: 1}) + "\n" + text.encode(errors="replace").decode() + "\n", encoding="utf-8"
    )
    yield (
        "rows",
        [
            ("prepare", "rows.jsonl", "--out", "data/x"),
            ("prepare", "rows.jsonl", "--errors", "strict", "--out", "data/x"),
            ("prepare", "rows.jsonl", "--text-key", text, "--out", "data/x"),
        ],
    )
    with zipfile.ZipFile("all.zip", "w") as archive:
        archive.writestr(f"{well_formed(text)[:200]}.jsonl", "{no")
        archive.writestr(f"{well_formed(text)[:200]}.txt", "\x7fELF")
    yield (
        "members",
        [("prepare", "all.zip", "--out", "data/x"), ("prepare", "all.zip", "--errors", "strict", "--out", "data/x")],
    )
    for path in ("made", "data/x"):
        remove(Path(path))


def printable_or_escaped(text: str) -> str:
    """What a TOML string can hold: no lone surrogates."""
    return well_formed(text)


def rename_tensor(path: Path, text: str) -> None:
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    name = next(name for name in header if name != "__metadata__")
    header[well_formed(text)] = header.pop(name)
    head = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + data[8 + length :])


# real processes


def processes(full: bool) -> Result:
    """The real command with bytes that are no UTF-8 on its line, in several locales."""
    tally = Tally()
    with scene():
        fresh(BYTE), fresh(RUN)
        bad = b"\xff\x9b31m\x1b]52;c;aGk=\x07"
        Path(os.fsdecode(bad) + ".txt").write_text("hello world\n" * 50)
        lines = [
            [b"sample", b"weights/run", b"--prompt", bad, b"--max-new-tokens", b"2"],
            [b"prepare", bad + b".txt", b"--out", b"data/" + bad, b"--json"],
            [b"sample", bad, b"--debug"],
            [b"--" + bad],
            [b"train", b"--model", bad],
        ]
        locales = ({}, {"LC_ALL": "C"}, {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})
        for environment in locales if full else locales[2:]:
            for words in lines if full else lines[:1] + lines[3:4]:
                with tally.case(f"{words[0]} {environment}{' --debug' * (b'--debug' in words)}") as case:
                    own = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
                    done = subprocess.run(
                        [sys.executable, "-m", "nnx_cli", *words], capture_output=True, env=own, timeout=120
                    )
                    outcome = Outcome(done.returncode, done.stdout, done.stderr)
                    said(outcome, case, b"--json" in words)
                    remove(Path("data") / os.fsdecode(bad))
    return tally.result(9, "real processes with bytes that are no text")


PARTS = {
    "printable": shown,
    "hostile arguments": arguments,
    "hostile model output": model_output,
    "hostile training text": trained_on,
    "hostile file names": file_names,
    "hostile text in files": inside_files,
    "hostile bytes": processes,
}


def test_there_are_forty_payloads():
    assert (
        len(PAYLOADS) >= 40 and sum(bool(live_controls(well_formed(text).encode())) for text in PAYLOADS.values()) >= 30
    )


@pytest.mark.parametrize("name", PARTS)
def test_hostile(name):
    check(PARTS[name](False))
