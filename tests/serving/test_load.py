"""Many clients, some of which misbehave, at the real command."""

import re
import subprocess
import sys

import pytest
from serving.client import Client
from serving.load import growth, run_load

pytest.importorskip("fastapi", reason="nnx-cli[serve] is not installed")
SECONDS = 7


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_every_answer_is_a_documented_one_and_nothing_is_lost(run):
    command = [sys.executable, "-m", "nnx_cli", "serve", "words", "--port", "0", "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        port = int(re.search(r"http://127\.0\.0\.1:(\d+)", process.stdout.readline())[1])
        try:
            found = run_load(Client("127.0.0.1", port), process.pid, 32, SECONDS)
        finally:
            process.terminate()
        complaints = process.stderr.read()
    assert found["faults"] == [] and complaints == ""
    assert found["health"]["status"] == "ok" and not found["health"]["answering"] and not found["health"]["waiting"]
    answered = found["answers"]
    for kind in ("whole 200", "stream 200", "leave left", "bad 422", "bad 404"):
        assert answered.get(kind, 0) > 3, answered
    assert growth(found["memory_bytes"]) < 0.02
