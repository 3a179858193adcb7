"""Ways to damage a file: seeded, each with a name, each a function of the file's path."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Damage = Callable[[Path], None]

HOSTILE: tuple[Any, ...] = (
    None,
    -1,
    0,
    1,
    2**31,
    2**63,
    10**400,
    1e308,
    0.5,
    True,
    "",
    "x",
    "../../x",
    "/etc/passwd",
    "\x1b]52;c;aGk=\x07",
    "\udcff",
    [],
    {},
    [[]],
    {"a": {"b": []}},
    "1" * 10_000,
    ["../x"],
    {"__class__": "os.system"},
    -(2**70),
    "NaN",
)
DEEP = 100_000
TYPES = ("F64", "F32", "F16", "BF16", "I32", "I8", "U8", "BOOL", "U64", "F8_E4M3", "C64", "x", "", 3, None, "F4")
NESTED = '{"x":' * DEEP + "1" + "}" * DEEP


# whatever the file holds


def any_bytes(draw: random.Random) -> Iterator[tuple[str, Damage]]:
    """Endless damage to the bytes of a file, each certain to change them."""
    while True:
        seed = draw.getrandbits(32)
        kind = draw.choice(("flip", "flip", "flip", "truncate", "extend", "zeros", "ones", "move", "double", "burst"))
        yield f"{kind} {seed}", changed(kind, seed)


def changed(kind: str, seed: int) -> Damage:
    def apply(path: Path) -> None:
        draw = random.Random(seed)
        data = path.read_bytes()
        for _ in range(50):
            new = change_bytes(kind, data, draw)
            if new != data:
                break
        else:
            new = data + b"\0"
        path.write_bytes(new)

    return apply


def change_bytes(kind: str, data: bytes, draw: random.Random) -> bytes:
    n = max(1, len(data))
    at = draw.randrange(n)
    length = min(draw.choice((1, 8, 64, 512, 4096)), n)
    if kind == "flip":
        return data[:at] + bytes([(data[at] if data else 0) ^ (1 << draw.randrange(8))]) + data[at + 1 :]
    if kind == "truncate":
        return data[: draw.choice((0, 1, 7, at, n // 2, n - 1))]
    if kind == "extend":
        return data + draw.choice((b"\0", draw.randbytes(length), bytes(4096), data))
    if kind == "zeros":
        return data[:at] + bytes(len(data[at : at + length])) + data[at + length :]
    if kind == "ones":
        return data[:at] + b"\xff" * len(data[at : at + length]) + data[at + length :]
    if kind == "move":
        other = draw.randrange(n)
        piece = data[at : at + length]
        return data[:other] + piece + data[other + len(piece) :]
    if kind == "double":
        return data[:at] + data[max(0, at - length) :]
    return data[:at] + draw.randbytes(length) + data[at + length :]


def any_place(outside: Path) -> Iterator[tuple[str, Damage]]:
    """What may stand in place of a file. `outside` is a folder that the file's owner has no business in."""

    def missing(path: Path) -> None:
        path.unlink()

    def folder(path: Path) -> None:
        path.unlink()
        path.mkdir()

    def pipe(path: Path) -> None:
        path.unlink()
        os.mkfifo(path)

    def link(target: str) -> Damage:
        def apply(path: Path) -> None:
            path.unlink()
            path.symlink_to(target)

        return apply

    def linked_copy(path: Path) -> None:
        copy = outside / path.name
        shutil.copyfile(path, copy)
        path.unlink()
        path.symlink_to(copy)

    def sparse(path: Path) -> None:
        with open(path, "r+b") as file:
            file.truncate(2**25)

    yield "missing", missing
    yield "folder", folder
    if os.name == "posix":
        yield "pipe", pipe
        yield "link to itself", lambda path: link(path.name)(path)
        yield "link to nothing", link("../../../nothing")
        yield "link to /dev/zero", link("/dev/zero")
        yield "link to /etc/passwd", link("/etc/passwd")
        yield "link to an equal file", linked_copy
        yield "sparse", sparse


# JSON


def any_json(draw: random.Random, text: str) -> Iterator[tuple[str, Damage]]:
    """Endless damage to a JSON file that holds `text`."""
    fixed = {
        "empty": b"",
        "no JSON": b"{",
        "a list": b"[]",
        "null": b"null",
        "a number": b"3",
        "NaN": b'{"format": NaN}',
        "deep list": b"[" * DEEP,
        "deep object": NESTED.encode(),
        "long number": b"9" * 5000,
        "no UTF-8": b'{"a": "\xff\xfe"}',
        "zeros": bytes(100),
        "UTF-16": text.encode("utf-16"),
        "bom": b"\xef\xbb\xbf",
        "a pickle": b"\x80\x04cos\nsystem\n.",
        "doubled": text.encode() * 2,
        "a format of the future": b'{"format": 2}',
        "cut": text.encode()[: len(text) // 2],
    }
    for name, content in fixed.items():
        yield name, overwrite(content)
    while True:
        seed = draw.getrandbits(32)
        yield f"edit {seed}", edited(text, seed)


def overwrite(content: bytes) -> Damage:
    def apply(path: Path) -> None:
        path.write_bytes(content)

    return apply


def edited(text: str, seed: int) -> Damage:
    """One change to the value: a leaf, a key, a key twice, a key more or less."""

    def apply(path: Path) -> None:
        draw = random.Random(seed)
        for _ in range(100):
            value = json.loads(text)
            twice = change_value(value, draw)
            new = json.dumps(value, indent=2)
            if twice:  # the last of two equal keys counts in Python, the first elsewhere
                new = (
                    new[: new.rindex("}")].rstrip()
                    + f",\n  {json.dumps(twice)}: {json.dumps(draw.choice(HOSTILE))}\n}}"
                )
            if json.loads(new) != json.loads(text):
                break
        path.write_bytes(new.encode())

    return apply


def change_value(value: Any, draw: random.Random) -> str | None:
    """Change something somewhere inside `value`; returns a key that should stand there twice."""
    places = list(walk(value))
    holder, key = draw.choice(places)
    kind = draw.choice(("leaf", "leaf", "leaf", "leaf", "delete", "rename", "add", "twice"))
    if kind == "delete":
        del holder[key]
    elif kind == "rename" and isinstance(holder, dict):
        holder[f"{key}x"] = holder.pop(key)
    elif kind == "add" and isinstance(holder, dict):
        holder[draw.choice(("__class__", "zz", "../x", "\x1b[2J"))] = draw.choice(HOSTILE)
    elif kind == "twice" and isinstance(value, dict):
        return draw.choice(list(value))
    else:
        holder[key] = draw.choice(HOSTILE)
    return None


def walk(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything inside a JSON value; of long lists the beginning."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:5]) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        if not isinstance(inner, dict) or len(inner) < 1000:
            yield from walk(inner)


# safetensors


def any_tensors(draw: random.Random) -> Iterator[tuple[str, Damage]]:
    """Endless damage to a safetensors file: lying headers first, then numbers."""
    for length in (2**62, 2**64 - 1, 2**63, 0, 1, 10**8, 10**11):
        yield f"header of {length}", header_length(length)
    while True:
        seed = draw.getrandbits(32)
        kind = draw.choice(tuple(HEADERS))
        yield f"{kind} {seed}", lying(kind, seed)


def header_length(length: int) -> Damage:
    def apply(path: Path) -> None:
        path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])

    return apply


def lying(kind: str, seed: int) -> Damage:
    def apply(path: Path) -> None:
        data = path.read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        header, body = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
        HEADERS[kind](header, body, random.Random(seed))
        head = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(head)) + head + bytes(body))

    return apply


def pick(header: dict[str, Any], draw: random.Random) -> tuple[str, dict[str, Any]]:
    name = draw.choice([name for name in header if name != "__metadata__"])
    return name, header[name]


def lie_shape(header: dict, body: bytearray, draw: random.Random) -> None:
    pick(header, draw)[1]["shape"] = draw.choice(
        ([2**62, 2**62], [2**40], [0], [], [-1], [1, 2, 3], ["x"], None, [1.5], [10**30], [25 * 10**9])
    )


def lie_type(header: dict, body: bytearray, draw: random.Random) -> None:
    entry = pick(header, draw)[1]
    alike = (
        ("F16", "BF16") if entry["dtype"] in ("F16", "BF16") else (entry["dtype"],)
    )  # both may stand in a small model
    entry["dtype"] = draw.choice([name for name in TYPES if name not in alike])


def lie_offsets(header: dict, body: bytearray, draw: random.Random) -> None:
    begin, end = pick(header, draw)[1]["data_offsets"]
    pick(header, draw)[1]["data_offsets"] = draw.choice(
        (
            [begin, end + 4],
            [begin + 4, end],
            [end, begin],
            [0, 2**62],
            [-4, end],
            [0, 100 * 2**30],
            [2**63, 2**64],
            [0],
            None,
        )
    )


def swap_tensors(header: dict, body: bytearray, draw: random.Random) -> None:
    """Two tensors of unlike shapes change places; alike ones are another model's good right."""
    names = [name for name in header if name != "__metadata__"]
    a = draw.choice(names)
    others = [name for name in names if header[name]["shape"] != header[a]["shape"]]
    b = draw.choice(others or names)
    header[a], header[b] = header[b], header[a]


def rename_tensor(header: dict, body: bytearray, draw: random.Random) -> None:
    name, _ = pick(header, draw)
    new = draw.choice(
        ("../../x", "/etc/passwd", "\x1b[2J", "\u202etxt", "", "x" * 10_000, "[/foo]", "a\0b", name + "x")
    )
    header[new] = header.pop(name)


def drop_tensor(header: dict, body: bytearray, draw: random.Random) -> None:
    del header[pick(header, draw)[0]]


def more_tensors(header: dict, body: bytearray, draw: random.Random) -> None:
    at = len(body)
    body += bytes(64)
    header["extra"] = {"dtype": "F32", "shape": [16], "data_offsets": [at, at + 64]}


def not_finite(header: dict, body: bytearray, draw: random.Random) -> None:
    """A number becomes NaN or infinite, in a tensor of floats."""
    floats = {"F32": b"\x00\x00\xc0\x7f", "F16": b"\x00\x7e", "BF16": b"\xc0\x7f", "F64": b"\0\0\0\0\0\0\xf0\x7f"}
    names = [name for name in header if name != "__metadata__" and header[name]["dtype"] in floats]
    entry = header[draw.choice(names)]
    begin, end = entry["data_offsets"]
    word = floats[entry["dtype"]]
    at = begin + draw.randrange((end - begin) // len(word)) * len(word)
    body[at : at + len(word)] = word


HEADERS = {
    "shape": lie_shape,
    "type": lie_type,
    "offsets": lie_offsets,
    "swap": swap_tensors,
    "rename": rename_tensor,
    "drop": drop_tensor,
    "more": more_tensors,
    "not finite": not_finite,
}


def sign(folder: Path) -> None:
    """Write the digests of what a folder now holds into its manifest: damage by somebody who knows how it is made."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    for name in manifest["files"]:
        if (folder / name).is_file():
            manifest["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
