"""Whatever may take long says how far it is: here in plain lines, as a pipe gets them."""

import re

import pytest

from nnx_cli.commands import _depth
from nnx_cli.console import progress
from nnx_cli.data import prepare

SMALL = "--n-layers 1 --dim 32 --n-heads 2 --batch-size 2 --grad-accum 1 --threads 1 --compile off --device cpu".split()
SHARE, BYTES = r"(\d+) %(, .* left)?", r"\d+( of \d+)? MB(, [\d,]+ MB/s)?(, .* left)?"


@pytest.fixture
def lines(nnx, monkeypatch):
    """The lines on stderr of a command that says where it stands as often as it can."""
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0)
    monkeypatch.setattr(_depth, "N_SAMPLES", 2)
    monkeypatch.setattr(_depth, "SAMPLE_TOKENS", 60)
    monkeypatch.setattr(prepare, "BLOCK_BYTES", 1000)

    def run(*words):
        done = nnx(*words)
        assert done.exit_code == 0, done.stderr
        return done.stderr.splitlines()

    return run


def told(lines, what, form=SHARE):
    """What lines say of a kind of work."""
    found = [match for line in lines if (match := re.fullmatch(f"{re.escape(what)} {form}", line))]
    assert found, lines
    return found


def test_prepare(lines, text_file):
    shown = lines("prepare", text_file, "--tokenizer", "char", "--out", "data/x")
    for what in ("training the tokenizer", "preparing"):
        told(shown, what, BYTES)
    assert told(shown, "looking at the text")[-1][1] == "100"


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["quantize"], ["measuring", "decoding"]),
        (["eval"], ["measuring"]),
        (["eval", "--context", "2x"], ["measuring", "reading longer contexts"]),
        (["eval", "--memorised"], ["drawing samples"]),
    ],
    ids=str,
)
def test_work_on_a_model(lines, run, words, what):
    shown = lines(*words)
    assert all(0 <= int(match[1]) <= 100 for each in what for match in told(shown, each))
    assert lines(*words, "--quiet", *(["--out", "w"] if words == ["quantize"] else [])) == []


def test_reading_once_more_by_position(lines, token_path, run):
    lines("train", "--data", token_path, *SMALL, "--seq-len", 128, "--max-steps", 2, "--out", "r")
    assert told(lines("eval", "r", "--by-position"), "reading the same tokens with less before them")[-1][1] == "100"
