"""What a model attends to, gates and selects in a text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnx_cli.data.tokenizers.base import StreamDecoder, Tokenizer
from nnx_cli.layers.insides import Insides, Panel, by_layer, watched
from nnx_cli.models._base import LanguageModel
from nnx_cli.runs.snapshots import Snapshot

MOST_TOKENS, LEAST_TOKENS = 32, 8  # of the prompt of a snapshot
MAPS_OF_A_HEAD = 2  # that an architecture may have
MOST_WEIGHTS = 2**18  # of the attention of a snapshot, about: half of its file
END = "end of text"
NORMS = (
    "The size (root mean square of the elements) of each layer's matrices, and of what the layer puts out for the "
    "text. Normal: weights that grow slowly; activations of one order of magnitude, larger in later layers. Before a "
    "run diverges, activations often grow many times over."
)
SURPRISE = (
    "How surprised the model is by each piece of validation text, which it never learns from: the darker, the less it "
    "expected it. Normal: the first letters of words are dark, their ends pale; early in training all is dark."
)

HEADS = (
    "What each head looks at, on average over the text: shares of its attention, and how many tokens back it looks. "
    "Normal: heads of different reach; a head that gives nearly all to the first token is resting."
)


def look_inside(model: LanguageModel, ids: Sequence[int]) -> Insides:
    """The insides of a model with the tokens `ids`, where its heads look among them; no attention where it has none.

    The model is left as it was, and so are the random numbers of others."""
    with _left_as_it_was(model):
        return with_heads(model.insides(torch.tensor([list(ids)], device=model.device)))


def with_heads(insides: Insides) -> Insides:
    """With a panel of where the heads look, in front of the others."""
    if not insides.attention:
        return insides
    return replace(insides, panels=[_heads(insides.attention, insides.layers), *insides.panels])


def spelled_out(insides: Insides, tokenizer: Tokenizer | None) -> Insides:
    """With tokens as code would write them in the place of their ids."""

    def spelled(panel: Panel) -> Panel:
        return replace(panel, tokens=[[token_as_code(tokenizer, token) for token in row] for row in panel.tokens or ()])

    return replace(insides, panels=[panel if panel.tokens is None else spelled(panel) for panel in insides.panels])


def take_snapshot(model: LanguageModel, tokenizer: Tokenizer | None, ids: Sequence[int], step: int) -> Snapshot:
    """What a model in training does inside, after `step` steps, with the text `ids` (two tokens or more) and with the
    beginning of it.

    The model is left as it was, and so are the random numbers of others."""
    config = model.config
    n_maps = len(model.blocks) * config.n_heads * MAPS_OF_A_HEAD
    room = max(LEAST_TOKENS, int((MOST_WEIGHTS / n_maps) ** 0.5))
    prompt, text = ids[: min(room, MOST_TOKENS, config.seq_len)], ids[: config.seq_len + 1]
    with _left_as_it_was(model):
        insides = model.insides(torch.tensor([list(prompt)], device=model.device))
        insides = replace(insides, panels=[panel for panel in insides.panels if panel.tokens is None])
        states, lost = _read(model, text)
    layers = [f"layer {number}" for number in range(1, len(model.blocks) + 1)]
    norms = torch.stack((torch.stack([_weight_rms(block) for block in model.blocks]).cpu(), states), dim=-1)
    pieces, surprise = _by_piece(tokenizer, text, [math.nan, *lost.tolist()])
    return Snapshot(
        step,
        [token_as_code(tokenizer, token) for token in prompt],
        insides,
        Panel("Norms by layer", NORMS, norms, layers, "number", ("weights", "activations")),
        Panel("Surprise", SURPRISE, torch.tensor([surprise]), ["nats"], "share", pieces),
    )


def _read(model: LanguageModel, text: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The size of the activations that each block puts out for a text, nan where it cannot be told, and the loss of
    each of its tokens but the first; both float32 on the CPU."""
    with watched(model.blocks, lambda _, output: _rms(output[0] if isinstance(output, tuple) else output)) as states:
        logits = model(torch.tensor([text[:-1]], device=model.device))[0]
    targets = torch.tensor(text[1:], device=logits.device)
    losses = F.cross_entropy(logits.float(), targets, reduction="none").cpu()
    if len(states) != len(model.blocks):
        return torch.full((len(model.blocks),), math.nan), losses
    return torch.stack(states).cpu(), losses


def _rms(x: Tensor) -> Tensor:
    """The root mean square of the elements."""
    return torch.linalg.vector_norm(x, dtype=torch.float32) / max(1, x.numel()) ** 0.5


def _weight_rms(block: nn.Module) -> Tensor:
    """The root mean square of the elements of a block's matrices; nan where it has none."""
    matrices = [p.detach() for p in block.parameters() if p.dim() > 1]
    if not matrices:
        return torch.tensor(math.nan)
    squares = [torch.linalg.vector_norm(each, dtype=torch.float32).square() for each in matrices]
    return (torch.stack(squares).sum() / sum(each.numel() for each in matrices)).sqrt()


def token_as_code(tokenizer: Tokenizer | None, token: int) -> str:
    """A token as code would write it, so that blanks and line ends are seen; its id where there is no tokenizer."""
    if tokenizer is None:
        return str(token)
    if special := _special(tokenizer, token):
        return special
    raw = tokenizer.decode_bytes([token])
    try:
        return repr(raw.decode())
    except UnicodeDecodeError:
        return repr(raw)[1:]


def _special(tokenizer: Tokenizer, token: int) -> str:
    """What a special token is called; nothing for another one."""
    if token == tokenizer.eot_id:
        return END
    return next((name for name, number in tokenizer.specials.items() if number == token), "")


def _by_piece(
    tokenizer: Tokenizer | None, ids: Sequence[int], losses: Sequence[float]
) -> tuple[list[str], list[float]]:
    """A text in pieces of whole characters, each with the loss of its tokens together."""
    if tokenizer is None:
        return [f"{token} " for token in ids], list(losses)
    decoder = StreamDecoder(tokenizer)
    pieces: list[str] = []
    sums: list[float] = []
    open_loss = 0.0
    for token, loss in zip(ids, losses, strict=True):
        open_loss += loss
        piece = _special(tokenizer, token) or decoder.push(token)
        if piece:
            pieces.append(piece)
            sums.append(open_loss)
            open_loss = 0.0
    return pieces, sums


@contextmanager
def _left_as_it_was(model: LanguageModel) -> Iterator[None]:
    """The model in evaluation mode, without gradients and with random numbers of its own."""
    was_training = model.training
    devices = [model.device] if model.device.type == "cuda" else []
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            yield
    finally:
        model.train(was_training)


def _heads(attention: Sequence[Tensor], layers: Sequence[str]) -> Panel:
    """What every head looks at, on average over the tokens that have a choice."""
    rows: list[str] = []
    values = []
    for name, weights in zip(layers, attention, strict=True):
        T = weights.shape[-1]
        at = torch.arange(T)
        back = (at[:, None] - at).clamp(min=0).float()
        chooses = slice(1 if T > 1 else 0, None)
        itself = weights.diagonal(dim1=-2, dim2=-1)[:, chooses].mean(-1)
        before = weights.diagonal(-1, -2, -1).mean(-1) if T > 1 else torch.zeros_like(itself)
        first = weights[:, chooses, 0].mean(-1)
        reach = (weights.abs() * back).sum(-1) / weights.abs().sum(-1).clamp(min=1e-9)
        rows += by_layer([name], len(weights), "head")
        values.append(torch.stack((itself, before, first, reach[:, chooses].mean(-1)), dim=-1))
    columns = ("itself", "token before", "first token", "tokens back")
    return Panel("Heads", HEADS, torch.cat(values), rows, "number", columns)
