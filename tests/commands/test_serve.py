"""`nnx serve` on the command line."""

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

needs_extra = pytest.mark.skipif(
    importlib.util.find_spec("fastapi") is None or importlib.util.find_spec("uvicorn") is None,
    reason="nnx-cli[serve] is not installed",
)


@needs_extra
@pytest.mark.parametrize(
    ("code", "words", "message"),
    [
        (2, ["--host", "0.0.0.0"], "--host 0.0.0.0 lets other machines ask"),
        (2, ["--host", "::"], "lets other machines ask"),
        (2, ["--host", "example.org"], "lets other machines ask"),
        (2, ["--host", "0.0.0.0", "--api-key", "k"], "lets other machines ask"),
        (2, ["--host", "0.0.0.0", "--allow-remote"], "needs a key"),
        (2, ["--port", 65536], "--port is 65536"),
        (2, ["--queue", -1], "--queue is -1"),
        (2, ["--max-new-tokens", 0], "--max-new-tokens is 0"),
        (2, ["--allow-origin", "example.org"], "must be scheme and host"),
        (5, ["nothing"], "nothing"),
        (8, ["--host", "no such host.invalid", "--allow-remote", "--api-key", "k"], "cannot listen at"),
    ],
    ids=str,
)
def test_what_is_refused(refused, run, code, words, message):
    refused(code, message, "serve", *words)


@needs_extra
def test_a_port_in_use(refused, run):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        refused(8, "port", "serve", "--port", taken.getsockname()[1])


def test_without_the_extra(refused, run, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "uvicorn" else find(name, *rest)
    )
    result = refused(7, "serve needs uvicorn", "serve")
    assert "pip install" in result.stderr and "nnx-cli[serve]" in result.stderr


@pytest.fixture
def process(run):
    """The command at work on weights/words: process(words) returns it and its address."""
    if os.name != "posix":
        pytest.skip("processes are forked as POSIX does")
    from tests.reliability.processes import Command, Setting

    started = []

    def start(*words):
        said = Path(f"said-{len(started)}").resolve()
        said.touch()
        line = ["serve", "words", "--port", 0, "--device", "cpu", *words]
        started.append(Command(Path.cwd(), *line, setting=Setting(stdout=str(said))))
        while not (shown := said.read_text()).endswith("\n"):
            assert started[-1].running(), started[-1].output
            time.sleep(0.02)
        return started[-1], re.search(r"http://127\.0\.0\.1:\d+", shown)[0]

    yield start
    for each in started:
        each.send(signal.SIGKILL)
        each.process.join()


def post(url, **asked):
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(asked).encode())
    return urllib.request.urlopen(request, timeout=60)


@needs_extra
def test_what_is_served_is_what_sample_writes(process, nnx):
    _, url = process()
    served = json.load(post(url, prompt="the cat", max_tokens=40, temperature=0))["choices"][0]["text"]
    words = "sample words --prompt".split()
    sampled = json.loads(nnx(*words, "the cat", "--greedy", "--max-new-tokens", 40, "--json").stdout)
    assert served == sampled["samples"][0]["text"]


@needs_extra
@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_answers_properly(process, number):
    command, url = process("--max-new-tokens", "10000000")
    answer = post(url, prompt="the", max_tokens=10_000_000, stream=True)
    assert answer.readline().startswith(b"data: ")
    started = time.monotonic()
    command.send(number)
    rest = answer.read().decode()
    assert '"finish_reason": "length"' in rest and rest.endswith("data: [DONE]\n\n")
    assert command.wait(20) == 130 and time.monotonic() - started < 10
    assert command.output == ""
    with pytest.raises(urllib.error.URLError):
        post(url, prompt="a")


@needs_extra
@pytest.mark.parametrize("left", ["model.safetensors", "config.json", "manifest.json"])
def test_a_model_that_is_being_written(refused, run, left):
    """Nothing of it is whole: the command says so, and leaves the port alone."""
    shutil.rmtree(run.checkpoints)
    path = run.folder / left
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refused(5, "weights", "serve", "words", "--port", 0)
