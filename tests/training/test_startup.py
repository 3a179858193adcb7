"""What is on the screen while a run starts, for torch takes seconds to load what planning and optimizers need."""

from nnx_cli.errors import DataError
from nnx_cli.training import session


def test_plan_size_and_data_are_shown_before_an_optimizer_is_made(nnx, token_path, tokens, monkeypatch):
    def start(*args):
        raise DataError("an optimizer would be made here")

    monkeypatch.setattr(session, "start", start)
    words = f"train --model ngpt --n-layers 1 --dim 32 --n-heads 2 --seq-len 16 --data {token_path} --device cpu"
    shown, end = nnx(*words.split(), "--threads", 1, "--max-steps", 2).stderr.split("an optimizer would be made here")
    assert "ngpt on CPU" in shown and f"{len(tokens.train):,} tokens to train on" in shown
    assert "length         2 steps of" in shown and "run folder" in shown and not end.strip()
