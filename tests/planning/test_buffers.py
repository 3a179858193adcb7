"""By hand, for tensors of 256 x 256 numbers in float32: 256 KiB."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from nnx_cli.planning.buffers import imitation, kernels_of
from nnx_cli.planning.memory import Storages

KIB = 1024
ROWS, DIM = 256, 256


def traced(function, n_inputs):
    return make_fx(function, tracing_mode="fake")(*(torch.empty(ROWS, DIM, device="meta") for _ in range(n_inputs)))


def told(function, n_inputs, workspaces=None):
    """KiB that each kernel makes, and the most that exists, inputs included, in tensors of 256 KiB."""
    graph = traced(function, n_inputs)
    made = [
        sum(x.untyped_storage().nbytes() for x in kernel.makes.values()) // KIB
        for kernel in kernels_of(graph.graph, workspaces or {})
    ]
    with Storages() as storages:
        arguments = [torch.empty(ROWS, DIM, device="meta") for _ in range(n_inputs)]
        with storages.paused():
            out = imitation(graph, workspaces or {}, storages.count)(arguments)
        assert not arguments
        assert storages.live == sum({x.untyped_storage().nbytes() for x in out})
    return made, storages.sections[0].rise // KIB // 256


def test_a_pointwise_chain_is_one_kernel_whose_intermediate_results_do_not_exist():
    made, most = told(lambda x, a, b: [((x @ a).tanh().exp() * 2 + 1) @ b], 3)
    assert made == [256, 256, 256]
    assert most == 4  # x, a, b and x @ a


def test_results_of_kernels_that_read_the_same_exist_together():
    """Though one product after the other needs them."""
    made, _ = told(lambda x, a: [x.sin() @ a + (x.cos() @ a) @ a], 2)
    assert made == [2 * 256, 256, 256, 256, 256]


@pytest.mark.parametrize(("n_inputs", "expected"), [(4, [1, 512]), (5, [256, 1, 512])])
def test_a_result_of_many_inputs_that_two_kernels_read_is_written(n_inputs, expected):
    def function(*xs):
        total = sum(xs[1:], xs[0])
        return [total.sum(0), torch.cat((total, total * xs[0]))]

    assert told(function, n_inputs)[0] == expected


def test_a_buffer_stays_for_one_of_its_size_unless_that_raises_the_peak():
    first, second, third = kernels_of(traced(lambda x, a: [x @ a @ a @ a], 2).graph, {})
    assert third.overwritten == first.makes.keys() and not second.last & first.makes.keys()

    def function(x, a):
        peak = (torch.cat((x, x, x)) @ a).sum()
        return [(x @ a @ a).sum() * peak, (x * 2) @ a]

    kernels = kernels_of(traced(function, 2).graph, {})
    sizes = [sum(x.nbytes for x in kernel.makes.values()) // KIB for kernel in kernels]
    peak, after = sizes.index(768), [kernel for kernel in kernels if kernel.overwritten]
    assert after and all(kernels.index(kernel) > peak for kernel in after)


def test_what_a_library_holds_while_it_runs_counts():
    function, workspaces = lambda x, a: [x @ a], {torch.ops.aten.mm.default: lambda x, a: x.nbytes}
    assert told(function, 2)[1] == 3 and told(function, 2, workspaces)[1] == 4


def test_results_look_as_in_the_graph():
    graph = traced(lambda x, a: [(x @ a).t(), x[3:5], (x @ a).sum(), (x * 2).split(64, dim=1)[1]], 2)
    inputs = [torch.empty(ROWS, DIM, device="meta") for _ in range(2)]
    expected = graph(*inputs)
    for real, x in zip(expected, imitation(graph, {}, lambda *told: None)([*inputs]), strict=True):
        assert (x.shape, x.stride(), x.storage_offset()) == (real.shape, real.stride(), real.storage_offset())
