"""Tokens of a vocabulary, found by rustbpe in a process of its own: it hears no signal before it has found them all."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import nnx_cli
from nnx_cli.errors import NnxError

START = "import sys; sys.path.append(sys.argv[1]); from nnx_cli.data.tokenizers._trainer import main; main()"
PACKAGES = Path(nnx_cli.__file__).parents[1]
BUFFER = 64  # blocks of text at a time


def find_tokens(sample: Sequence[str], n_tokens: int, pattern: str) -> list[bytes]:
    """Up to `n_tokens` tokens in the order of merging, single bytes first. Ctrl-C ends it. Raises NnxError where
    it fails."""
    asked = json.dumps({"sample": list(sample), "n_tokens": n_tokens, "pattern": pattern}).encode()
    done = subprocess.run([sys.executable, "-P", "-c", START, str(PACKAGES)], input=asked, capture_output=True)
    if done.returncode:
        why = done.stderr.decode(errors="replace").strip().splitlines() or [f"it ended with code {done.returncode}"]
        raise NnxError(f"training the vocabulary failed: {why[-1]}")
    return [bytes.fromhex(token) for token in json.loads(done.stdout)]


def main() -> None:
    """What that process runs: a request on standard input, the tokens in hexadecimal digits on standard output."""
    import rustbpe

    asked = json.loads(sys.stdin.buffer.read())
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(asked["sample"]), asked["n_tokens"], buffer_size=BUFFER, pattern=asked["pattern"])
    json.dump([bytes(token).hex() for token, _ in trainer.get_mergeable_ranks()], sys.stdout)
