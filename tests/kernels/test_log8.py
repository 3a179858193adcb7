import pytest
import torch

from nnx_cli.kernels.log8 import BLOCK, decode, encode, n_blocks
from nnx_cli.kernels.stochastic_rounding import random_bits, random_stream

LEVEL = 2 ** (1 / 8) - 1


def bits(n, step=0):
    return random_bits(random_stream(1, torch.tensor(float(step))), 0, n, 0)


def numbers(n, sign, octaves):
    torch.manual_seed(0)
    x = torch.exp2(-octaves * torch.rand(n)) * 3e-5
    return x * torch.randint(0, 2, (n,)).mul(2).sub(1) if sign else x


@pytest.mark.parametrize(("sign", "octaves"), [(True, 15), (False, 31)])
@pytest.mark.parametrize("n", [1, BLOCK, 5 * BLOCK + 17])
def test_error_is_less_than_a_level(sign, octaves, n):
    x = numbers(n, sign, octaves)
    codes, scale = encode(x, bits(n), sign)
    assert codes.dtype == torch.uint8 and codes.shape == (n,) and scale.shape == (n_blocks(n),)
    back = decode(codes, scale, sign)
    assert ((back - x).abs() <= x.abs() * LEVEL * 1.0001).all()
    top = x.abs().argmax()
    assert back[top] == x[top], "a block's largest number is exact"


@pytest.mark.parametrize("sign", [True, False])
def test_every_code_means_itself(sign):
    codes = torch.arange(256, dtype=torch.uint8)
    x = decode(codes, torch.tensor([2.0]), sign)
    again, scale = encode(x, bits(256), sign)
    assert scale == 2.0
    assert (again != codes).nonzero().flatten().tolist() == ([128] if sign else []), "-0 is 0"
    assert len(x.unique()) == (255 if sign else 256)


@pytest.mark.parametrize("sign", [True, False])
def test_the_mean_is_exact(sign):
    x = numbers(BLOCK, sign, 10)
    draws = torch.stack([decode(*encode(x, bits(BLOCK, step), sign), sign) for step in range(500)])
    assert ((draws.mean(0) - x).abs() / x.abs()).max() < 5 * LEVEL / 2 / 500**0.5


def test_zeros_and_what_is_far_below_the_scale():
    x = torch.zeros(2 * BLOCK)
    x[0], x[1] = 1.0, 1e-30
    for step in range(20):
        for sign in (True, False):
            back = decode(*encode(x, bits(len(x), step), sign), sign)
            assert back[0] == 1.0 and (back[2:] == 0).all()
            assert (back[1] > 0) != sign, "a square never becomes zero, a mean may"


def test_a_slow_average_follows():
    """An average that keeps 0.999 of itself moves by a ninetieth of a level: to the nearest it would stand still."""
    x, other = torch.full((BLOCK,), 0.5), 1.0
    x[0] = other
    codes, scale = encode(x, bits(BLOCK), False)
    for step in range(1000):
        x = decode(codes, scale, False)
        x[1:] *= 0.999
        codes, scale = encode(x, bits(BLOCK, step), False)
    assert decode(codes, scale, False)[1:].mean() == pytest.approx(0.5 * 0.999**1000, rel=0.1)
