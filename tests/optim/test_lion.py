import torch
from lion_pytorch.foreach import Lion as Oracle
from torch import nn

from nnx_cli.optim.lion import Lion, RoundedLion


def test_equals_lion_pytorch_bit_for_bit():
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in ((30, 50), (7,))]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    options = dict(lr=1e-2, betas=(0.9, 0.98), weight_decay=0.1)
    a, b = Lion(ours, **options), Oracle(theirs, **options)
    for _ in range(5):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q) and torch.equal(a.state[p]["exp_avg"], b.state[q]["exp_avg"])


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
