"""Drawing and appending tokens as one kernel: on a GPU, or anywhere under Triton's interpreter (TRITON_INTERPRET=1)."""

import os

import pytest
import torch

from nnx_cli.config import SampleConfig
from nnx_cli.inference.sampler import Rules
from nnx_cli.kernels.next_token import State, next_probabilities, plain_append_next

pytest.importorskip("triton")
DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
pytestmark = pytest.mark.skipif(DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="needs a GPU")


def state(R, V):
    draw = torch.Generator().manual_seed(1)
    made = State(
        tokens=torch.randint(V, (R, 6), generator=draw),
        lengths=torch.arange(R) % 3,
        newest=torch.zeros(R, 1, dtype=torch.int64),
        occurred=torch.rand(R, V, generator=draw) < 0.3,
        uniforms=torch.rand(4, R, generator=draw),
        step=torch.arange(R) % 4,
    )
    return State(*(x.to(DEVICE) for x in made))


def append(logits, rules, before):
    from nnx_cli.kernels import next_token_triton

    after = State(*(x.clone() for x in before))
    next_token_triton.append_next(logits, rules.stages, 1e15, *rules.numbers, *after)
    return after


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("V", [65, 1000])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"greedy": True},
        {"greedy": True, "repetition_penalty": 1.5},
        {"temperature": 1.3, "top_k": 1},
        {"top_k": 7},
        {"top_k": 64, "repetition_penalty": 0.7},
        {"top_p": 0.9},
        {"top_p": 1e-9},
        {"min_p": 0.2},
        {"top_k": 40, "top_p": 0.6, "min_p": 0.05, "repetition_penalty": 1.2},
        {"temperature": 1e-5},
        {"repetition_penalty": 1e-30},
    ],
    ids=str,
)
def test_equals_plain_operations(settings, V, dtype):
    """But for numbers that fall on the boundary between two tokens, to rounding."""
    R = 5
    torch.manual_seed(0)
    logits = (3 * torch.randn(R, V)).to(DEVICE, dtype)
    rules, before = Rules(SampleConfig(**settings), V, DEVICE), state(R, V)
    wanted, found = State(*(x.clone() for x in before)), append(logits, rules, before)
    plain_append_next(logits, rules.stages, rules.numbers, wanted)
    same = (found.newest == wanted.newest)[:, 0]
    if rules.stages.greedy:
        assert same.all() and torch.equal(found.step, before.step)
    else:
        rows = next_probabilities(logits, rules.stages, rules.numbers, before.occurred)
        cumulated = rows.cumsum(1) / rows.sum(1, keepdim=True)
        uniform = before.uniforms.gather(0, before.step[None])[0]
        distance = (cumulated - uniform[:, None]).abs().amin(1)
        assert (distance[~same] < 1e-5).all()
        assert (rows.gather(1, found.newest) > 0).all()
        assert torch.equal(found.step, wanted.step)
    assert torch.equal(found.lengths, wanted.lengths)
    for row in range(R):
        length, token = int(before.lengths[row]), int(found.newest[row])
        assert found.tokens[row].tolist() == [*before.tokens[row, :length], token, *before.tokens[row, length + 1 :]]
        seen = before.occurred[row].clone()
        seen[token] |= rules.stages.repetition_penalty
        assert torch.equal(found.occurred[row], seen)


def test_of_equals_the_first_is_the_likeliest():
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0], [3.0, 3.0, 0.0, 3.0]], device=DEVICE)
    rules = Rules(SampleConfig(greedy=True), 4, DEVICE)
    assert append(logits, rules, state(2, 4)).newest.flatten().tolist() == [1, 0]


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-24])
def test_what_has_no_probability_is_never_drawn(uniform):
    logits = torch.full((3, 200), -torch.inf, device=DEVICE)
    logits[0, 17] = logits[1, 0] = logits[2, 199] = 2.0
    logits[1, 5] = 2.0
    before = state(3, 200)
    before.uniforms.fill_(uniform)
    found = append(logits, Rules(SampleConfig(temperature=1.0), 200, DEVICE), before).newest.flatten().tolist()
    assert found == [17, 0 if uniform < 0.5 else 5, 199]


def test_draws_follow_the_probabilities():
    R = 512
    logits = torch.tensor([0.1, 0.6, 0.3]).log().expand(R, 3).contiguous().to(DEVICE)
    before = state(R, 3)
    found = append(logits, Rules(SampleConfig(temperature=1.0), 3, DEVICE), before).newest.flatten()
    uniform = before.uniforms.gather(0, before.step[None])[0]
    assert torch.equal(found, (uniform[:, None] >= torch.tensor([0.1, 0.7], device=DEVICE)).sum(1))
