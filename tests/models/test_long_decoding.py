"""What a model writes token by token is what it would have written reading everything anew."""

import pytest
import torch

from nnx_cli import models
from nnx_cli.config import SampleConfig
from nnx_cli.inference.generate import generate

N_TOKENS = 300


@pytest.mark.parametrize("name", models.names())
def test_three_hundred_tokens_are_those_of_the_full_pass(name, tiny):
    model = tiny(name, seq_len=N_TOKENS + 8).eval()
    prompts = [[1, 2, 3, 4, 5, 6, 7, 8], [9, 10, 11]]
    drawn = generate(model, None, prompts, SampleConfig(max_new_tokens=N_TOKENS, temperature=1.0, seed=4))
    for prompt, sample in zip(prompts, drawn.samples, strict=True):
        assert len(sample.tokens) == N_TOKENS
        with torch.no_grad():
            logits = model(torch.tensor([prompt + sample.tokens]))[0, len(prompt) - 1 : -1]
        cache = model.make_cache(1, N_TOKENS + 8)
        with torch.no_grad():
            cached = [model(torch.tensor([prompt]), cache=cache)[0, -1]]
            cached += [model(torch.tensor([[token]]), cache=cache)[0, -1] for token in sample.tokens[:-1]]
        difference = (torch.stack(cached) - logits).abs().max()
        assert difference < 1e-4, difference
        assert torch.equal(torch.stack(cached).argmax(1), logits.argmax(1))
