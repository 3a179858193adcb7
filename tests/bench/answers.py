"""Questions of a small grammar: how many of those that it has not seen does a model answer?

    python tests/bench/answers.py [--asked 200] [--pairs 4000] [OPTIONS OF nnx train ...]

Without options of its own: a `nano` model, after a minute on two CPU cores. A right answer is the same word for word.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from nnx_cli.config import SampleConfig
from nnx_cli.data.conversations import Message, template_of
from nnx_cli.inference.generate import generate
from nnx_cli.runs.find import find_model
from nnx_cli.runs.load import load_model

ANIMALS, COLOURS = "cat dog fox owl hen pig cow bat".split(), "red blue green black white grey".split()
NAMES = "Tom Ann Bob Eve Max Ida Leo Zoe".split()
A_MINUTE = "--size nano --max-time 1m --threads 2 --device cpu".split()


def question(draw: random.Random) -> tuple[str, str]:
    """A question of the grammar, and the answer."""
    (a, b), (c, d), (n, m) = draw.sample(ANIMALS, 2), draw.sample(COLOURS, 2), draw.sample(NAMES, 2)
    asked, answer = draw.choice(
        [
            (f"What colour is the {b}?", f"The {b} is {d}."),
            (f"Who has the {a}?", f"{n} has the {a}."),
            (f"What does {m} have?", f"{m} has a {d} {b}."),
        ]
    )
    return f"{n} has a {c} {a} and {m} has a {d} {b}. {asked}", answer


def different(draw: random.Random, n: int, seen: dict[str, str]) -> dict[str, str]:
    """So many questions that are not among those seen, with their answers."""
    found: dict[str, str] = {}
    while len(found) < n:
        asked, answer = question(draw)
        if asked not in seen:
            found[asked] = answer
    return found


def write_rows(pairs: dict[str, str], path: Path) -> None:
    """The conversations that a model learns from."""
    rows = [{"messages": [dict(role="user", content=q), dict(role="assistant", content=a)]} for q, a in pairs.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def share_answered(run: str, pairs: dict[str, str]) -> float:
    """The share of questions that a run answers right."""
    ref = find_model(run)
    template, model = template_of(ref.tokenizer), load_model(ref, torch.device("cpu"), "fp32")
    prompts = [template.prompt([Message("user", asked)]) for asked in pairs]
    found = generate(model, ref.tokenizer, prompts, SampleConfig(greedy=True, max_new_tokens=40)).samples
    return sum(sample.text == answer for sample, answer in zip(found, pairs.values(), strict=True)) / len(pairs)


def main() -> None:
    """Train with the real command, and ask."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--asked", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=4000)
    options, words = parser.parse_known_args()
    draw = random.Random(0)
    learned = different(draw, options.pairs, {})
    held_out = different(draw, options.asked, learned)
    with tempfile.TemporaryDirectory() as folder:
        write_rows(learned, Path(folder, "qa.jsonl"))
        command = ["train", "--filepath", "qa.jsonl", "--out", "qa", *(words or A_MINUTE)]
        subprocess.run([sys.executable, "-m", "nnx_cli", *command], cwd=folder, check=True)
        share = share_answered(str(Path(folder, "qa")), held_out)
    print(f"{share:.1%} of {options.asked} questions that it has not seen")


if __name__ == "__main__":
    main()
