import math
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch

from nnx_cli.config import TrainConfig
from nnx_cli.layers.blocks import compile_blocks, undo_compile
from nnx_cli.system import timing
from nnx_cli.training import compilation
from nnx_cli.training.compilation import Conditions, Trial, choose, follow_length, try_micro_batch, verify
from nnx_cli.training.state import TrainState
from nnx_cli.training.stepper import Execution, ordered_sums

CPU = Conditions(
    requested="auto",
    device_type="cpu",
    precision="fp32",
    in_backward=False,
    missing=None,
    max_steps=12,
    max_time_s=None,
    progress=0.0,
)
GPU = replace(CPU, device_type="cuda")


@pytest.fixture
def stepper(start, workspace):
    """Steps of a small run; nothing is compiled for real."""
    _, trainer = start(workspace / "run")
    yield trainer.stepper
    undo_compile(trainer.model)


@pytest.fixture
def pretend(monkeypatch):
    """Pretends losses and step times of eager and compiled blocks, so that no compiler is needed."""

    def install(*tried):
        results = iter(tried)

        def try_micro_batch(stepper, *, compiled):
            result = next(results)
            if isinstance(result, Exception):
                raise result
            loss, seconds, *norms = result
            return Trial(loss, seconds, torch.tensor(norms or [1.0, 2.0]))

        monkeypatch.setattr(compilation, "try_micro_batch", try_micro_batch)

    return install


def is_compiled(stepper):
    flags = {block._compiled_call_impl is not None for block in stepper.step.model.blocks}
    assert len(flags) == 1
    return flags.pop()


def decide(stepper, requested):
    """What `verify` makes of what `choose` chose."""
    conditions = replace(CPU, requested=requested)
    return verify(stepper, choose(conditions), conditions)


def shorten(stepper, progress):
    """`follow_length` of a run that reads short sequences in its first half."""
    config = TrainConfig(short_sequences=0.5, precision="fp32")
    return follow_length(stepper, config, TrainState(step=7), progress)


# choose


def test_off_is_off():
    assert choose(replace(CPU, requested="off")) == choose(replace(GPU, requested="off")) == Execution()


def test_a_graph_is_for_a_gpu():
    assert choose(replace(CPU, requested="graph")) == Execution()
    assert choose(replace(GPU, requested="graph")) == Execution(graph=True)
    assert choose(replace(GPU, requested="on")) == Execution(graph=True, compiled=True)


def test_another_device_compiles_where_it_is_asked_to():
    assert choose(replace(CPU, device_type="mps")) == Execution()
    assert choose(replace(CPU, device_type="mps", requested="on")) == Execution(compiled=True)


@pytest.mark.parametrize("requested", ["auto", "on"])
def test_a_machine_without_a_compiler_trains_eagerly_and_says_so(requested):
    chosen = choose(replace(CPU, requested=requested, missing="headers of Python"))
    assert chosen == Execution(notes=("not compiled: no headers of Python here; more: nnx doctor",))
    short = choose(replace(CPU, requested=requested, missing="C++ compiler", max_steps=1), step_s=1.0)
    assert bool(short.notes) == (requested == "on")


def test_steps_in_the_backward_pass_are_not_compiled():
    chosen = choose(replace(GPU, requested="on", in_backward=True))
    assert chosen.name == "graph" and "--optimizer-in-backward" in chosen.notes[0]
    assert choose(replace(CPU, in_backward=True)) == Execution()


def test_auto_does_not_compile_for_a_short_run():
    assert choose(CPU).compiled, "how long a step takes is not known"
    assert not choose(CPU, 0.001).compiled and choose(CPU, 1000.0).compiled
    assert choose(replace(GPU, max_steps=1000), 0.1).name == "graph"
    assert choose(replace(GPU, max_steps=1000), 0.2).name == "on"
    assert not choose(replace(CPU, max_time_s=300.0)).compiled, "whatever a step takes"
    assert choose(replace(CPU, max_steps=None, max_time_s=700.0)).compiled
    assert not choose(replace(CPU, max_steps=None, max_time_s=700.0, progress=0.5)).compiled


def test_the_time_ahead():
    assert CPU.planned_s(0.5) == 12 * 0.5
    assert replace(CPU, progress=0.75).planned_s(0.5) == pytest.approx(12 * 0.5 / 4)
    assert replace(CPU, max_time_s=4.0).planned_s(0.5) == 4.0
    assert replace(CPU, max_steps=None, max_time_s=4.0).planned_s(0.5) == 4.0
    assert replace(CPU, progress=1.0).planned_s(float("inf")) == 0.0


# verify


def test_what_is_right_and_faster_is_kept(stepper, pretend):
    pretend((5.5, 100.0), (5.5 + 1e-5, 60.0))
    decided = decide(stepper, "on")
    assert decided.name == "on" and is_compiled(stepper)
    assert decided.notes == ("compiled: a step takes 60% of its time before",)


@pytest.mark.parametrize("requested", ["auto", "on"])
@pytest.mark.parametrize("loss", [5.6, float("nan"), float("inf")])
def test_a_wrong_result_is_not_kept(stepper, pretend, requested, loss):
    pretend((5.5, 1000.0), (loss, 1.0))
    decided = decide(stepper, requested)
    assert decided.name == "off" and not is_compiled(stepper)
    assert "the loss differs from eager" in decided.notes[0]


@pytest.mark.parametrize("norms", [(1.0, 2.1), (0.0, 0.0), (1.0, float("nan"))])
def test_a_wrong_gradient_is_not_kept(stepper, pretend, norms):
    pretend((5.5, 1000.0, 1.0, 2.0), (5.5, 1.0, *norms))
    decided = decide(stepper, "auto")
    assert decided.name == "off" and not is_compiled(stepper)
    assert "the gradient differs from eager" in decided.notes[0]


def test_auto_keeps_nothing_that_is_slower(stepper, pretend):
    pretend((5.5, 1000.0), (5.5, 1001.0))
    decided = decide(stepper, "auto")
    assert decided.name == "off" and not is_compiled(stepper)
    assert decided.notes == ("not compiled: no faster here",)


def test_on_keeps_what_is_slower(stepper, pretend):
    pretend((5.5, 1.0), (5.5, 1.1))
    assert decide(stepper, "on").name == "on"


@pytest.mark.parametrize(
    "failure",
    [
        RuntimeError("the compiler crashed\nat length"),
        torch._dynamo.exc.Unsupported("a graph break"),
    ],
)
def test_a_compiler_that_fails_is_not_used(stepper, pretend, failure):
    pretend((5.5, 1000.0), failure)
    decided = decide(stepper, "auto")
    assert decided.name == "off" and not is_compiled(stepper)
    (note,) = decided.notes
    assert note.startswith(f"not compiled: {type(failure).__name__}: ") and "\n" not in note


def test_a_torch_that_keeps_compiled_code_elsewhere_compiles_nothing(stepper, pretend, monkeypatch):
    pretend((5.5, 1000.0), (5.5, 1.0))
    monkeypatch.delattr(torch.nn.Module, "_compiled_call_impl")
    decided = decide(stepper, "auto")
    assert decided.name == "off" and "compiled code elsewhere" in decided.notes[0]


def test_a_run_that_turns_out_too_short_is_not_compiled(stepper, pretend):
    pretend((5.5, 0.001), RuntimeError("not tried"))
    decided = decide(stepper, "auto")
    assert decided.name == "off" and decided.notes == ()


def test_a_step_is_timed_by_its_first_micro_batches_and_its_end_once(start, workspace, monkeypatch):
    _, trainer = start(workspace / "run", batch_size=2, grad_accum=4)
    clock = [0.0]

    def run(ids, targets):
        clock[0] += len(ids) // 2 * 1.0 + 10.0  # micro-batches of 1 s, and an end of 10

    monkeypatch.setattr(trainer.stepper, "run", run)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    assert compilation.step_seconds(trainer.stepper) == 14.0


def run_out(*arguments):
    raise torch.OutOfMemoryError


def test_memory_that_runs_out_once_blocks_are_compiled_undoes_that(stepper, pretend, monkeypatch):
    pretend((5.5, 100.0), (5.5, 60.0))
    stepper.device = torch.device("cuda")
    monkeypatch.setattr(compilation, "step_seconds", run_out)
    stepper.execution = Execution(step_s=1.0)
    decided = verify(stepper, Execution(compiled=True), replace(GPU, requested="on"))
    assert not is_compiled(stepper) and decided.notes == ("not compiled: not enough memory",)


@pytest.fixture
def graphs(stepper, monkeypatch):
    """Steps on a pretended GPU, that take 1 s op by op and `graphs.step_s` as graphs; lists what is recorded."""

    class Graphs(list):
        step_s = 0.5

        def record(self):
            self.append(is_compiled(stepper))
            stepper.graphs = object()

    made = Graphs()
    stepper.device = torch.device("cuda")
    monkeypatch.setattr(stepper, "record_graphs", made.record)
    monkeypatch.setattr(compilation, "step_seconds", lambda stepper: made.step_s if stepper.graphs else 1.0)
    return made


def test_a_graph_is_kept_where_it_is_faster(stepper, graphs):
    assert verify(stepper, Execution(graph=True), GPU) == Execution(graph=True, step_s=0.5)
    stepper.graphs, graphs.step_s = None, 0.99
    assert verify(stepper, Execution(graph=True), GPU) == Execution(step_s=1.0) and stepper.graphs is None
    kept = verify(stepper, Execution(graph=True), replace(GPU, requested="graph"))
    assert kept == Execution(graph=True, step_s=0.99) and stepper.graphs


@pytest.mark.parametrize(
    ("failure", "note"),
    [(torch.OutOfMemoryError(), "not enough memory"), (RuntimeError("a sync\nat length"), "RuntimeError: a sync")],
)
def test_a_graph_that_cannot_be_recorded_is_left_out(stepper, graphs, monkeypatch, failure, note):
    monkeypatch.setattr(stepper, "record_graphs", lambda: (_ for _ in ()).throw(failure))
    decided = verify(stepper, Execution(graph=True), replace(GPU, requested="graph"))
    assert decided == Execution(step_s=1.0, notes=(f"no CUDA graph: {note}",)) and stepper.graphs is None


def test_compiled_steps_are_recorded_anew(stepper, graphs, pretend):
    stepper.execution = verify(stepper, Execution(graph=True), GPU)
    pretend((5.5, 1.0), (5.5, 0.5))
    graphs.step_s = 0.25
    decided = verify(stepper, Execution(graph=True, compiled=True), replace(GPU, max_steps=10**6))
    assert decided.name == "on" and decided.graph and graphs == [False, True]
    assert decided.notes == ("compiled: a step takes 50% of its time before",)


@pytest.mark.parametrize("compiled", [False, True])
def test_for_another_length_steps_are_compiled_and_recorded_anew(stepper, graphs, pretend, monkeypatch, compiled):
    stepper.execution = before = Execution(graph=True, compiled=compiled, step_s=0.5)
    stepper.graphs = first = object()
    if compiled:
        compile_blocks(stepper.step.model)
    pretend((5.5, 1.0), (5.5, 0.5))
    released = Mock(wraps=stepper.release_graphs)
    monkeypatch.setattr(stepper, "release_graphs", released)
    assert shorten(stepper, 0.4) == before and released.call_count == 1
    assert stepper.pieces == 2 and is_compiled(stepper) == compiled and graphs == [compiled] and stepper.graphs != first
    assert shorten(stepper, 0.4) == before and len(graphs) == 1


def test_what_is_compiled_for_another_length_is_compared_with_eager_blocks(stepper, monkeypatch):
    """On a CPU; with dropout they are tried without it, then compiled with it."""
    tried = []

    def try_micro_batch(stepper, *, compiled, with_dropout=False):
        assert is_compiled(stepper) == compiled
        tried.append((compiled, with_dropout, stepper.part(n_micro=1)[0].shape[1] * stepper.pieces))
        return Trial(5.5, 1.0, torch.ones(1))

    monkeypatch.setattr(compilation, "try_micro_batch", try_micro_batch)
    compile_blocks(stepper.step.model)
    stepper.execution = before = Execution(compiled=True, step_s=0.5)
    model = stepper.step.model
    monkeypatch.setattr(model, "config", replace(model.config, dropout=0.1))
    T = stepper.loader.seq_len
    for progress, pieces in ((0.2, 2), (0.5, 1)):
        assert shorten(stepper, progress) == before and stepper.pieces == pieces
        assert tried == [(False, False, T), (True, False, T), (True, True, T)]
        tried.clear()


def test_memory_that_does_not_suffice_for_another_length_takes_smaller_micro_batches(stepper, graphs, monkeypatch):
    stepper.execution, stepper.graphs = Execution(graph=True, step_s=0.5), object()
    seconds, before = iter((math.inf, 1.0, 0.5)), stepper.batch_size
    monkeypatch.setattr(compilation, "_step_seconds_or_inf", lambda stepper: next(seconds))
    assert shorten(stepper, 0.4) == Execution(graph=True, step_s=0.5)
    assert stepper.batch_size == before // 2 and graphs == [False]


def test_ranks_record_for_another_length_only_where_all_have_graphs(stepper, graphs, monkeypatch):
    monkeypatch.setattr(stepper, "ranks", Mock(count=1, any=lambda flag: True, most=lambda x: x))
    stepper.execution, stepper.graphs = Execution(graph=True, step_s=0.5), object()
    assert shorten(stepper, 0.4) == Execution(step_s=1.0)
    assert graphs == [] and stepper.graphs is None


def test_what_does_not_work_for_another_length_is_left_out(stepper, graphs, pretend, monkeypatch):
    stepper.execution, stepper.graphs = Execution(graph=True, compiled=True, step_s=0.5), object()
    compile_blocks(stepper.step.model)
    pretend((5.5, 1.0), (5.9, 0.5))
    monkeypatch.setattr(stepper, "record_graphs", run_out)
    notes = ("not compiled: the loss differs from eager by 7.3e-02", "no CUDA graph: not enough memory")
    assert shorten(stepper, 0.4) == Execution(step_s=1.0, notes=notes)
    assert stepper.pieces == 2 and not is_compiled(stepper) and stepper.graphs is None


def test_graphs_that_were_lost_are_not_recorded_for_another_length(stepper, graphs):
    stepper.execution = Execution(graph=True, step_s=0.5)
    assert shorten(stepper, 0.4) == Execution(step_s=1.0) and graphs == []


def test_graphs_that_a_want_of_memory_has_cost_are_not_recorded_anew(stepper, graphs, pretend):
    stepper.execution = verify(stepper, Execution(graph=True), GPU)
    stepper.graphs = None
    pretend((5.5, 1.0), (5.5, 0.5))
    decided = verify(stepper, Execution(graph=True, compiled=True), replace(GPU, requested="on"))
    assert decided.compiled and not decided.graph and graphs == [False]


def test_steps_that_are_no_faster_compiled_are_recorded_as_they_were(stepper, graphs, pretend):
    stepper.execution = verify(stepper, Execution(graph=True), GPU)
    pretend((5.5, 1.0), (5.5, 0.5))
    decided = verify(stepper, Execution(graph=True, compiled=True), replace(GPU, max_steps=10**6))
    assert decided.name == "graph" and graphs == [False, True, False] and not is_compiled(stepper)
    assert decided.notes == ("not compiled: no faster here",)


def test_smaller_micro_batches_stay_where_the_first_step_needed_them(start, workspace, monkeypatch):
    _, trainer = start(workspace / "run")
    stepper, before = trainer.stepper, trainer.config.batch_size

    def step_seconds(stepper):
        if stepper.batch_size == before:
            raise torch.OutOfMemoryError
        return 1.0

    monkeypatch.setattr(compilation, "step_seconds", step_seconds)
    trainer.device = stepper.device = torch.device("cuda")
    monkeypatch.setattr(stepper, "record_graphs", run_out)
    assert trainer.choose_execution("graph").batch_size == stepper.batch_size == before // 2
    assert trainer.config.compile == "off" and "out of memory at step 1" in trainer.journal.events[0]


def test_compiled_steps_on_a_cpu_alone_are_deterministic():
    cpu = torch.device("cpu")
    for execution, device, expected in (
        (Execution(compiled=True), cpu, True),
        (Execution(), cpu, False),
        (Execution(compiled=True), torch.device("cuda"), False),
    ):
        with ordered_sums(execution, device):
            assert torch.are_deterministic_algorithms_enabled() == expected
        assert not torch.are_deterministic_algorithms_enabled()


def test_names_in_the_state_dict_stay(stepper):
    model = stepper.step.model
    before = list(model.state_dict())
    compile_blocks(model)
    assert is_compiled(stepper) and list(model.state_dict()) == before
    undo_compile(model)
    assert not is_compiled(stepper)


def test_timing_leaves_nothing_behind(stepper):
    model = stepper.step.model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trial = compilation.try_micro_batch(stepper, compiled=False)
    assert 5 < trial.loss < 6 and trial.seconds > 0 and (trial.norms > 0).all()
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_divided_model_has_no_graphs_and_is_compiled_where_that_is_asked_for():
    divided = {how: replace(GPU, requested=how, max_steps=10**6, is_divided=True) for how in ("on", "auto", "graph")}
    asked, auto, graph = map(choose, divided.values())
    assert asked.compiled and not (auto.compiled or graph.compiled or asked.graph or auto.graph or graph.graph)
    assert [len(found.notes) for found in (asked, auto, graph)] == [1, 2, 1]
    assert choose(replace(GPU, requested="off", is_divided=True)) == Execution()


def test_a_function_that_no_token_chose_has_no_gradient_and_counts_as_one_of_zero(stepper):
    model = stepper.step.model
    model.register_parameter("unused", torch.nn.Parameter(torch.ones(3)))
    trial = try_micro_batch(stepper, compiled=False)
    assert len(trial.norms) == len([*model.parameters()]) and trial.norms.count_nonzero() == len(trial.norms) - 1
