from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from nnx_cli import models
from nnx_cli.config import TrainConfig
from nnx_cli.optim._build import build_optimizer
from nnx_cli.system.cuda_graph import capture_stream
from nnx_cli.system.device import set_seed
from nnx_cli.training.step import Step, StepGraphs

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
SHAPE = dict(dim=32, n_layers=2, n_heads=2, seq_len=16)


def make_step(name="nyx", device="cpu", optimizer="adamw", grad_clip=1.0, in_backward=False, **fields):
    torch.manual_seed(0)
    model = models.build(name, **(SHAPE | fields)).to(device)
    config = TrainConfig(optimizer=optimizer, lr=1e-3, weight_decay=0.1)
    scaler = torch.amp.GradScaler(device, enabled=False)
    return Step(model, build_optimizer(model, config), scaler, grad_clip, in_backward)


def batch(seed=0, n=4, device="cpu"):
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(256, (n, 17), generator=draw).to(device)
    return ids[:, :-1], ids[:, 1:]


def snapshot(step):
    tensors = dict(step.model.state_without_ties())
    tensors |= {
        f"{i}.{key}": value
        for i, fields in enumerate(step.optimizer.state.values())
        for key, value in fields.items()
        if isinstance(value, torch.Tensor)
    }
    return {name: tensor.clone() for name, tensor in tensors.items()} | {"stats": step.stats.values.clone()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


@pytest.mark.parametrize("name", models.names())
def test_steps_without_effects_change_nothing(name):
    step = make_step(name)
    step(*batch(), 4)
    before = snapshot(step)
    with step.without_effects():
        for seed in range(3):
            step(*batch(seed), 2)
    assert equal(before, snapshot(step))
    assert all(p.grad is None for p in step.parameters)
    step(*batch(1), 4)
    assert not equal(before, snapshot(step)), "afterwards steps count again"


def test_numbers_of_a_step():
    step = make_step()
    ids, targets = batch()
    with torch.no_grad():
        wanted = torch.nn.functional.cross_entropy(step.model(ids).flatten(0, 1), targets.flatten())
    step(ids, targets, 2)
    numbers = step.stats.read()
    assert numbers.loss == numbers.highest_loss == pytest.approx(wanted.item(), abs=1e-6) and numbers.grad_norm > 0
    assert (numbers.skipped_steps, numbers.bad_steps) == (0, 0)
    assert step.stats.read().highest_loss == 0, "it begins anew once it was read"


def test_steps_that_fail_are_counted():
    step = make_step()
    weight, counts = step.model.norm.weight.data, []
    for bad in (False, True, True, False, True):
        weight.fill_(torch.nan if bad else 1.0)
        step(*batch(), 4)
        numbers = step.stats.read()
        counts.append((numbers.skipped_steps, numbers.bad_steps))
    assert counts == [(0, 0), (1, 1), (2, 2), (2, 0), (3, 1)]


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_step_whose_targets_are_all_masked_is_no_bad_step(in_backward):
    step = make_step(grad_clip=0.0, in_backward=in_backward)
    ids, targets = batch()
    step(ids, torch.full_like(targets, step.model.ignore_index), 4)
    numbers = step.stats.read()
    assert (numbers.loss, numbers.grad_norm, numbers.skipped_steps) == (0, 0, 0)
    assert all(p.isfinite().all() for p in step.parameters)


def test_without_a_limit_the_gradient_is_only_measured():
    limited, free = (make_step(optimizer="lion", grad_clip=clip) for clip in (1e-3, 0.0))
    for step in (limited, free):
        step.update = lambda loss, norm: None
        step(*batch(), 4)
    ours, theirs = (torch.cat([p.grad.flatten() for p in step.parameters]).norm() for step in (limited, free))
    assert ours == pytest.approx(1e-3, rel=1e-2) and theirs > 1e-2


def test_an_overflow_under_a_loss_scale_is_the_scalers_business():
    step = make_step()
    step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=10**6)
    before = step.model.norm.weight.detach().clone()
    for skipped in range(100):  # noqa: B007 (counted at the end)
        step(*batch(), 4)
        if step.stats.grad_norm.isfinite():
            break
        assert torch.equal(before, step.model.norm.weight)
    assert 0 < skipped == step.stats.skipped_steps.item() and step.scaler.get_scale() == 2.0 ** (127 - skipped)
    assert not torch.equal(before, step.model.norm.weight), "the scale is low enough now"


@pytest.mark.parametrize("name", models.names())
@pytest.mark.parametrize("optimizer", ["adamw", "lion"])
def test_steps_in_the_backward_pass_are_the_same_steps(name, optimizer):
    plain, step = (make_step(name, optimizer=optimizer, grad_clip=0.0, in_backward=b) for b in (False, True))
    for seed in range(3):
        plain(*batch(seed), 4)
        step(*batch(seed), 4)
    assert all(p.grad is None for p in step.parameters)
    torch.testing.assert_close(step.stats.values, plain.stats.values, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(step.parameters, plain.parameters, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_what_an_unfinished_step_left_is_forgotten():
    step = make_step()
    step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for failure in ("zero_grad", "step"):
        with monkeypatched(step.optimizer, failure), pytest.raises(torch.OutOfMemoryError), step.without_effects():
            step(*batch(), 4)
        assert not step.updating and all(p.grad is None for p in step.parameters)
    step(*batch(), 4)
    assert step.stats.skipped_steps == 0


@contextmanager
def monkeypatched(owner, name):
    """Memory runs out in a method, the first time."""

    def run_out(*args, **kwargs):
        setattr(owner, name, plain)
        raise torch.OutOfMemoryError

    plain = getattr(owner, name)
    setattr(owner, name, run_out)
    yield


def test_steps_in_the_backward_pass_without_effects_change_nothing():
    step = make_step(in_backward=True)
    step(*batch(), 4)
    before = snapshot(step)
    with step.without_effects():
        step(*batch(1), 4)
    assert equal(before, snapshot(step))


@needs_cuda
@pytest.mark.parametrize("name", models.names())
def test_a_captured_step_is_the_step(name):
    plain, step = make_step(name, "cuda"), make_step(name, "cuda")
    captured = StepGraphs(step, *batch(device="cuda"), 2)
    for i in range(5):
        samples = batch(i, device="cuda")
        plain(*samples, 2)
        captured(*samples)
        torch.testing.assert_close(step.stats.values, plain.stats.values, rtol=1e-5, atol=1e-5)


@needs_cuda
def test_a_captured_step_draws_anew_and_as_seeded():
    step, losses = make_step("nyx", "cuda", dropout=0.2), []
    samples = batch(device="cuda")
    captured = StepGraphs(step, *samples, 4)
    with step.without_effects():
        for seed in (1, 2, 1):
            set_seed(seed)
            captured(*samples)
            losses.append(step.stats.loss.item())
    assert losses[0] == losses[2] != losses[1]


@needs_cuda
@pytest.mark.parametrize("name", models.names())
def test_recorded_micro_batches_under_a_loss_scale_are_the_step(name):
    plain, step = make_step(name, "cuda"), make_step(name, "cuda")
    for one in (plain, step):
        one.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10, growth_interval=3)
    captured = StepGraphs(step, *batch(device="cuda"), 1)
    for i in range(7):
        samples = batch(i, device="cuda")
        plain(*samples, 1)
        captured(*samples)
        torch.testing.assert_close(step.stats.values, plain.stats.values, rtol=1e-5, atol=1e-5)
    assert step.scaler.get_scale() == plain.scaler.get_scale() == 2.0**12


@needs_cuda
def test_recorded_micro_batches_draw_their_own_dropout():
    """The same rows twice in a step: the sum of their losses is not twice that of one."""
    step = make_step("nyx", "cuda", dropout=0.5)
    rows = [x[:2].repeat(2, 1) for x in batch(device="cuda")]
    captured, losses = StepGraphs(step, *rows, 2), []
    with step.without_effects():
        for seed in (1, 2, 1):
            set_seed(seed)
            captured(*rows)
            both = step.stats.loss.item()
            set_seed(seed)
            captured(*(x[:2] for x in rows))
            assert both != step.stats.loss.item()
            losses.append(both)
    assert losses[0] == losses[2] != losses[1]


class FakeGraphs:
    """Stands for CUDA graphs on a CPU: what is recorded is run once, and replays are written down."""

    def __init__(self, monkeypatch):
        self.made, self.replayed = [], []
        stream = SimpleNamespace(wait_stream=lambda other: None)
        for name, stand_in in {
            "CUDAGraph": self.make,
            "graph": lambda graph, **options: nullcontext(),
            "Stream": lambda: stream,
            "current_stream": lambda: stream,
            "stream": lambda stream: nullcontext(),
            "synchronize": lambda: None,
            "graph_pool_handle": lambda: (0, 1),
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        capture_stream.cache_clear()

    def make(self):
        graph = SimpleNamespace(pool=lambda: None)
        graph.replay = lambda: self.replayed.append(self.made.index(graph))
        self.made.append(graph)
        return graph


def test_a_step_of_several_micro_batches_is_recorded_as_one_of_them_and_its_end(monkeypatch):
    graphs, step = FakeGraphs(monkeypatch), make_step()
    step(*batch(), 4)
    before = snapshot(step)
    input_ids, targets = batch()
    captured = StepGraphs(step, input_ids, targets, 2)
    assert equal(before, snapshot(step)), "recording changes nothing"
    recorded = captured.micro_batch.inputs[0]
    assert recorded.shape == (2, input_ids.shape[1]) and len(captured.gradients) == len(step.parameters)
    captured(input_ids, targets)
    assert graphs.replayed == [0] * (len(input_ids) // 2) + [1]
    assert torch.equal(recorded, input_ids[-2:]) and captured.n_targets == targets.numel()
    assert not any(gradient.any() for gradient in captured.gradients.values()), "they begin at zero"
    graphs.replayed.clear()
    captured(input_ids[:2], targets[:2])
    assert graphs.replayed == [0, 1] and captured.n_targets == targets[:2].numel()
    whole = StepGraphs(step, input_ids, targets, len(input_ids))
    graphs.replayed.clear()
    whole(input_ids, targets)
    assert graphs.replayed == [2] and whole.end is None
    capture_stream.cache_clear()


@pytest.mark.parametrize("batch_size", [2, 4])
def test_an_optimizer_that_is_not_capturable_steps_after_the_replays(monkeypatch, batch_size):
    graphs, step, plain = FakeGraphs(monkeypatch), make_step(), make_step()
    step.optimizer.capturable = False
    for one in (plain, step):
        one(*batch(9), batch_size)
    captured = StepGraphs(step, *batch(), batch_size)
    assert equal(snapshot(plain), snapshot(step)), "recording changes nothing"

    def replay():
        graphs.replayed.append(0)
        for parameter, gradient in captured.gradients.items():
            parameter.grad = gradient
        captured.total += step.accumulate(*captured.micro_batch.inputs, captured.n_targets)
        for parameter in captured.gradients:
            parameter.grad = None

    captured.micro_batch.graph.replay = replay
    for seed in range(3):
        captured(*batch(seed))
        plain(*batch(seed), batch_size)
    assert graphs.replayed == [0] * (3 * 4 // batch_size) and len(graphs.made) == 1
    assert equal(snapshot(plain), snapshot(step)) and all(p.grad is None for p in step.parameters)
    capture_stream.cache_clear()


def test_an_optimizer_that_is_not_capturable_in_the_backward_pass_is_refused():
    step = make_step(in_backward=True)
    step.optimizer.capturable = False
    with pytest.raises(RuntimeError, match="cannot be recorded"):
        StepGraphs(step, *batch(), 4)


@needs_cuda
@pytest.mark.parametrize("batch_size", [2, 4])
def test_an_optimizer_that_is_not_capturable_steps_after_recorded_micro_batches(batch_size):
    plain, step = make_step("nyx", "cuda"), make_step("nyx", "cuda")
    step.optimizer.capturable = False
    captured = StepGraphs(step, *batch(device="cuda"), batch_size)
    for i in range(5):
        samples = batch(i, device="cuda")
        plain(*samples, batch_size)
        captured(*samples)
        torch.testing.assert_close(step.stats.values, plain.stats.values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", models.names())
def test_a_masked_step_is_a_mean_over_all_that_counts_in_it(name):
    """However unevenly what counts lies in the micro-batches: not a mean of their means."""
    whole, parts = make_step(name), make_step(name)
    ids, targets = batch()
    counts = torch.zeros(targets.shape, dtype=torch.bool)
    counts[0, 3:15], counts[1, 7], counts[3, :2] = True, True, True
    targets = targets.masked_fill(~counts, whole.model.ignore_index)
    for step, size in ((whole, 4), (parts, 1)):
        step(ids, targets, size)
    numbers = whole.stats.read(), parts.stats.read()
    assert numbers[0].loss == pytest.approx(numbers[1].loss, rel=1e-5)
    assert numbers[0].grad_norm == pytest.approx(numbers[1].grad_norm, rel=1e-3)


@needs_cuda
@pytest.mark.parametrize("size", [4, 1])
def test_a_masked_step_is_the_same_as_a_cuda_graph(size):
    plain, captured = make_step("llama", "cuda"), make_step("llama", "cuda")
    graphs = StepGraphs(captured, *batch(device="cuda"), size)
    for seed in range(3):
        ids, targets = batch(seed, device="cuda")
        counts = torch.rand(targets.shape, generator=torch.Generator().manual_seed(seed)).cuda() < 0.2 * (seed + 1)
        targets = targets.masked_fill(~counts, plain.model.ignore_index)
        plain(ids, targets, size)
        graphs(ids, targets)
        assert captured.stats.read().loss == pytest.approx(plain.stats.read().loss, rel=1e-4)
