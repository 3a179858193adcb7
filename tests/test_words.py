"""Someone who knows the field finds a concept by the word they would type."""

import ast
import re
from itertools import pairwise
from pathlib import Path

import pytest
from source import TREES

from nnx_cli.errors import counted

CONCEPTS = """attention, RoPE, RMSNorm, SwiGLU, LoRA, KV cache, GEMM, matmul, logsumexp, cross-entropy, AdamW, Muon,
Newton-Schulz, moments, momentum, weight decay, warm-up, learning rate, gradient accumulation, gradient clipping, mixed
precision, loss scaling, activation checkpointing, CUDA graph, torch.compile, FLOPs, MFU, quantization, BPE, checkpoint,
resume"""
NAMED = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def plain(text):
    """Without case and what separates words."""
    return re.sub(r"[-–_\s]", "", text.lower())


def told():
    """Names, and first lines of docstrings, of the whole package."""
    for path, tree in TREES.items():
        yield Path(path).stem
        for node in ast.walk(tree):
            if isinstance(node, NAMED):
                yield node.name
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.id
            elif isinstance(node, ast.arg):
                yield node.arg
            if isinstance(node, (*NAMED, ast.Module)):
                yield (ast.get_docstring(node) or "").partition("\n")[0]


def test_a_concept_is_found_by_its_word():
    texts = "\n".join(plain(text) for text in told())
    assert [concept for concept in " ".join(CONCEPTS.split()).split(", ") if plain(concept) not in texts] == []


@pytest.mark.parametrize(
    ("n", "noun", "text"),
    [(0, "row", "0 rows"), (1, "row", "1 row"), (2, "invalid byte", "2 invalid bytes"), (3780, "step", "3,780 steps")],
)
def test_one_thing_is_no_plural(n, noun, text):
    assert counted(n, noun) == text


def test_numbers_of_things_that_may_be_one_are_counted():
    always_many = "parameters", "tokens"  # of models and texts
    for name, tree in TREES.items():
        for text in (node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)):
            for number, behind in pairwise(text.values):
                if (
                    ast.unparse(getattr(number, "format_spec", None) or text) != "f','"
                    or ast.unparse(number.value).isupper()
                ):
                    continue
                plural = re.match(r" (?:[\w-]+ )?([a-z]{3,}s)\b(?!/)", getattr(behind, "value", ""))
                assert not plural or plural[1] in always_many, (name, ast.unparse(text))


MESSAGES = {"note", "warn", "event", "show"}  # what is called to say something
OLD_WORDS = {  # words of our own, and the field's
    "averages": "moments",
    "card": "GPU",
    "cards": "GPUs",
    "going on with": "resuming",
    "go on:": "resume:",
    "make room": "free some space",
    "pass over the text": "epoch",
    "passes over the text": "epochs",
    "processor": "CPU",
    "product": "matmul",
    "products": "matmuls",
    "sums of exponentials": "logsumexp",
}


def messages():
    """(file:line, text) of every literal that an error, a note or a `fix=` is given."""
    for name, tree in TREES.items():
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            called = ast.unparse(call.func).rpartition(".")[2]
            says = called in MESSAGES or called.endswith("Error") or called == "DoesNotFit"
            given = [word.value for word in call.keywords if word.arg == "fix"] + (call.args if says else [])
            for node in (node for argument in given for node in ast.walk(argument)):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield f"{name}:{node.lineno}", node.value


def test_messages_use_the_words_of_the_field():
    found = [*messages()]
    assert len(found) > 1000 and any("nnx train --resume" in text for _, text in found)
    old = re.compile(rf"\b({'|'.join(OLD_WORDS)})(?!\w)", re.IGNORECASE)
    wrong = [(where, match[0], OLD_WORDS[match[0].lower()]) for where, text in found if (match := old.search(text))]
    assert wrong == []
    assert old.search("it fits on no card")[0] == "card" and not old.search("a cardinal of productions")
