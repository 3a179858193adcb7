"""Associative recall at a distance: generated text that asks for values which it bound to keys before.

Lines bind a key to a value (`k=7`) or ask for it (`k?7`): behind the question mark is the answer. Every binding is
asked for once, some lines later, and its key does not occur between; lines end with up to three dots, so that no place
in the text tells where the value is. All else is random: what can be learned are the answers, which without recall are
right one time in ten. After the recall tasks of Ba et al. 2016, https://arxiv.org/abs/1610.06258, and of Arora et al.
2023, https://arxiv.org/abs/2312.04927.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
import re
import string
import tempfile
from pathlib import Path

import numpy as np

from nnx_cli.config import PrepareConfig
from nnx_cli.data.prepare import prepare
from nnx_cli.data.token_folder import TokenFolder, open_token_folder
from nnx_cli.errors import OutputError, UsageError
from nnx_cli.system.signals import half_made

KEYS, VALUES = string.ascii_letters, string.digits
CHANCE = 1 / len(VALUES)
ENDS = tuple("." * n + "\n" for n in range(4))
LONGEST_LINE = len("k=7...\n")
NOTHING = "..."  # in a line where all keys wait to be asked for, or no later line was found to ask in
TRIES = 8
QUERY = re.compile(rb"([A-Za-z])([=?])([0-9])")
VALUE = 2  # where a match has it
VAL_SHARE, VAL_WINDOWS = 0.1, 64  # validation text is that share of the training text, or so many windows
MIN_SEQ_LEN = 32


def recall_text(seed: str, n_bytes: int, seq_len: int) -> str:
    """Lines of `n_bytes`, the same for the same arguments, for models of that context: values are asked for at most
    half of it later, and as often within any two distances of which one is twice the other. Raises UsageError."""
    if seq_len < MIN_SEQ_LEN:
        raise UsageError(f"--seq-len is {seq_len}; recall takes a context of at least {MIN_SEQ_LEN}")
    draw = random.Random(seed).random  # the one method whose numbers Python promises not to change
    most = math.log2(seq_len // 2 // LONGEST_LINE + 1)
    asked: dict[int, str] = {}  # lines that are taken, by their number
    free, parts, size, number = list(KEYS), [], 0, 0
    while size < n_bytes:
        line = asked.pop(number, None)
        if line is not None:
            free.append(line[0])
        else:
            wanted = (number + int(2 ** (draw() * most)) for _ in range(TRIES))
            later = next((n for n in wanted if n not in asked), None)
            line = NOTHING
            if free and later is not None:
                place, value = int(draw() * len(free)), VALUES[int(draw() * len(VALUES))]
                free[place], free[-1] = free[-1], free[place]
                key = free.pop()
                line, asked[later] = f"{key}={value}", f"{key}?{value}"
        parts.append(line + ENDS[int(draw() * len(ENDS))])
        size, number = size + len(parts[-1]), number + 1
    return "".join(parts)[:n_bytes]


def make_recall_folder(out: Path, seed: int, tokens: int, seq_len: int) -> TokenFolder:
    """A token folder of bytes with `tokens` tokens to train on, and text of another seed to validate.

    Distances reach half of `seq_len`, the context that models are going to have. A folder that holds this text already
    is opened. Raises OutputError for one that holds another, UsageError for a context too short.
    """
    n_val = max(round(VAL_SHARE * tokens), VAL_WINDOWS * seq_len)
    texts = {split: recall_text(f"{split} {seed}", n, seq_len) for split, n in (("train", tokens), ("val", n_val))}
    if not os.path.lexists(out):
        with half_made(), tempfile.TemporaryDirectory(prefix="nnx-") as spool:
            paths = {split: Path(spool, f"recall-{split}.txt") for split in texts}
            for split, path in paths.items():
                path.write_text(texts[split], encoding="ascii", newline="\n")
            prepare([paths["train"]], out, PrepareConfig(tokenizer="byte"), [paths["val"]])
    folder = open_token_folder(out)
    for split, text in texts.items():
        if folder.meta["sha256"].get(f"{split}.bin") != hashlib.sha256(text.encode()).hexdigest():
            raise OutputError(f"{out} holds another text than recall of seed {seed}", fix="remove it, or name another")
    return folder


def find_queries(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places of the answers in such a text, ascending, and how many tokens before them their values stand."""
    bound: dict[bytes, int] = {}
    places, behind = [], []
    for match in QUERY.finditer(np.asarray(tokens, np.uint8).tobytes()):
        place, key = match.start() + VALUE, match[1]
        if match[2] == b"=":
            bound[key] = place
        elif key in bound:
            places.append(place)
            behind.append(place - bound.pop(key))
    return np.array(places, np.int64), np.array(behind, np.int64)
