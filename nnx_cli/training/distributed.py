"""A run on several ranks: the first one plans it, reads and writes its folder, and leads; the others follow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnx_cli.config import TrainConfig
from nnx_cli.data.token_folder import open_token_folder
from nnx_cli.data.tokenizers.base import Tokenizer
from nnx_cli.errors import DataError, MissingFeature, NnxError
from nnx_cli.models._base import LanguageModel
from nnx_cli.optim._groups import cast_matrices
from nnx_cli.runs.checkpoint import Checkpoint
from nnx_cli.runs.load import model_from_config
from nnx_cli.runs.manifest import versions
from nnx_cli.runs.run import Run
from nnx_cli.runs.tensors import load_weights
from nnx_cli.system.ranks import Ranks
from nnx_cli.training.observer import Silent
from nnx_cli.training.sampling import Sampling
from nnx_cli.training.state import spread_state
from nnx_cli.training.trainer import Trainer, is_divided, make_trainer


class FollowedRun(Run):
    """A run folder as ranks see it that follow: what it holds they hear from the first one, which keeps it."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self.config = config

    @contextmanager
    def lock(self) -> Iterator[None]:
        """As in Run: the first rank holds it."""
        yield

    def status(self) -> dict[str, Any]:
        """As in Run: nothing is known here."""
        return {}

    def set_status(self, **values: Any) -> dict[str, Any]:
        """As in Run: the first rank does it."""
        return values

    def set_config(self, config: dict[str, Any]) -> None:
        """As in Run: the first rank does it."""
        self.config = config

    def save_best(self, weights: Mapping[str, Tensor], found: Mapping[str, Any] | None = None) -> None:
        """As in Run: the first rank does it."""

    def best_found(self) -> dict[str, Any] | None:
        """As in Run: nothing is known here."""
        return {}

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        """As in Run: the first rank does it."""

    def sync_logs(self) -> None:
        """As in Run: the first rank does it."""

    def cut_logs(self, step: int) -> list[str]:
        """As in Run: the first rank does it."""
        return []


@dataclass(frozen=True)
class Offer:
    """What the others need to follow: a run's description, where its tokens are, and which they are."""

    folder: Path
    config: dict[str, Any]  # as config.json has it
    training: TrainConfig
    tokens: Path
    fingerprint: str
    tokenizer: Tokenizer | None  # of tokens that do not bring theirs
    flops_per_token: int | None


def check_versions(ranks: Ranks) -> None:
    """Raise MissingFeature where a rank runs another version of nnx or torch than the first one."""
    told = ranks.gather({name: version for name, version in versions().items() if name != "python"})
    for rank, theirs in enumerate(told):
        for name, version in theirs.items():
            if version != told[0][name]:
                raise MissingFeature(
                    f"process {rank} of {ranks.count} has {name} {version}, the first one {told[0][name]}",
                    fix="install the same on all machines",
                )


def lead(trainer: Trainer, folder: Path, config: dict[str, Any], whole: Checkpoint | None) -> None:
    """Tell the other ranks what is trained, and let them begin where the first one does; `whole` has the tensors of a
    model that is divided. Raises DataError where one has other tokens."""
    ranks, data = trainer.stepper.ranks, trainer.data
    if ranks.count == 1:
        return
    tokenizer = None if "format" in data.meta else data.tokenizer
    tokens, flops = data.path.resolve(), trainer.flops_per_token
    ranks.first(lambda: Offer(folder, config, trainer.config, tokens, data.fingerprint, tokenizer, flops))
    _check_tokens(ranks, data.fingerprint, None)
    _add_up_rates(trainer)
    spread_state(trainer.stepper.step, trainer.state, ranks, whole)


def follow(ranks: Ranks, tokens: Path | None, file: Path | None, device: torch.device) -> tuple[Run, Trainer] | None:
    """The run that the first rank leads, at the step where it is; None where it has none to train. `tokens` is this
    rank's token folder, where it has one of its own, `file` that of the architecture. Raises DataError where a rank
    has other tokens."""
    offer: Offer | None = ranks.first(_only_followed)
    if offer is None:
        return None
    data, problem = None, None
    try:
        data = open_token_folder(tokens or offer.tokens, offer.tokenizer)
    except NnxError as error:
        problem = str(error)
    _check_tokens(ranks, None if data is None else data.fingerprint, problem)
    assert data is not None
    model = model_from_config(offer.config, offer.folder, file)
    if not is_divided(offer.training, ranks):
        _materialize(model, offer.training, device)
    sampling = Sampling(**offer.config["sampling"])
    trainer = make_trainer(model, data, offer.training, device, Silent(), sampling, ranks)
    trainer.flops_per_token = offer.flops_per_token
    _add_up_rates(trainer)
    spread_state(trainer.stepper.step, trainer.state, ranks)
    trainer.choose_execution(offer.training.compile)
    return FollowedRun(offer.folder, offer.config), trainer


def _add_up_rates(trainer: Trainer) -> None:
    """Let the rate that speed is set beside be that of all ranks, unless it is unknown of one."""
    rates = trainer.stepper.ranks.gather(trainer.stepper.rate)
    known = [rate for rate in rates if rate is not None]
    trainer.stepper.rate = sum(known) if len(known) == len(rates) else None


def _only_followed() -> Any:
    raise AssertionError("the first rank leads")


def _check_tokens(ranks: Ranks, fingerprint: str | None, problem: str | None) -> None:
    told = ranks.gather((fingerprint, problem))
    for rank, (theirs, why) in enumerate(told):
        if theirs != told[0][0]:
            raise DataError(
                f"process {rank} of {ranks.count} has other tokens than the first one: "
                + (why or f"their fingerprint is {str(theirs)[:12]}, not {str(told[0][0])[:12]}"),
                fix="give all machines the same token folder",
            )


def _materialize(model: LanguageModel, config: TrainConfig, device: torch.device) -> None:
    """Give a model of the meta device tensors, which are filled by the first rank's."""
    if config.weight_precision == "bf16":
        cast_matrices(model, "bf16")
    blank = {name: torch.zeros_like(tensor, device=device) for name, tensor in model.state_without_ties().items()}
    load_weights(model, blank, Path(), device)
