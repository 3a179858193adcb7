import torch
from lion_pytorch import foreach
from torch import nn

from nnx_cli.optim import lion
from nnx_cli.optim._base import OptimizerConfig
from nnx_cli.optim._groups import cast_matrices
from nnx_cli.optim.lion import Lion, RoundedLion


def test_fifty_steps_equal_our_own_rule_bit_for_bit(monkeypatch):
    """What old runs were made by, and what bfloat16 weights still go through. The step is that of lion-pytorch."""
    steps, plain = [], foreach.Lion.step
    monkeypatch.setattr(foreach.Lion, "step", lambda self: steps.append(self) or plain(self))
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in ((30, 50), (7,))]
    own = [nn.Parameter(p.detach().clone()) for p in ours]
    a = Lion(ours, lr=1e-2, betas=(0.9, 0.98), weight_decay=0.1)
    b = RoundedLion(own, lr=1e-2, betas=(0.9, 0.98), weight_decay=0.1)
    for _ in range(50):
        for p, q in zip(ours, own, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q in zip(ours, own, strict=True):
        assert torch.equal(p, q) and torch.equal(a.state[p]["exp_avg"], b.state[q]["exp_avg"])
    assert steps == [a] * 50


def test_momenta_are_copied_in_stacks(monkeypatch):
    monkeypatch.setattr(lion, "STACK_BYTES", 40)
    parameters = [torch.zeros(n) for n in (3, 7, 1, 20, 4, 4)]
    assert [[len(p) for p in stack] for stack in lion.stacks(parameters)] == [[3, 7], [1], [20], [4, 4]]


def test_what_is_built_depends_on_the_weights(tiny):
    for precision, kind in (("fp32", Lion), ("bf16", RoundedLion)):
        model = tiny("llama")
        cast_matrices(model, precision)
        built = lion.build(model, OptimizerConfig(lr=1e-3, weight_decay=0.1))
        assert type(built) is kind and built.capturable == (kind is RoundedLion)


def test_a_bfloat16_momentum_follows_a_float32_one():
    torch.manual_seed(0)
    p, q = nn.Parameter(torch.zeros(5000, dtype=torch.bfloat16)), nn.Parameter(torch.zeros(5000))
    a, b = RoundedLion([p], lr=1e-3, betas=(0.9, 0.999)), Lion([q], lr=1e-3, betas=(0.9, 0.999))
    for _ in range(200):
        p.grad = torch.full_like(p, 1.0)
        q.grad = p.grad.float()
        a.step()
        b.step()
    m, wanted = a.state[p]["exp_avg"], b.state[q]["exp_avg"]
    assert m.dtype == torch.bfloat16
    torch.testing.assert_close(m.float().mean(), wanted.mean(), rtol=2e-3, atol=0)
    torch.testing.assert_close(p.float().mean(), q.mean(), rtol=2e-3, atol=0)


def test_parameters_without_gradient_stay():
    p, idle = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    Lion([p, idle], lr=0.5).step()
    assert torch.equal(p.detach(), torch.full((3,), 0.5)) and torch.equal(idle.detach(), torch.ones(3))
