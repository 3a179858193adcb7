"""Which settings the trials of a sweep have: at random, all of a grid, or where good ones are likely (TPE).

Random trials are a function of seed and number: more trials begin with the same ones.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nnx_cli.errors import MissingFeature, UsageError, counted, pip_install
from nnx_cli.experiments.search_space import Choice, Range, Space, Value, combinations

MOST_TRIALS = 10_000
TPE_BEGINS = 3  # that part of the trials, at most 10, is drawn at random before TPE knows enough
TRIES = 10  # of TPE for settings that no trial has
PACKAGE = "nnx-cli[sweep]"  # with what this needs

Settings = dict[str, Value]
Known = Sequence[tuple[Settings, float | None, bool]]  # settings, bits per byte (None: no result), whether it is over


def check_grid(space: Space) -> int:
    """How many trials a grid has. Raises UsageError where it has no end, or too many."""
    endless = [name for name, each in space.items() if each.count is None]
    if endless:
        raise UsageError(
            f"--sampler grid: {endless[0]} is any number from {space[endless[0]]}",
            fix=f"list its values, as in --set {endless[0]}=A,B,C, or give the range a step",
        )
    count = combinations(space) or 0
    if count > MOST_TRIALS:
        raise UsageError(
            f"the grid has {counted(count, 'combination')}; at most {MOST_TRIALS:,} are tried",
            fix="take --sampler random",
        )
    return count


def grid(space: Space) -> Iterator[Settings]:
    """All combinations; the last setting changes first."""
    values = [[each.at(number) for number in range(each.count or 0)] for each in space.values()]
    for combination in itertools.product(*values):
        yield dict(zip(space, combination, strict=True))


def draws(space: Space, seed: int) -> Iterator[Settings]:
    """Settings at random, none of them twice; endless where there are endlessly many."""
    seen: set[tuple[Value, ...]] = set()
    total = combinations(space)
    for number in itertools.count():
        if total is not None and len(seen) >= total:
            return
        drawn = {name: each.draw(random.Random(f"{seed} {number} {name}").random()) for name, each in space.items()}
        if (key := tuple(drawn.values())) not in seen:
            seen.add(key)
            yield drawn


def check_tpe() -> None:
    """Raise MissingFeature without the library of --sampler tpe."""
    try:
        import optuna  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingFeature("--sampler tpe needs optuna", fix=pip_install(PACKAGE)) from error


def suggest(space: Space, known: Known, trials: int, seed: int) -> Settings:
    """Settings that a tree-structured Parzen estimator takes after those that are `known`, in the order of the trials
    (Bergstra et al. 2011, as Optuna has it). Raises MissingFeature without it."""
    check_tpe()
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    taken = [settings for settings, _, _ in known]
    scales = {name: _distribution(each) for name, each in space.items()}
    for attempt in range(TRIES):
        sampler = optuna.samplers.TPESampler(
            seed=random.Random(f"{seed} {len(known)} {attempt}").getrandbits(32),
            n_startup_trials=min(10, max(1, trials // TPE_BEGINS)),
            multivariate=True,
            constant_liar=True,
        )
        study = optuna.create_study(sampler=sampler)
        for settings, bits, is_over in known:
            study.add_trial(_as_trial(settings, bits, is_over, scales))
        asked = study.ask(scales).params
        found = {name: _plain(space[name], asked[name]) for name in space}
        if found not in taken:
            return found
    return next(settings for settings in draws(space, seed) if settings not in taken)


def _as_trial(settings: Settings, bits: float | None, is_over: bool, scales: Mapping[str, Any]) -> Any:
    """A trial as Optuna knows it. One without a result is the worst there can be."""
    import optuna

    state = optuna.trial.TrialState.COMPLETE if is_over else optuna.trial.TrialState.RUNNING
    value = (float("inf") if bits is None else bits) if is_over else None
    return optuna.trial.create_trial(state=state, value=value, params=settings, distributions=dict(scales))


def _distribution(each: Choice | Range) -> Any:
    """What a setting is chosen from, as Optuna has it."""
    import optuna

    if isinstance(each, Choice):
        return optuna.distributions.CategoricalDistribution(each.values)
    if each.whole:
        step = round(each.step or 1)
        return optuna.distributions.IntDistribution(round(each.low), round(each.high), log=each.log, step=step)
    return optuna.distributions.FloatDistribution(each.low, each.high, log=each.log, step=each.step)


def _plain(each: Choice | Range, value: Any) -> Value:
    """A value that Optuna chose as our own trials have it."""
    return each.rounded(value) if isinstance(each, Range) else value
