import pytest
import torch

from nnx_cli.kernels.stochastic_rounding import random_bits, random_key, random_stream, stochastic_round


def bits(n, step=0, key=1, first=0, word=0):
    return random_bits(random_stream(key, torch.tensor(float(step))), first, n, word)


def test_bits_are_a_function_of_key_step_and_element():
    whole = bits(1000)
    assert torch.equal(whole, bits(1000))
    assert torch.equal(whole[300:], bits(700, first=300))
    for other in (bits(1000, step=1), bits(1000, key=2), bits(1000, word=1)):
        assert (whole == other).sum() < 3
    assert len({random_key(seed, index) for seed in (0, 1, 2**62) for index in range(200)}) == 600


@pytest.mark.parametrize("shift", [0, 16])
def test_bits_are_even_and_independent(shift):
    """Each of 16 bits is 1 half of the time, and agrees with every other, and with its own at the next step, half of
    the time."""
    n = 40_000
    now, later = (((bits(n, step) >> shift)[:, None] >> torch.arange(16)) & 1 for step in (7, 8))
    bound = 5 * 0.5 / n**0.5
    assert (now.float().mean(0) - 0.5).abs().max() < bound
    assert ((now == later).float().mean(0) - 0.5).abs().max() < bound
    assert ((now[1:] == now[:-1]).float().mean(0) - 0.5).abs().max() < bound
    agree = (now[:, :, None] == now[:, None, :]).float().mean(0) - 0.5
    assert agree.fill_diagonal_(0).abs().max() < bound


def test_a_number_goes_to_one_of_its_two_neighbours_and_is_right_on_average():
    torch.manual_seed(0)
    x = torch.randn(64) * torch.logspace(-6, 6, 64)
    drawn = torch.stack([stochastic_round(x, bits(64, step)) for step in range(4000)]).double()
    nearest = x.bfloat16().double()
    ulp = (drawn.amax(0) - drawn.amin(0)).clamp(min=1e-300)
    assert (drawn.unique(dim=0).shape[0] > 1) and all(len(column.unique()) <= 2 for column in drawn.T)
    assert ((drawn - x).abs() <= x.abs() * 2**-7).all()
    error = ((drawn.mean(0) - x) / ulp).abs()
    assert error.max() < 5 * 0.5 / 4000**0.5
    assert ((nearest - x) / ulp).abs().max() > 0.3, "the nearest is not right on average: the test would show it"


def test_what_bfloat16_holds_stays():
    x = torch.tensor([0.0, -0.0, 1.0, -3.5, 2.0**100, -(2.0**-100)])
    for step in range(50):
        rounded = stochastic_round(x, bits(len(x), step))
        assert torch.equal(rounded.view(torch.int16), x.bfloat16().view(torch.int16))


def test_tiny_updates_arrive_on_average():
    """Of 1 an update of 2^-13 is lost to the nearest bfloat16, 2^-8 away; here 1024 of them make an eighth."""
    weights = torch.ones(512, dtype=torch.bfloat16)
    for step in range(1024):
        weights = stochastic_round(weights.float() + 2**-13, bits(512, step))
    assert (torch.ones(1, dtype=torch.bfloat16) + 2**-13).item() == 1.0
    assert weights.float().mean().item() == pytest.approx(1.125, abs=0.01)
