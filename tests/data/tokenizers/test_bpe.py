"""Vocabularies that are trained here."""

import os
import signal
import sys
import threading
import time

import pytest

from nnx_cli.data.tokenizers import _trainer, bpe
from nnx_cli.errors import NnxError

pytestmark = pytest.mark.skipif(not bpe.is_installed(), reason="needs rustbpe")


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
def test_ctrl_c_ends_training_at_once(monkeypatch):
    """Also while rustbpe does not return."""
    monkeypatch.setattr(_trainer, "START", "import time; time.sleep(30)")
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        _trainer.find_tokens(["text"], 300, r"\w+")
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("start", "why"), [("raise OSError('broken')", "broken"), ("import os; os._exit(3)", "code 3")]
)
def test_a_process_that_fails_says_why(monkeypatch, start, why):
    monkeypatch.setattr(_trainer, "START", start)
    with pytest.raises(NnxError, match=f"training the vocabulary failed: .*{why}"):
        _trainer.find_tokens(["text"], 300, r"\w+")


def test_text_in_any_script_comes_back():
    sample = ["über 小猫 и кошка\n" * 20, "\x00\u2028 café\n" * 20]
    tokens = _trainer.find_tokens(sample, 280, bpe.PATTERNS["llama-bpe"])
    assert tokens[:256] == [bytes([b]) for b in range(256)] and len(tokens) == 280
    assert all(token in "".join(sample).encode() for token in tokens[256:])
