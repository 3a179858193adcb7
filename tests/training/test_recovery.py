import pytest
import torch


def test_memory_that_a_graph_keeps_is_given_back_to_look(start, workspace):
    run, trainer = start(workspace / "a")
    stepper, recovery, tries = trainer.stepper, trainer.recovery, []
    stepper.graphs = object()

    def look():
        tries.append(stepper.graphs)
        if stepper.graphs is not None:
            raise torch.OutOfMemoryError
        return "seen"

    assert recovery.retry_on_oom(look) == "seen" and len(tries) == 2 and "no graph" in trainer.journal.events[0]
    with pytest.raises(torch.OutOfMemoryError):
        recovery.retry_on_oom(lambda: (_ for _ in ()).throw(torch.OutOfMemoryError()))
