"""Where a run is, and what a checkpoint holds of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from nnx_cli.config import TrainConfig
from nnx_cli.optim._state import load_optimizer_state, named_specs, optimizer_state
from nnx_cli.runs.checkpoint import FORMAT, Checkpoint
from nnx_cli.system.ranks import Ranks
from nnx_cli.training.schedule import after_turn
from nnx_cli.training.shards import Part
from nnx_cli.training.step import Step


@dataclass
class TrainState:
    """Everything besides tensors that a run needs to go on."""

    step: int = 0
    tokens: int = 0
    time_s: float = 0.0  # spent in training steps
    best_val_loss: float | None = None
    best_val_bits_per_byte: float | None = None
    best_step: int = 0
    best_losses: list[float] = field(default_factory=list)  # then, of parts of the validation text
    worse_validations: int = 0  # since the best one
    skipped_steps: int = 0
    bad_steps: int = 0  # skipped ones in a row
    lr_factor: float = 1.0  # on the schedule's learning rate; below 1 after a rollback
    turned_at: float | None = None  # progress at which it went back to its best weights, for validation had turned
    turned_to: float = 0.0  # progress that it had there

    def progress(self, config: TrainConfig) -> float:
        """The part of the run that is done, 0 to 1."""
        by_steps = self.step / config.max_steps if config.max_steps else 0.0
        by_time = self.time_s / config.max_time_s if config.max_time_s else 0.0
        done = max(by_steps, by_time)
        return min(1.0, done if self.turned_at is None else after_turn(done, self.turned_at, self.turned_to))

    def pieces(self, config: TrainConfig, progress: float) -> int:
        """Sequences that each sample is read as at that part of a run: one where it went back to its best weights, to
        end soon."""
        return 2 if self.turned_at is None and progress < (config.short_sequences or 0.0) else 1

    def ended_by(self, config: TrainConfig) -> str:
        """What the run ended by, as run.json names it: its length in steps, its time, data (it had a time, and before
        that read its text as often as is of use, or saw validation turn), patience, or it was interrupted."""
        if config.max_steps and self.step >= config.max_steps:
            return "data" if config.max_time else "length"
        if self.progress(config) >= 1.0:
            return "time" if self.turned_at is None else "data"
        return "patience" if self.is_out_of_patience(config) else "interrupted"

    def is_out_of_patience(self, config: TrainConfig) -> bool:
        """Whether so many validations in a row were no better that the run is to end."""
        return config.patience is not None and self.worse_validations >= config.patience


def make_checkpoint(step: Step, state: TrainState, seed: int) -> Checkpoint:
    """Everything that `restore_checkpoint` needs. Random numbers are a function of seed and step, so the step is their
    state."""
    return Checkpoint(state.step, whole_weights(step), _whole_moments(step), describe_state(step, state, seed))


def describe_state(step: Step, state: TrainState, seed: int) -> dict[str, Any]:
    """What a checkpoint holds besides tensors."""
    scaler, random = step.scaler.state_dict(), {"seed": seed, "step": state.step}
    return asdict(state) | {"format": FORMAT, "scaler": scaler, "random": random}


def whole_weights(step: Step) -> dict[str, Tensor]:
    """A model's tensors by their names; of one that is divided, on the first rank alone, in its host's memory."""
    return step.model.state_without_ties() if step.shards is None else step.shards.whole_weights()


def _whole_moments(step: Step) -> dict[str, Tensor]:
    """The optimizer's state, as `whole_weights`."""
    if step.shards is None:
        return optimizer_state(step.optimizer, step.model)
    return step.shards.whole(_parts_of_state(step))


def _parts_of_state(step: Step) -> Iterator[Part]:
    """What this rank has of every tensor of a divided optimizer's state, in an order that all have. The state of a
    parameter that is not divided is whole, counts of steps are as everywhere."""
    assert step.shards is not None
    mine = optimizer_state(step.optimizer, step.model, step.shards.local)
    there = set().union(*step.ranks.gather([*mine]))
    divided = {p for original, p in step.shards.local.items() if p is not original}
    specs = named_specs(step.optimizer, step.model, step.shards.local)
    for name in sorted(there):
        p, _, shape, dtype = specs[name]
        tensor = mine[name] if name in mine else torch.empty(shape, dtype=dtype, device=p.device)
        yield Part(name, tensor, None if p in divided and shape else step.optimizer.owners.get(p, 0))


def restore_checkpoint(step: Step, state: TrainState, checkpoint: Checkpoint) -> None:
    """Continue from a checkpoint whose weights the model has. Raises CheckpointError where it is another model's.

    Of a model that is divided, counters alone are set: tensors are for `spread_state`.
    """
    if step.shards is None:
        step.optimizer.state.clear()
        load_optimizer_state(step.optimizer, step.model, checkpoint.optimizer)
    if step.scaler.is_enabled() and checkpoint.state["scaler"]:
        step.scaler.load_state_dict(checkpoint.state["scaler"])
    for key in TrainState.__dataclass_fields__.keys() & checkpoint.state.keys():
        setattr(state, key, checkpoint.state[key])
    step.stats.set_skipped(state.skipped_steps, state.bad_steps)


def spread_state(step: Step, state: TrainState, ranks: Ranks, whole: Checkpoint | None = None) -> None:
    """Let all ranks be where the first one is: its weights, its optimizer's state, its counters. Of a model that is
    divided, it has the tensors in `whole`, and keeps its part of them."""
    if ranks.count == 1:
        return
    spread_weights(step, ranks, None if whole is None else whole.model)
    optimizer = step.optimizer
    stored = optimizer.state if step.shards is None else whole and whole.optimizer
    has_moments, counters, scale = ranks.first(lambda: (bool(stored), asdict(state), step.scaler.state_dict()))
    if not has_moments:
        optimizer.state.clear()
    for p, spec in optimizer.state_specs().items() if has_moments else ():
        for name, (shape, dtype) in spec.items() if optimizer.is_mine(p) else ():
            optimizer.state[p].setdefault(name, torch.zeros(shape, dtype=dtype, device=p.device))
    if step.shards is None:
        ranks.spread([tensor for _, tensor in sorted(optimizer_state(optimizer, step.model).items())])
    else:
        step.shards.fill(_parts_of_state(step), None if whole is None else whole.optimizer)
    if scale:
        step.scaler.load_state_dict(scale)
    for name, value in counters.items():
        setattr(state, name, value)
    step.stats.set_skipped(state.skipped_steps, state.bad_steps)


def spread_weights(step: Step, ranks: Ranks, whole: Mapping[str, Tensor] | None) -> None:
    """Give all ranks the weights of the first one, which are `whole` where the model is divided."""
    if step.shards is None:
        ranks.spread([*step.model.state_without_ties().values()])
    else:
        step.shards.fill_weights(whole)
