import math

import pytest
import torch

from nnx_cli.config import SampleConfig
from nnx_cli.errors import UsageError
from nnx_cli.inference import sampler
from nnx_cli.inference.sampler import Rules, Uniforms
from nnx_cli.kernels.next_token import State, draw, next_probabilities, plain_append_next

CPU = torch.device("cpu")


def probabilities(logits, history=(), **settings):
    """Probabilities of one row of logits under some settings (temperature 1 unless told)."""
    rules = Rules(SampleConfig(**({"temperature": 1.0} | settings)), len(logits), CPU)
    occurred = torch.zeros(1, len(logits), dtype=torch.bool)
    occurred[0, list(history)] = True
    if rules.stages.greedy:
        return torch.eye(len(logits))[chosen(torch.tensor([logits]), rules, occurred, torch.zeros(1))].tolist()[0]
    rows = next_probabilities(torch.tensor([logits]), rules.stages, rules.numbers, occurred)
    return (rows / rows.sum()).tolist()[0]


def chosen(logits, rules, occurred, uniform):
    """The token (R,) that is appended to sequences that hold nothing yet."""
    n = len(logits)
    zeros = torch.zeros(n, dtype=torch.int64)
    state = State(zeros.new_zeros(n, 2), zeros.clone(), zeros.new_zeros(n, 1), occurred, uniform[None], zeros.clone())
    plain_append_next(logits, rules.stages, rules.numbers, state)
    assert torch.equal(state.tokens[:, :1], state.newest) and state.lengths.tolist() == [1] * n
    return state.newest[:, 0]


def logs(*values):
    return [math.log(value) if value else -math.inf for value in values]


def test_temperature():
    assert probabilities(logs(0.5, 0.3, 0.2)) == pytest.approx([0.5, 0.3, 0.2])
    squared = [0.25, 0.09, 0.04]
    assert probabilities(logs(0.5, 0.3, 0.2), temperature=0.5) == pytest.approx([x / 0.38 for x in squared])


@pytest.mark.parametrize("settings", [{"greedy": True}, {"temperature": 0.0}, {"greedy": True, "temperature": 5.0}])
def test_greedy_takes_the_likeliest_and_of_equals_the_first(settings):
    assert probabilities([1.0, 3.0, 2.0], **settings) == [0, 1, 0]
    assert probabilities([3.0, 1.0, 3.0], **settings) == [1, 0, 0]


@pytest.mark.parametrize("temperature", [1e-320, 1e-45, 1e-39, 1e-30, 1e-20, 1e-12, 1e-5])
def test_a_temperature_near_0_is_greedy(temperature):
    assert probabilities([1.0, 3.0, -2.0], temperature=temperature) == [0, 1, 0]
    assert probabilities([1e15, 1.0, -1e15], temperature=temperature) == [1, 0, 0]
    assert probabilities([-5.0, -4.9, -math.inf], temperature=temperature) == pytest.approx([0, 1, 0])


@pytest.mark.parametrize(
    "settings",
    [{"top_p": 1e-320}, {"top_p": 1e-50}, {"top_p": 1e-38, "temperature": 1e-19}, {"min_p": 1.0, "temperature": 1e-15}],
)
def test_settings_near_0_leave_the_likeliest_token(settings):
    assert probabilities([1.0, 3.0, 2.0], **settings) == [0, 1, 0]


@pytest.mark.parametrize("temperature", [0.8, 1e-19, 0.0])
@pytest.mark.parametrize("penalty", [1e-320, 1e-45, 1e-30])
def test_a_penalty_near_0_leaves_numbers(penalty, temperature):
    rows = probabilities([1.0, 3.0, -2.0], history=[0], repetition_penalty=penalty, temperature=temperature)
    assert rows == [1, 0, 0], "what stands in the text is likeliest by far"


@pytest.mark.parametrize(("k", "kept"), [(1, 1), (2, 2), (3, 3), (4, 4), (100, 4)])
def test_top_k(k, kept):
    values = [0.4, 0.3, 0.2, 0.1]
    total = sum(values[:kept])
    wanted = [x / total for x in values[:kept]] + [0.0] * (4 - kept)
    assert probabilities(logs(*values), top_k=k) == pytest.approx(wanted)


@pytest.mark.parametrize(("p", "kept"), [(0.1, 1), (0.39, 1), (0.41, 2), (0.69, 2), (0.71, 3), (1.0, 4)])
def test_top_p_keeps_the_smallest_set_that_holds_p(p, kept):
    values = [0.4, 0.3, 0.2, 0.1]
    total = sum(values[:kept])
    wanted = [x / total for x in values[:kept]] + [0.0] * (4 - kept)
    assert probabilities(logs(*values), top_p=p) == pytest.approx(wanted)
    assert probabilities(logs(*values[::-1]), top_p=p) == pytest.approx(wanted[::-1])


@pytest.mark.parametrize(("p", "kept"), [(0.0, 4), (0.2, 4), (0.3, 3), (0.6, 2), (0.8, 1), (1.0, 1)])
def test_min_p_drops_what_is_less_likely_than_a_part_of_the_likeliest(p, kept):
    values = [0.4, 0.3, 0.2, 0.1]
    total = sum(values[:kept])
    wanted = [x / total for x in values[:kept]] + [0.0] * (4 - kept)
    assert probabilities(logs(*values), min_p=p) == pytest.approx(wanted)


def test_rules_act_one_after_the_other():
    """Top-k 3 leaves 4:3:2 of nine; top-p 0.7 of that two; min-p 0.8 of the likeliest one."""
    values = logs(0.4, 0.3, 0.2, 0.1)
    assert probabilities(values, top_k=3, top_p=0.7) == pytest.approx([4 / 7, 3 / 7, 0, 0])
    assert probabilities(values, top_k=3, top_p=0.7, min_p=0.8) == [1, 0, 0, 0]


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    logits = [2.0, 2.0, -1.0, -1.0]
    wanted = torch.tensor([1.0, 2.0, -2.0, -1.0]).softmax(0).tolist()
    assert probabilities(logits, history=[0, 2, 2, 0, 0], repetition_penalty=2.0) == pytest.approx(wanted)
    assert probabilities(logits, history=[], repetition_penalty=2.0) == pytest.approx(
        torch.tensor(logits).softmax(0).tolist()
    )


@pytest.mark.parametrize(
    ("settings", "changed", "same_code"),
    [
        ({"temperature": 0.7}, {"temperature": 1.3, "seed": 4}, True),
        ({"top_k": 3}, {"top_k": 4}, True),
        ({"top_k": 4, "top_p": 0.5}, {"top_k": 3, "top_p": 0.9}, True),
        ({"min_p": 0.1, "repetition_penalty": 1.2}, {"min_p": 0.3, "repetition_penalty": 0.8}, True),
        ({"top_k": 4}, {"top_k": 5}, False),
        ({}, {"top_p": 0.5}, False),
        ({}, {"greedy": True}, False),
        ({"top_p": 1.0, "min_p": 0.0, "top_k": 9, "repetition_penalty": 1.0}, {}, True),
        ({"greedy": True, "top_p": 0.5}, {"temperature": 0.0, "top_k": 2}, True),
    ],
    ids=str,
)
def test_numbers_may_change_and_the_code_stays(settings, changed, same_code):
    """What runs depends on `stages` alone, as a recorded step must, and follows the numbers that were set last."""
    torch.manual_seed(0)
    logits, uniform, occurred = torch.randn(50, 9), torch.rand(50), torch.rand(50, 9) < 0.3
    rules, wanted = Rules(SampleConfig(**settings), 9, CPU), Rules(SampleConfig(**changed), 9, CPU)
    before = rules.stages, [x.data_ptr() for x in rules.numbers]
    rules.set(SampleConfig(**changed))
    assert (rules.stages == before[0]) == same_code and rules.stages == wanted.stages
    assert [x.data_ptr() for x in rules.numbers] == before[1]
    assert torch.equal(*(chosen(logits, r, occurred, uniform) for r in (rules, wanted)))


def test_values_that_change_nothing_are_off():
    logits = torch.randn(20, 300, generator=torch.Generator().manual_seed(1))
    off = Rules(SampleConfig(top_k=300, top_p=1.0, min_p=0.0, repetition_penalty=1.0), 300, CPU)
    default = Rules(SampleConfig(), 300, CPU)
    assert off.stages == default.stages
    occurred = torch.ones(20, 0, dtype=torch.bool)
    assert torch.equal(*(next_probabilities(logits, r.stages, r.numbers, occurred) for r in (off, default)))


def test_draw_inverts_the_cumulated_probabilities():
    rows = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]])
    for uniform, wanted in [(0.0, 1), (0.2499, 1), (0.25, 3), (0.7499, 3), (0.75, 4), (0.999999, 4)]:
        assert draw(rows, torch.tensor([uniform])).item() == wanted, uniform
    assert draw(rows * 0.1, torch.tensor([0.5])).item() == 3, "the sum need not be one"


def test_draw_never_takes_what_has_no_probability():
    rows = torch.rand(2000, 300).masked_fill(torch.rand(2000, 300) < 0.7, 0.0)
    rows[:, 0] = rows[:, -1] = 0.0
    for uniform in (torch.rand(2000), torch.zeros(2000), torch.full((2000,), 1.0 - 2**-24)):
        chosen = draw(rows, uniform)
        assert (rows.gather(1, chosen[:, None]) > 0).all()


def test_draw_follows_the_probabilities():
    rows = torch.tensor([[0.1, 0.6, 0.3]]).expand(30_000, 3)
    counts = torch.bincount(draw(rows, torch.rand(30_000, generator=torch.Generator().manual_seed(0))), minlength=3)
    assert (counts / 30_000).tolist() == pytest.approx([0.1, 0.6, 0.3], abs=0.01)


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"max_new_tokens": 0},
        {"num_samples": 0},
        {"seed": -1},
        {"seed": 2**64},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(bad):
    with pytest.raises(UsageError, match="--" + next(iter(bad)).replace("_", "-")):
        SampleConfig(**bad)


def test_random_numbers_are_a_stream_for_each_sequence(monkeypatch):
    """Whatever their number, and however many are made at a time."""

    def take(n_sequences, n_steps):
        numbers, taken = Uniforms(7, n_sequences, CPU), []
        for _ in range(n_steps):
            numbers.prepare()
            taken.append(numbers.table.gather(0, numbers.step[None])[0])
            numbers.step += 1
        return torch.stack(taken, dim=1)

    many = take(5, 600)
    for row, numbers in enumerate(many):
        generator = torch.Generator().manual_seed(7 * 1_000_003 + row)
        assert torch.equal(numbers, torch.rand(600, generator=generator))
    assert torch.equal(take(2, 600), many[:2]) and len({tuple(row.tolist()) for row in many}) == 5
    monkeypatch.setattr(sampler, "UNIFORMS_AT_ONCE", 7)
    assert torch.equal(take(5, 30), many[:, :30])
