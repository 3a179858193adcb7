import shlex
from dataclasses import replace

import pytest
import torch

from nnx_cli.errors import QualityError
from nnx_cli.training.recovery import retry_command


def test_memory_that_a_graph_keeps_is_given_back_to_look(start, workspace):
    run, trainer = start(workspace / "a")
    stepper, recovery, tries = trainer.stepper, trainer.recovery, []
    stepper.graphs = object()

    def look():
        tries.append(stepper.graphs)
        if stepper.graphs is not None:
            raise torch.OutOfMemoryError
        return "seen"

    assert recovery.retry_on_oom(look) == "seen" and len(tries) == 2
    assert "without its CUDA graph" in trainer.journal.events[0]
    with pytest.raises(torch.OutOfMemoryError):
        recovery.retry_on_oom(lambda: (_ for _ in ()).throw(torch.OutOfMemoryError()))


def test_a_learning_rate_that_is_too_high_ends_a_run(start, workspace):
    run, trainer = start(workspace / "weights" / "a b", lr=30.0, max_steps=12)
    command = "nnx train --data 'my data' --lr 30 --out 'weights/a b' --min-lr=1 --learning_rate=30 --dim 32"
    run.set_status(command=command)
    trainer.config = replace(trainer.config, min_lr=1.0)
    with run.lock(), pytest.raises(QualityError, match="diverged: its validation loss .* learning rate, 30") as error:
        trainer.train(run, lambda: False)
    words = shlex.split(error.value.fix)
    assert words[:6] == ["nnx", "train", "--data", "my data", "--dim", "32"] and words[6] == "--lr"
    assert float(words[7]) < 0.1 and words[8:] == ["--out", str(workspace / "weights" / "a b-2")]
    assert run.newest_checkpoint()[0].step == 12 and run.best_found()["best_step"] == run.status()["best_step"]


def test_a_command_that_is_not_known_is_not_made_up(start, workspace):
    run, trainer = start(workspace / "a")
    run.set_status(command="python train.py")
    assert retry_command(run, trainer.model, trainer.config) == "start it again with --lr 0.00075"
