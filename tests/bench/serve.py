"""What decoding together is worth: total tokens a second of `nnx serve` for one client and for sixteen.

    python tests/bench/serve.py [--model llama] [--size small] [--device cpu] [--clients 1,4,16] [--tokens 200]
                                [--rounds 3] [--markdown FILE]

The model is made by one step of training. Each client asks for one answer after the other, streamed, with
a seed of its own; rounds of few and of many clients come in turn. Run it on a quiet machine.
"""

import argparse
import datetime
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import torch

from nnx_cli.system.machine import cpu_model

PROMPT = "The cat sat on the mat"


def nnx(*words: object) -> list[str]:
    """A command of ours."""
    return [sys.executable, "-m", "nnx_cli", *map(str, words)]


def one_answer(url: str, seed: int, n_tokens: int) -> int:
    """Tokens of one streamed answer."""
    asked = {"prompt": PROMPT, "max_tokens": n_tokens, "seed": seed, "temperature": 1.0, "stream": True}
    asked["stream_options"] = {"include_usage": True}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(asked).encode())
    with urllib.request.urlopen(request, timeout=600) as response:
        events = [line.removeprefix(b"data: ") for line in response if line.startswith(b"data: {")]
    return int(json.loads(events[-1])["usage"]["completion_tokens"])


def tokens_per_s(url: str, n_clients: int, n_tokens: int, answers: int = 2) -> float:
    """Total speed of so many clients, each of which asks for some answers."""
    counts: list[int] = []

    def work(number: int) -> None:
        counts.extend(one_answer(url, 100 * number + nth, n_tokens) for nth in range(answers))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(n_clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(counts) == n_clients * answers
    return sum(counts) / (time.perf_counter() - started)


def main() -> None:
    """Measure, and print the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama")
    parser.add_argument("--size", default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clients", default="1,4,16")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    clients = [int(word) for word in options.clients.split(",")]
    found: dict[int, list[float]] = {n: [] for n in clients}
    with tempfile.TemporaryDirectory() as work:
        train = ["--model", options.model, "--size", options.size, "--device", options.device, "--max-steps", 1]
        quick = [
            "--batch-size",
            1,
            "--grad-accum",
            1,
            "--sample-every",
            0,
            "--compile",
            "off",
            "--out",
            "model",
            "--quiet",
        ]
        subprocess.run(nnx("train", *train, *quick), cwd=work, check=True, stdout=subprocess.DEVNULL)
        command = nnx("serve", "model", "--port", 0, "--device", options.device)
        with subprocess.Popen(command, cwd=work, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            address = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())
            assert address is not None
            tokens_per_s(address[0], max(clients), 20)  # once for what is made at the first use
            for _ in range(options.rounds):
                for n in clients:
                    found[n].append(tokens_per_s(address[0], n, options.tokens))
                    print(json.dumps({"clients": n, "tokens_per_s": found[n][-1]}), flush=True)
            process.terminate()
    device = cpu_model() if options.device == "cpu" else torch.cuda.get_device_name()
    lines = [
        f"`{options.model}` `{options.size}`, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {datetime.date.today().isoformat()}; {options.tokens} tokens an answer.",
        "",
        "| clients | total tokens/s | times one client |",
        "| ---: | ---: | ---: |",
    ]
    one = statistics.mean(found[clients[0]])
    lines += [f"| {n} | {statistics.mean(v):,.0f} | {statistics.mean(v) / one:.1f} |" for n, v in found.items()]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.markdown:
        options.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
