"""Shapes of one size for different architectures: as many parameters outside the tables of token ids."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from nnx_cli import models
from nnx_cli.errors import UsageError
from nnx_cli.models._base import LanguageModel, ModelConfig
from nnx_cli.planning.flops import count_parameters, meta_model

CONTROL = "llama"  # whose named sizes say how many parameters a size has
TOLERANCE = 0.02  # of the parameters that are asked for
STEP, FFN_STEP = 16, 8  # of the widths of heads and of the model, and of the feed-forward
DEPTHS = (0.6, 1.7)  # of the template's depth
ODD_DEPTHS = (0.3, 4.0)  # where none of those will do, and no width of a feed-forward makes up the difference
WIDTHS = 2  # multiples of STEP that are tried around the one that fits best
MOST_FFN = 0.5  # part by which the feed-forward may be wider or narrower than its architecture has it
MOST_HEAD = 256


@dataclass(frozen=True)
class Match:
    """An architecture in the shape that has the parameters asked for. `size`: its named size, None: another shape."""

    config: ModelConfig
    size: str | None
    parameters: int
    without_tables: int


@dataclass(frozen=True)
class _Shape:
    """A candidate: its own fields, and how far it is from what its author would have built (0: not at all)."""

    dim: int
    n_layers: int
    n_heads: int
    ffn_dim: int | None
    odds: float


def parameters_without_tables(model: LanguageModel) -> int:
    """Parameters, each once, of neither the embedding nor the head."""
    tables = {id(p): p for part in (model.embedding, model.head) for p in part.parameters()}
    return count_parameters(model)["total"] - sum(p.numel() for p in tables.values())


def size_target(size: str) -> int:
    """Parameters outside the tables that a named size stands for: those of the control. Raises UsageError for none."""
    return parameters_without_tables(meta_model(CONTROL, models.make_config(CONTROL, size=size)))


def context_for(target: int) -> int:
    """Positions of a training sample in races of models with so many parameters outside the tables."""
    sizes = models.sizes(CONTROL)
    nearest = min(sizes, key=lambda size: abs(math.log(target / size_target(size))))
    return models.make_config(CONTROL, size=nearest).seq_len


def match_shape(name: str, target: int, *, vocab_size: int, seq_len: int) -> Match:
    """The shape of an architecture, as near as can be to its own named sizes, that has `target` parameters outside the
    tables, within 2 %: depth, width, heads (of a width that is a multiple of 16) and the width of the feed-forward.

    Raises UsageError where there is none.
    """
    size = _template(name, target)
    template = models.make_config(name, size=size)
    own = _Shape(template.dim, template.n_layers, template.n_heads, getattr(template, "ffn_dim", None), 0.0)
    tried: list[Match] = []
    for depths in (None, DEPTHS, *((ODD_DEPTHS,) if own.ffn_dim is None else ())):
        shapes = (own,) if depths is None else _candidates(name, size, template, target, depths)
        for shape in sorted(shapes, key=lambda shape: shape.odds):
            if (found := _build(name, size, shape, vocab_size, seq_len)) is not None:
                if abs(found.without_tables / target - 1) <= TOLERANCE:
                    return found
                tried.append(found)
    problem = f"no shape of {models.stem(name)} has {target:,} parameters outside embedding and head, within 2 %"
    if not tried:
        raise UsageError(problem, fix="take other --parameters; see what sizes have: nnx summarize --all")
    nearest = min(tried, key=lambda match: abs(match.without_tables - target))
    dim, n_layers, without = nearest.config.dim, nearest.config.n_layers, nearest.without_tables
    raise UsageError(
        f"{problem}; the nearest has {without:,}: --dim {dim} --n-layers {n_layers}",
        fix=f"take --parameters {without}",
    )


def _candidates(
    name: str, size: str, template: ModelConfig, target: int, depths: tuple[float, float]
) -> Iterator[_Shape]:
    """Shapes of `depths` times the template's that have about `target` parameters, in no order."""
    own = _own_parameters(name, size)
    low, high = (max(1, round(part * template.n_layers)) for part in depths)
    for n_layers in range(low, high + 1):
        ideal = template.dim * math.sqrt(target / own * template.n_layers / n_layers)
        nearest = round(ideal / STEP)
        for number in range(max(1, nearest - WIDTHS), nearest + WIDTHS + 1):
            yield from _shapes_of_width(name, size, template, number * STEP, n_layers, target)


def _shapes_of_width(
    name: str, size: str, template: ModelConfig, dim: int, n_layers: int, target: int
) -> Iterator[_Shape]:
    """Shapes of a width and depth, each with the width of the feed-forward that meets the target best."""
    head = template.dim // template.n_heads
    widths = [width for width in range(STEP, MOST_HEAD + 1, STEP) if dim % width == 0]
    if not widths:
        return
    width = min(widths, key=lambda width: (abs(math.log(width / head)), width))
    n_heads = dim // width
    odds = abs(math.log(dim / n_layers * template.n_layers / template.dim)) + abs(math.log(width / head)) / 2
    odds += 0.1 * (n_heads % 2 != template.n_heads % 2)
    ffn_dim = getattr(template, "ffn_dim", None)
    if ffn_dim is None:
        yield _Shape(dim, n_layers, n_heads, None, odds)
        return
    usual = ffn_dim / template.dim * dim
    narrow = _count(name, size, dim, n_layers, n_heads, FFN_STEP)
    slope = (_count(name, size, dim, n_layers, n_heads, 2 * FFN_STEP) - narrow) / FFN_STEP
    wanted = FFN_STEP + (target - narrow) / slope
    fitting = max(FFN_STEP, round(wanted / FFN_STEP) * FFN_STEP)
    if abs(fitting / usual - 1) <= MOST_FFN:
        yield _Shape(dim, n_layers, n_heads, fitting, odds + 2 * abs(math.log(fitting / usual)))


def _build(name: str, size: str, shape: _Shape, vocab_size: int, seq_len: int) -> Match | None:
    """A candidate with all its figures; None where it cannot be."""
    fields: dict[str, Any] = {"vocab_size": vocab_size, "seq_len": seq_len}
    try:
        config = _config(name, size, shape.dim, shape.n_layers, shape.n_heads, shape.ffn_dim, **fields)
    except UsageError:
        return None
    model = meta_model(name, config)
    without = parameters_without_tables(model)
    named = replace(models.make_config(name, size=size), **fields)
    return Match(config, size if config == named else None, count_parameters(model)["total"], without)


@cache
def _template(name: str, target: int) -> str:
    """The named size whose parameters are nearest."""
    shared = [size for size in models.sizes(name) if size in models.sizes(CONTROL)] or list(models.sizes(name))
    return min(shared, key=lambda size: abs(math.log(target / _own_parameters(name, size))))


@cache
def _own_parameters(name: str, size: str) -> int:
    return parameters_without_tables(meta_model(name, models.make_config(name, size=size)))


def _config(
    name: str, size: str, dim: int, n_layers: int, n_heads: int, ffn_dim: int | None, **fields: Any
) -> ModelConfig:
    shape: dict[str, Any] = {"dim": dim, "n_layers": n_layers, "n_heads": n_heads} | fields
    return models.make_config(name, size=size, **(shape if ffn_dim is None else shape | {"ffn_dim": ffn_dim}))


def _count(name: str, size: str, dim: int, n_layers: int, n_heads: int, ffn_dim: int) -> int:
    """Parameters outside the tables of a shape, told from models of one and two layers: each adds the same."""
    one, two = (_of_layers(n, name, size, dim, n_heads, ffn_dim) for n in (1, 2))
    return one + (n_layers - 1) * (two - one)


@cache
def _of_layers(n_layers: int, name: str, size: str, dim: int, n_heads: int, ffn_dim: int) -> int:
    return parameters_without_tables(meta_model(name, _config(name, size, dim, n_layers, n_heads, ffn_dim)))
