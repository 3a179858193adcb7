"""Someone who knows the field finds a concept by the word they would type."""

import ast
import re
from pathlib import Path

import pytest

import nnx_cli

PACKAGE = Path(nnx_cli.__file__).parent
FILES = [(path.stem, ast.parse(path.read_text(encoding="utf-8"))) for path in sorted(PACKAGE.rglob("*.py"))]
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
    for path, tree in FILES:
        yield path
        for node in ast.walk(tree):
            if isinstance(node, NAMED):
                yield node.name
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.id
            elif isinstance(node, ast.arg):
                yield node.arg
            if isinstance(node, (*NAMED, ast.Module)):
                yield (ast.get_docstring(node) or "").partition("\n")[0]


TOLD = [plain(text) for text in told()]


@pytest.mark.parametrize("concept", " ".join(CONCEPTS.split()).split(", "))
def test_a_concept_is_found_by_its_word(concept):
    assert any(plain(concept) in text for text in TOLD)
