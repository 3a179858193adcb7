import gc
import os
import subprocess
import sys

import pytest
import torch

from nnx_cli.system.cuda_graph import CudaGraph, CudaGraphs
from nnx_cli.system.device import empty_cache, release_memory

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


@needs_cuda
def test_a_replay_computes_on_what_it_is_given():
    ones = torch.ones(4, device="cuda")
    graph = CudaGraph(lambda x, y: 2 * x + y, (ones, ones))
    assert torch.equal(graph(3 * ones, ones), 7 * ones) and torch.equal(graph(ones, ones), 3 * ones)
    with pytest.raises(ValueError, match="zip"):
        graph(ones)


@needs_cuda
def test_a_function_that_waits_for_the_device_is_refused_and_the_stream_stays():
    stream = torch.cuda.current_stream()
    with pytest.raises(RuntimeError):
        CudaGraph(lambda x: x * x.sum().item(), (torch.ones(4, device="cuda"),))
    assert torch.cuda.current_stream() == stream
    torch.cuda.synchronize()


@needs_cuda
def test_a_graph_among_garbage_does_not_end_a_recording():
    x = torch.ones(4, device="cuda")
    held = [[CudaGraph(lambda x: x + 1, (x,))]]
    held[0].append(held[0])

    def busy(x):
        held.clear()
        lists = [[] for _ in range(10_000)]
        return x + len(lists)

    threshold = gc.get_threshold()
    gc.set_threshold(100, 1, 1)
    try:
        graph = CudaGraph(busy, (x,), warm_up=lambda x: None)
    finally:
        gc.set_threshold(*threshold)
    assert gc.isenabled() and torch.equal(graph(x), x + 10_000)


@needs_cuda
def test_graphs_share_a_pool():
    x = torch.ones(2**20, device="cuda")
    first = CudaGraph(lambda x: (x + 1).sum(), (x,))
    second = CudaGraph(lambda x: (x + 2).sum(), (x,), pool=first.pool())
    assert first(x) == 2 * x.numel() and second(x) == 3 * x.numel()


def waits(x):
    """What cannot be recorded, with memory of its own."""
    return (x + 1).sum().item()


@needs_cuda
def test_a_recording_that_fails_leaves_dropout_as_it_was():
    x = torch.ones(2**16, device="cuda")
    torch.manual_seed(1)
    dropout = CudaGraph(lambda x: torch.dropout(x, 0.5, True), (x,))
    before = dropout(x).clone()
    state = torch.cuda.get_rng_state()
    with pytest.raises(RuntimeError):
        CudaGraph(waits, (x,), warm_up=lambda x: None)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    after = dropout(x).clone()
    assert not torch.equal(after, before)
    torch.cuda.set_rng_state(state)
    assert torch.equal(dropout(x), after)
    torch.dropout(x, 0.5, True)


@needs_cuda
def test_a_recording_that_fails_gives_its_memory_back():
    x = torch.ones(2**24, device="cuda")
    release_memory()
    before = torch.cuda.memory_reserved()
    for _ in range(3):
        with pytest.raises(RuntimeError):
            CudaGraph(waits, (x,), warm_up=lambda x: None)
    release_memory()
    assert torch.cuda.memory_reserved() <= before + 2**22


@needs_cuda
def test_a_recording_that_memory_does_not_suffice_for_leaves_dropout_as_it_was():
    x = torch.ones(2**22, device="cuda")
    dropout = CudaGraph(lambda x: torch.dropout(x, 0.5, True), (x,))
    release_memory()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**27) / total)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            CudaGraph(lambda x: x.repeat(64), (x,), warm_up=lambda x: None)
        dropout(x)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    CudaGraph(lambda x: x.repeat(64), (x,))


def test_memory_is_given_back_once_nothing_runs(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: asked.append(name))
    empty_cache()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    empty_cache()
    assert asked == ["synchronize", "empty_cache"]


LET_GO = """
import torch
from nnx_cli.system.cuda_graph import CudaGraph, CudaGraphs
from nnx_cli.system.device import empty_cache
x = torch.ones(4096, 4096, device="cuda")
for _ in range(3):
    graph = CudaGraph(lambda x: torch.linalg.matrix_norm((x @ x) @ (x @ x)), (x,))
    for _ in range(50):
        graph(x)
    del graph
    empty_cache()
torch.cuda.synchronize()
print("done")
"""


@needs_cuda
def test_the_memory_of_a_graph_that_still_runs_is_given_back_later():
    """With memory that is mapped as it is needed, as `nnx` has it: to be said before a process uses the GPU."""
    own = os.environ | {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    done = subprocess.run([sys.executable, "-c", LET_GO], env=own, capture_output=True, text=True, timeout=300)
    assert done.stdout == "done\n", done.stderr


def test_graphs_that_are_let_go_at_different_times_are_of_different_families():
    first, second = CudaGraphs(lambda: None), CudaGraphs(lambda: None)
    freed = first.family
    assert freed != second.family
    del first
    third = CudaGraphs(lambda: None)
    assert third.family == freed != second.family


@needs_cuda
def test_a_graph_outlives_one_of_another_family():
    """PyTorch 2.12 and later give up the workspace of a stream's products with the first graph of it that is gone."""
    x = torch.randn(512, 512, device="cuda", dtype=torch.bfloat16)
    product = CudaGraph(lambda x: x @ x, (x,), family="training")
    wanted = product(x).clone()
    for _ in range(3):
        other = CudaGraph(lambda x: x @ x @ x, (x,), family="evaluation")
        other(x)
        del other
        empty_cache()
        filled = torch.full((2**25,), 7.0, device="cuda")
        assert torch.equal(product(x), wanted) and bool((filled == 7.0).all())
        del filled
