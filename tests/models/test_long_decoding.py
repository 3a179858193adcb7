"""What a model writes token by token is what it would have written reading everything anew."""

import pytest
import torch

from nnx_cli import models

N_TOKENS = 300


@pytest.mark.parametrize("name", models.names())
@torch.inference_mode()
def test_three_hundred_tokens_are_those_of_the_full_pass(name, tiny):
    """Two prompts side by side, of different length, each token drawn from what the cache makes of those before."""
    model = tiny(name, seq_len=N_TOKENS + 8).eval()
    prompts, draw = [[1, 2, 3, 4, 5, 6, 7, 8], [9, 10, 11]], torch.Generator().manual_seed(4)
    cache = model.make_cache(2, N_TOKENS + 8)
    padded = torch.tensor([prompt + [0] * (8 - len(prompt)) for prompt in prompts])
    first = model(padded, cache=cache)
    cache.truncate(torch.tensor([len(prompt) for prompt in prompts]))
    cached = [torch.stack([first[row, len(prompt) - 1] for row, prompt in enumerate(prompts)])]
    tokens = []
    for _ in range(N_TOKENS):
        tokens.append(cached[-1].softmax(-1).multinomial(1, generator=draw))
        cached.append(model(tokens[-1], cache=cache)[:, -1])
    drawn, steps = torch.cat(tokens, 1), torch.stack(cached, 1)
    for row, prompt in enumerate(prompts):
        logits = model(torch.cat((torch.tensor(prompt), drawn[row]))[None])[0, len(prompt) - 1 :]
        difference = (steps[row] - logits).abs().max()
        assert difference < 1e-4, difference
        assert torch.equal(steps[row].argmax(1), logits.argmax(1))
