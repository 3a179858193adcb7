import pytest
import torch

from nnx_cli.system.cuda_graph import CudaGraph

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
def test_graphs_share_a_pool():
    x = torch.ones(2**20, device="cuda")
    first = CudaGraph(lambda x: (x + 1).sum(), (x,))
    second = CudaGraph(lambda x: (x + 2).sum(), (x,), pool=first.pool())
    assert first(x) == 2 * x.numel() and second(x) == 3 * x.numel()
