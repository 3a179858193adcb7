"""A file of the user's with an architecture, tried on a few random tokens before it trains: what `_base` promises holds
of it, or it is refused with the rule."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import NoReturn

import torch
from torch import Tensor, nn

from nnx_cli.errors import UsageError
from nnx_cli.layers.kv_cache import Cache
from nnx_cli.models._base import LanguageModel, ModelConfig
from nnx_cli.models._file import EXAMPLE, blaming, is_file, load_file

ROWS, TOKENS = 2, 48  # that are tried, at most
MOST_PARAMETERS = 2**23  # of the model that is tried: a larger one is tried in its file's first size
NOISE = 0.02  # added to all parameters, for what begins as zero hides what is behind it
LEAK, DRIFT = 1e-4, 1e-2  # of the largest logit: what later tokens, and a cache, may change by rounding
CACHE = ("span", "n_bytes", "note_advance", "truncate", "repeat", "take", "reset", "put")  # what sampling asks of one


def check_model(name: str, config: ModelConfig) -> None:
    """Raise UsageError, with the file and the rule, unless the model in it gives (B, T, V) finite logits, no one of
    which depends on later tokens, and the same with its cache. The zoo's own are not tried."""
    if not is_file(name):
        return
    config = replace(config, dropout=0.0)
    with torch.random.fork_rng(devices=()), torch.no_grad():
        torch.default_generator.manual_seed(0)
        with torch.device("meta"):
            model = _built(name, config)
            _logits(name, model, torch.zeros(ROWS, min(TOKENS, config.seq_len), dtype=torch.int64))
        if sum(p.numel() for p in model.parameters()) > MOST_PARAMETERS:
            config = _first_size(name, config)
        model = _built(name, config).eval()
        ids = torch.randint(config.vocab_size, (ROWS, min(TOKENS, config.seq_len)))
        if not _logits(name, model, ids).isfinite().all():
            _refuse(name, "the logits of a new model must be finite, and they are not")
        for parameter in model.parameters():
            parameter.add_(NOISE * torch.randn_like(parameter))
        with blaming(name, "post_optim_step"):
            model.post_optim_step()
        _check_causal(name, model, ids)
        _check_cache(name, model, ids)


def _refuse(name: str, rule: str, fix: str = EXAMPLE) -> NoReturn:
    raise UsageError(f"--model {name}: {rule}", fix=fix)


def _built(name: str, config: ModelConfig) -> LanguageModel:
    """The model, with the parts that training and planning reach for."""
    with blaming(name, "making its Model"):
        model = load_file(name).Model(config)
    for part, kind in (("embedding", nn.Embedding), ("blocks", nn.ModuleList), ("head", nn.Module)):
        if not isinstance(getattr(model, part, None), kind):
            _refuse(name, f"Model must set self.{part}, an nn.{kind.__name__}")
    return model


def _first_size(name: str, config: ModelConfig) -> ModelConfig:
    """The first size of the file, with all of `config` that is in none of its sizes; `config` where that cannot be."""
    module = load_file(name)
    shape = {field.name for field in fields(config) if field.default is None}.union(*module.SIZES.values())
    kept = {field.name: getattr(config, field.name) for field in fields(config) if field.name not in shape}
    kept["vocab_size"] = min(config.vocab_size, ModelConfig.vocab_size)
    try:
        return module.Config(**kept | next(iter(module.SIZES.values())))
    except UsageError:
        return config


def _logits(name: str, model: LanguageModel, ids: Tensor) -> Tensor:
    """Logits as training computes them, of the shape that they must have."""
    with blaming(name, "a forward pass"):
        logits = model.head(model.trunk(ids))
    wanted = (*ids.shape, model.config.vocab_size)
    if not isinstance(logits, Tensor) or logits.shape != wanted:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        _refuse(
            name, f"head(trunk(input_ids)) must be logits (B, T, V): {wanted} for {tuple(ids.shape)}, and it is {found}"
        )
    return logits


def _check_causal(name: str, model: LanguageModel, ids: Tensor) -> None:
    """Raise UsageError where the later half of the tokens changes the logits of the earlier one."""
    half, other, vocab_size = ids.shape[1] // 2, ids.clone(), model.config.vocab_size
    other[:, half:] += torch.randint(1, max(2, vocab_size), other[:, half:].shape)
    before, after = (_seeded(name, model, each % vocab_size)[:, :half] for each in (ids, other))
    if half and (leak := _largest(before - after)) > LEAK * _largest(before):
        _refuse(
            name,
            f"a logit must not depend on later tokens; other tokens from position {half} on change the logits before "
            f"it by up to {leak:.2g}",
            fix="mask attention, pad convolutions on the left alone, and take no mean over all positions",
        )


def _check_cache(name: str, model: LanguageModel, ids: Tensor) -> None:
    """Raise UsageError unless a model has a cache, and passes with it continue each other."""
    if type(model).make_cache is LanguageModel.make_cache:
        _refuse(name, "Model must define make_cache(batch_size, max_seq_len), for sampling decodes with a cache")
    n_tokens, whole = ids.shape[1], _seeded(name, model, ids)
    with blaming(name, "make_cache"):
        cache: Cache = model.make_cache(ROWS, n_tokens)
    if missing := [method for method in CACHE if not hasattr(cache, method)]:
        _refuse(name, f"its cache must have {missing[0]}, as nnx_cli.layers.kv_cache.KVCache does; a subclass has all")
    half = n_tokens // 2
    with blaming(name, "a forward pass with its cache"):
        bounds = [*dict.fromkeys((0, half, half + 1, half + 2, n_tokens))]
        parts = [ids[:, a:b] for a, b in zip(bounds, bounds[1:], strict=False) if a < b <= n_tokens]
        logits = torch.cat([model(part, cache=cache) for part in parts], dim=1)
        cache.truncate(torch.full((ROWS,), half))
        again = model(ids[:, half : half + 1], cache=cache)
    for found, wanted, what in (
        (logits, whole, "passes with its cache, one after another, must give the logits of one pass without"),
        (again, whole[:, half : half + 1], "after truncate(n) its cache must go on behind n tokens"),
    ):
        if found.shape != wanted.shape or _largest(found - wanted) > DRIFT * _largest(whole):
            _refuse(name, f"{what}; they differ")


def _seeded(name: str, model: LanguageModel, ids: Tensor) -> Tensor:
    """Logits, with the same random numbers every time where the model draws any."""
    torch.default_generator.manual_seed(1)
    return _logits(name, model, ids)


def _largest(x: Tensor) -> float:
    return float(x.abs().max())
