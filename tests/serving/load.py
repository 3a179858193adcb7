"""Many clients at once, and not all of them well-behaved: what a server answers them, and what that costs it.

    python tests/serving/load.py [--clients 64] [--seconds 300] [-- MODEL AND OPTIONS OF nnx serve]

Clients ask for completions, in one piece or streamed, leave in the middle, send what is no JSON, bodies of 10 MB and
more than may be asked for. Every status has to be the documented one, all rows are free in the end, and the server has
no more memory in the last quarter of the time than in the first half.
"""

import argparse
import json
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where tests import each other from

from serving.client import Client

MOST_TOKENS = 40
BIG = b'{"prompt": "' + b"x" * 10_000_000 + b'"}'


def whole(client: Client, draw: random.Random) -> str:
    """Ask, and wait for all of it."""
    n, tokens = draw.randint(1, 3), draw.randint(1, MOST_TOKENS)
    answer = client.write(
        prompt="the cat " * draw.randint(0, 6), max_tokens=tokens, n=n, logprobs=draw.choice([None, 2])
    )
    if answer.status == 200:
        assert len(answer.json["choices"]) == n
    return check(answer.status, {200, 429})


def stream(client: Client, draw: random.Random) -> str:
    """Ask for a stream, and read it to its end."""
    answer = client.write(prompt="a", max_tokens=draw.randint(1, MOST_TOKENS), stream=True)
    if answer.status == 200:
        assert answer.events[-1]["choices"][0]["finish_reason"] in ("length", "stop")
    return check(answer.status, {200, 429})


def leave(client: Client, draw: random.Random) -> str:
    """Ask for much, and go away: before the answer, or in the middle of it."""
    body = json.dumps(
        {"prompt": "a", "max_tokens": 1000, "stream": draw.random() < 0.7, "n": draw.randint(1, 3)}
    ).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection((client.host, client.port)) as connection:
        connection.sendall((head + body)[: draw.choice([10, len(head), len(head) + 5, len(head) + len(body)])])
        connection.settimeout(draw.random())
        with suppress(TimeoutError):
            connection.recv(draw.choice([1, 500]))
    return "left"


def bad(client: Client, draw: random.Random) -> str:
    """Send what is no request."""
    body, path, status = draw.choice(
        [
            (b"{", "/v1/completions", 422),
            (b"[" * 10_000, "/v1/completions", 422),
            (b'{"max_tokens": 10000000}', "/v1/completions", 422),
            (b'{"model": "other"}', "/v1/completions", 404),
            (b"{}", "/nothing", 404),
        ]
    )
    return check(client.ask(path, body).status, {status})


def big(client: Client, draw: random.Random) -> str:
    """Send far too much."""
    return check(client.ask("/v1/completions", BIG).status, {413})


ACTIONS = {whole: 8, stream: 8, leave: 4, bad: 4, big: 0.2}


def check(status: int, expected: set[int]) -> str:
    """The status, which has to be one of those."""
    assert status in expected, (status, expected)
    return str(status)


def memory_bytes(pid: int) -> int:
    """What a process has in memory."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(re.search(r"VmRSS:\s+(\d+)", status)[1])


def run_load(client: Client, pid: int, n_clients: int, seconds: float) -> dict:
    """Let clients ask for so long; returns what came of it: counts of answers, faults, and memory over time."""
    ends, counts, faults, memory = time.monotonic() + seconds, Counter(), [], []

    def work(seed: int) -> None:
        draw = random.Random(seed)
        while time.monotonic() < ends and not faults:
            action = draw.choices(list(ACTIONS), list(ACTIONS.values()))[0]
            try:
                counts[f"{action.__name__} {action(client, draw)}"] += 1
            except Exception as error:
                faults.append(f"{action.__name__}: {error!r}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(n_clients)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        memory.append(memory_bytes(pid))
        time.sleep(min(1.0, seconds / 20))
    for _ in range(300):
        health = client.ask("/health").json
        if not health["answering"] and not health["waiting"]:
            break
        time.sleep(0.1)
    return {"answers": dict(counts), "faults": faults, "memory_bytes": memory, "health": health}


def growth(memory: list[int]) -> float:
    """How much more memory there is in the last quarter of the time than in the first half: the highest of each."""
    quarter = len(memory) // 4
    return max(memory[-quarter:]) / max(memory[: 2 * quarter]) - 1.0


def main() -> None:
    """Start a server, and load it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("words", nargs="*", help="of nnx serve, after --")
    options = parser.parse_args()
    command = [sys.executable, "-m", "nnx_cli", "serve", *options.words, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port = int(re.search(r"http://127\.0\.0\.1:(\d+)", process.stdout.readline())[1])
        found = run_load(Client("127.0.0.1", port), process.pid, options.clients, options.seconds)
        process.terminate()
    found["growth"] = growth(found.pop("memory_bytes"))
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
