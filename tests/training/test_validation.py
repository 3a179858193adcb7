import pytest
import torch

from nnx_cli.training import validation


def test_validation_takes_less_memory_before_the_graph_goes(start, workspace, monkeypatch):
    run, trainer = start(workspace / "a", batch_size=4)
    stepper, graph, tries = trainer.stepper, object(), []
    plain = validation.evaluate

    class Losses:
        def __init__(self, model, rows, seq_len):
            tries.append(f"{rows} recorded")
            if rows > least:
                raise torch.OutOfMemoryError

        def __call__(self, *arguments):
            return validation.token_losses(*arguments)

    def evaluate(model, tokens, *, batch_size, losses_of, **rest):
        if losses_of is validation.token_losses:
            tries.append(batch_size)
            if stepper.graphs is not None and not plainly:
                raise torch.OutOfMemoryError
        return plain(model, tokens, batch_size=batch_size, losses_of=losses_of, **rest)

    monkeypatch.setattr(validation, "graphed_losses", Losses)
    monkeypatch.setattr(validation, "evaluate", evaluate)
    seen = []
    for least, plainly, expected in (
        (9, False, ["4 recorded"]),
        (2, False, ["4 recorded", "2 recorded"]),
        (0, True, ["4 recorded", "2 recorded", "1 recorded", 1]),
        (0, False, ["4 recorded", "2 recorded", "1 recorded", 1, 4]),
    ):
        stepper.graphs = graph
        trainer.validation.reset()
        tries.clear()
        seen.append(trainer.validate(run, 1.0).loss)
        assert tries == expected
        assert (stepper.graphs is graph) == (least > 0 or plainly)
        assert trainer.model.training
    assert seen == pytest.approx(seen[:1] * 4)
