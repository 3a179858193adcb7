import pytest
import torch

from nnx_cli.layers.blocks import compile_blocks, undo_compile
from nnx_cli.training import compilation as compiler
from nnx_cli.training.compilation import Trial, decide, planned_seconds


@pytest.fixture
def trainer(start, workspace):
    """A trainer that remembers its notes; nothing is compiled for real."""
    _, trainer = start(workspace / "run")
    trainer.notes = []
    trainer.observer.note = trainer.notes.append
    yield trainer
    undo_compile(trainer.model)


@pytest.fixture
def pretend(monkeypatch):
    """Pretends losses and step times of eager and compiled blocks, so that no compiler is needed."""

    def install(eager, compiled):
        results = iter([eager, compiled])

        def timed(trainer):
            result = next(results)
            if isinstance(result, Exception):
                raise result
            loss, seconds, *norms = result
            return Trial(loss, seconds, torch.tensor(norms or [1.0, 2.0]))

        monkeypatch.setattr(compiler, "timed", timed)
        monkeypatch.setattr(compiler.shutil, "which", lambda name: f"/usr/bin/{name}")

    return install


def is_compiled(trainer):
    flags = {block._compiled_call_impl is not None for block in trainer.model.blocks}
    assert len(flags) == 1
    return flags.pop()


def test_off_is_off(trainer, monkeypatch):
    monkeypatch.setattr(compiler, "timed", None)
    assert decide(trainer, "off") == "off" and trainer.notes == [] and not is_compiled(trainer)


@pytest.mark.parametrize("wish", ["auto", "on"])
def test_a_machine_without_a_compiler_trains_eagerly_and_says_so(trainer, monkeypatch, wish):
    monkeypatch.setattr(compiler.shutil, "which", lambda name: None)
    assert decide(trainer, wish) == "off" and not is_compiled(trainer)
    assert trainer.notes == ["not compiled: there is no C++ compiler here"]


def test_what_is_right_and_faster_is_kept(trainer, pretend):
    pretend((5.5, 100.0), (5.5 + 1e-5, 60.0))
    assert decide(trainer, "on") == "on" and is_compiled(trainer)
    assert trainer.notes == ["compiled: a step takes 60% of its time before"]


@pytest.mark.parametrize("wish", ["auto", "on"])
@pytest.mark.parametrize("loss", [5.6, float("nan"), float("inf")])
def test_a_wrong_result_is_not_kept(trainer, pretend, wish, loss):
    pretend((5.5, 1000.0), (loss, 1.0))
    assert decide(trainer, wish) == "off" and not is_compiled(trainer)
    assert "the loss differs from eager" in trainer.notes[0]


def test_steps_in_the_backward_pass_are_not_compiled(trainer, monkeypatch):
    monkeypatch.setattr(compiler, "timed", None)
    trainer.step.in_backward = True
    assert decide(trainer, "on") == "off" and "--optimizer-in-backward" in trainer.notes[0]
    assert decide(trainer, "auto") == "off"


@pytest.mark.parametrize("norms", [(1.0, 2.1), (0.0, 0.0), (1.0, float("nan"))])
def test_a_wrong_gradient_is_not_kept(trainer, pretend, norms):
    pretend((5.5, 1000.0, 1.0, 2.0), (5.5, 1.0, *norms))
    assert decide(trainer, "auto") == "off" and not is_compiled(trainer)
    assert "the gradient differs from eager" in trainer.notes[0]


def test_auto_keeps_nothing_that_is_slower(trainer, pretend):
    pretend((5.5, 1000.0), (5.5, 1001.0))
    assert decide(trainer, "auto") == "off" and not is_compiled(trainer)
    assert trainer.notes == ["not compiled: no faster here"]


def test_on_keeps_what_is_slower(trainer, pretend):
    pretend((5.5, 1.0), (5.5, 1.1))
    assert decide(trainer, "on") == "on"


@pytest.mark.parametrize(
    "failure",
    [
        RuntimeError("the compiler crashed\nat length"),
        torch._dynamo.exc.Unsupported("a graph break"),
    ],
)
def test_a_compiler_that_fails_is_not_used(trainer, pretend, failure):
    pretend((5.5, 1000.0), failure)
    assert decide(trainer, "auto") == "off" and not is_compiled(trainer)
    assert trainer.notes[0].startswith(f"not compiled: {type(failure).__name__}: ") and "\n" not in trainer.notes[0]


def test_auto_does_not_compile_for_a_short_run(trainer, pretend):
    pretend((5.5, 0.001), RuntimeError("not tried"))
    assert decide(trainer, "auto") == "off" and trainer.notes == []


def test_the_time_ahead(trainer):
    assert planned_seconds(trainer, 0.5) == 12 * 0.5
    trainer.state.step = 9
    assert planned_seconds(trainer, 0.5) == pytest.approx(12 * 0.5 / 4)


def test_a_step_is_timed_by_its_first_micro_batches_and_its_end_once(start, workspace, monkeypatch):
    _, trainer = start(workspace / "run", batch_size=2, grad_accum=4)
    clock = [0.0]

    def run_step(ids, targets):
        clock[0] += len(ids) // 2 * 1.0 + 10.0  # micro-batches of 1 s, and an end of 10

    monkeypatch.setattr(trainer, "run_step", run_step)
    monkeypatch.setattr(compiler.time, "perf_counter", lambda: clock[0])
    assert compiler.timed_step(trainer) == 14.0


def test_memory_that_runs_out_once_blocks_are_compiled_undoes_that(trainer, pretend, monkeypatch):
    def run_out(trainer):
        raise torch.OutOfMemoryError

    pretend((5.5, 100.0), (5.5, 60.0))
    trainer.device = torch.device("cuda")
    monkeypatch.setattr(compiler, "timed_step", run_out)
    monkeypatch.setattr(compiler, "compile_checked", lambda trainer, eager: compile_blocks(trainer.model) or 1.0)
    compiler.go_on(trainer, "on", 1.0)
    assert not is_compiled(trainer) and trainer.notes == ["not compiled: not enough memory"]


def test_smaller_micro_batches_stay_where_the_first_step_needed_them(trainer, monkeypatch):
    before = trainer.config.batch_size

    def timed(trainer):
        if trainer.config.batch_size == before:
            trainer.shrink()
        return Trial(5.5, 1.0, torch.ones(1))

    monkeypatch.setattr(compiler, "timed", timed)
    monkeypatch.setattr(compiler.shutil, "which", lambda name: f"/usr/bin/{name}")
    decide(trainer, "on")
    assert trainer.config.batch_size < before and trainer.config.compile == "on"


def test_names_in_the_state_dict_stay(trainer):
    before = list(trainer.model.state_dict())
    compile_blocks(trainer.model)
    assert is_compiled(trainer) and list(trainer.model.state_dict()) == before
    undo_compile(trainer.model)
    assert not is_compiled(trainer)


def test_timing_leaves_nothing_behind(trainer):
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trial = compiler.timed(trainer)
    assert 5 < trial.loss < 6 and trial.seconds > 0 and (trial.norms > 0).all()
    assert all(p.grad is None for p in trainer.model.parameters())
    assert all(torch.equal(before[key], value) for key, value in trainer.model.state_dict().items())
