"""Which settings train best: ordinary runs with one set of them each, on the same text and of one length.

A sweep is a folder: TRIAL/ are its runs, sweep.json says how it stands. Several processes may work in it: each takes
trials that no other one holds the lock of, and a trial whose process was killed goes on from its checkpoint.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch

from nnx_cli import models
from nnx_cli.data.token_folder import TokenFolder
from nnx_cli.errors import DataError, DoesNotFit, OutputError, UsageError, counted
from nnx_cli.experiments import sweep_file
from nnx_cli.experiments.folders import difference, find_or_name
from nnx_cli.experiments.halving import is_over, lengths, open_trials, rungs
from nnx_cli.experiments.one_run import (
    EVAL_TOKENS,
    OUT_OF_MEMORY,
    PAUSED,
    OneRun,
    Spectator,
    Stopped,
    bits_per_byte,
    drop_weights,
    memory_problem,
)
from nnx_cli.experiments.samplers import Settings, draws, grid, suggest
from nnx_cli.experiments.search_space import Space, shown
from nnx_cli.planning.flops import count_parameters, meta_model
from nnx_cli.planning.plan import Plan
from nnx_cli.runs.find import LOCKS, WEIGHTS
from nnx_cli.runs.load import ModelRef, load_model
from nnx_cli.runs.logs import read_log
from nnx_cli.runs.manifest import versions
from nnx_cli.runs.run import Run, hold_lock
from nnx_cli.system.device import describe, reset_peak_memory
from nnx_cli.system.text import duration
from nnx_cli.training import session
from nnx_cli.training.sampling import choose_sampling

REFUSED = "refused"
Made = TypeVar("Made")
LEAST_STEPS = 10  # of a trial, and of its first rung: fewer tell nothing
LOOK_SECONDS = 1.0  # between looks at whether trials of other processes are over
JUDGED_SHARE, LEAST_JUDGED = 0.3, 2**15  # tokens of validation text, of those of a trial: a tenth of its time


@dataclass(frozen=True)
class Search:
    """What is searched, how, and with how many trials."""

    space: Space
    sampler: str
    trials: int
    eta: int
    seed: int

    @property
    def shares(self) -> list[float]:
        """Parts of its length after which a trial is judged."""
        return rungs(self.trials, self.eta) if self.sampler == "halving" else [1.0]

    def settings(self) -> list[Settings]:
        """The settings of all trials, but for TPE, which needs to know how the ones before went."""
        return [] if self.sampler == "tpe" else [*islice(self.candidates(), self.trials)]

    def candidates(self) -> Iterator[Settings]:
        """Settings that trials may have, in the order of their numbers."""
        return grid(self.space) if self.sampler == "grid" else draws(self.space, self.seed)


@dataclass(frozen=True)
class Conditions:
    """What the trials of a sweep share: the text, the device, and how settings become a plan and a command line."""

    data: TokenFolder
    device: torch.device
    plan: Callable[[Settings], Plan]
    command: Callable[[Settings, Plan | None], str]  # without a plan: of no length
    base: ModelRef | None  # to start from
    keep: str


def first_plan(search: Search, conditions: Conditions) -> Plan:
    """The plan of the first trial that can be. Raises what refused the first one where none can, UsageError where a
    trial is too short to tell something."""
    plan = first_that_can_be(search, conditions.plan)
    check_steps(plan, search.shares[0])
    return plan


def first_that_can_be(search: Search, make: Callable[[Settings], Made]) -> Made:
    """What is made of the settings of the first trial that are not refused. Raises what refused the very first ones
    where all are."""
    refused: list[UsageError | DataError | DoesNotFit] = []
    for settings in islice(search.candidates(), search.trials):
        try:
            return make(settings)
        except (UsageError, DataError, DoesNotFit) as error:
            refused.append(error)
    raise refused[0]


def check_steps(plan: Plan, share: float) -> None:
    """Raise UsageError where the first part of a trial that is judged has too few steps."""
    steps = int(share * _steps(plan) + 1e-9)
    if steps < LEAST_STEPS:
        part = "" if share == 1 else f" in the first {share:.2g} of it, after which halving judges it"
        raise UsageError(
            f"too short for a trial: {counted(steps, 'step')} of {plan.train.tokens_per_step:,} tokens"
            f"{part}, and it needs {LEAST_STEPS}",
            fix="make trials longer, or take a smaller --tokens-per-step",
        )


def _steps(plan: Plan) -> float:
    """Steps of a trial, on a device of this kind about where it ends by the clock."""
    train = plan.train
    assert train.tokens_per_step is not None
    if train.max_time_s is None:
        return train.max_steps or 0
    return min(train.max_steps or float("inf"), train.max_time_s * plan.tokens_per_s / train.tokens_per_step)


def new_record(
    search: Search, conditions: Conditions, settings: Mapping[str, Any], length: Mapping[str, Any]
) -> dict[str, Any]:
    """sweep.json of a sweep that has not begun. Raises what `first_plan` does."""
    plan, data = first_plan(search, conditions), conditions.data
    assert data.tokenizer is not None and plan.train.tokens_per_step is not None
    seen = _steps(plan) * plan.train.tokens_per_step
    return {
        "format": sweep_file.FORMAT,
        "versions": versions(),
        "settings": dict(settings),
        "device": describe(conditions.device),
        "fingerprint": data.fingerprint,
        "data": str(data.path),
        "tokenizer": {
            "kind": data.tokenizer.kind,
            "vocab_size": data.vocab_size,
            "fingerprint": data.tokenizer.fingerprint,
        },
        "state": "running",
        "sampler": search.sampler,
        "n_trials": search.trials,
        "rungs": search.shares,
        "eta": search.eta,
        "searched": {name: each.described() for name, each in search.space.items()},
        "length": dict(length),
        "judged_tokens": int(min(EVAL_TOKENS, len(data.val), max(LEAST_JUDGED, JUDGED_SHARE * seen))),
        "trials": [],
    }


def find_sweep(
    settings: Mapping[str, Any], fingerprint: str, device: str, stem: str, out: Path | None
) -> tuple[Path, bool]:
    """The folder of a sweep, and whether it has begun, as `find_or_name` has it. One whose trials end by the clock is a
    sweep of `device` alone. Raises OutputError where `out` is something else."""

    def differs(folder: Path) -> str | None:
        record = sweep_file.read_sweep(folder)
        return difference(record, settings, fingerprint, device if "max_time" in record["length"] else None)

    return find_or_name(WEIGHTS / f"sweep-{stem}", out, "sweep", differs)


class Sweep:
    """A sweep in its folder. `changed` is called with what sweep.json says whenever a trial is over."""

    def __init__(
        self,
        search: Search,
        conditions: Conditions,
        folder: Path,
        view: Spectator,
        should_stop: Callable[[], bool],
        changed: Callable[[Mapping[str, Any]], None] = lambda record: None,
    ) -> None:
        self.search = search
        self.conditions = conditions
        self.folder = folder
        self.view = view
        self.should_stop = should_stop
        self.changed = changed

    def run(self) -> dict[str, Any]:
        """Do what is left, beside other processes, until all trials are over. Raises Stopped where it is to stop."""
        self._take_over()
        while True:
            record = sweep_file.read_sweep(self.folder)
            waiting = open_trials(record["trials"])
            if self._take_one(waiting) or self._propose():
                continue
            if not waiting:
                if (finished := self._finish()) is not None:
                    return finished
                continue
            if self.should_stop():
                raise Stopped(f"interrupted {self.folder}")
            self.view.begins("waiting for the trials of other processes", self._done(record), 0.0)
            time.sleep(LOOK_SECONDS)

    # what is recorded

    def _take_over(self) -> None:
        """Say what may have changed since the sweep began: how many trials, where its folder and its text are."""
        search = self.search
        with sweep_file.change_sweep(self.folder) as record:
            trials = record["trials"]
            known = {trial["number"] for trial in trials}
            for number, settings in enumerate(search.settings(), 1):
                if number not in known:
                    trials.append(sweep_file.new_trial(number, settings))
            for trial in trials:
                trial["out"] = str(self.folder / trial["trial"])
            record["n_trials"] = max(search.trials, len(trials))
            record["data"] = str(self.conditions.data.path)
            record["state"] = "running"

    def _propose(self) -> bool:
        """Add a trial where its settings follow from how others went; returns whether there was one to add."""
        if self.search.sampler != "tpe":
            return False
        with sweep_file.change_sweep(self.folder) as record:
            trials = sorted(record["trials"], key=lambda trial: trial["number"])
            if len(trials) >= record["n_trials"]:
                return False
            known = [(trial["settings"], trial["bits_per_byte"], is_over(trial)) for trial in trials]
            settings = suggest(self.search.space, known, record["n_trials"], self.search.seed)
            trial = sweep_file.new_trial(len(trials) + 1, settings)
            record["trials"].append(trial | {"out": str(self.folder / trial["trial"])})
        return True

    def _record(self, trial: dict[str, Any]) -> None:
        """Write down how a trial stands, and delete what those that are over need no more."""
        with sweep_file.change_sweep(self.folder) as record:
            others = [each for each in record["trials"] if each["number"] != trial["number"]]
            record["trials"] = [*others, trial]
            sweep_file.rank(record)
            self.changed(record)
        self._delete_weights(record)

    def _delete_weights(self, record: Mapping[str, Any]) -> None:
        """Delete what trials that are over need no more."""
        for each in record["trials"]:
            if is_over(each):
                drop_weights(self.folder / each["trial"], self.conditions.keep)

    def _finish(self) -> dict[str, Any] | None:
        """Record that all trials are over; None where another process has added some meanwhile."""
        with sweep_file.change_sweep(self.folder) as record:
            if open_trials(record["trials"]):
                return None
            record["state"] = "finished"
            self._delete_weights(record)
            self.changed(record)
            shutil.rmtree(self.folder / LOCKS, ignore_errors=True)  # nobody takes a trial: none is open
        return record

    # what is run

    def _take_one(self, waiting: Sequence[Mapping[str, Any]]) -> bool:
        """Bring the first trial that no other process is at to its next rung; returns whether there was one."""
        for trial in waiting:
            if self.should_stop():
                raise Stopped(f"interrupted {self.folder}")
            with _hold_trial(self.folder / LOCKS / trial["trial"]) as held:
                record = sweep_file.read_sweep(self.folder)
                still = [each for each in open_trials(record["trials"]) if each["number"] == trial["number"]]
                if held and still and still[0]["rungs_reached"] == trial["rungs_reached"]:
                    self._announce(record, still[0])
                    self._advance(still[0], record["rungs"], record["judged_tokens"])
                    return True
        return False

    def _advance(self, trial: dict[str, Any], shares: Sequence[float], n_tokens: int) -> None:
        """Train a trial to its next rung, from where it is, and record how it went there."""
        until = shares[len(trial["rungs_reached"])]
        try:
            plan = self.conditions.plan(trial["settings"])
            check_steps(plan, shares[0])
        except (UsageError, DataError) as error:
            trial |= {"status": REFUSED, "problem": str(error)}
        except DoesNotFit as error:
            trial |= {"status": OUT_OF_MEMORY, "problem": str(error)}
        else:
            self._train(trial, plan, until, n_tokens)
        self._record(trial)
        self.view.note(told(trial))

    def _train(self, trial: dict[str, Any], plan: Plan, until: float, n_tokens: int) -> None:
        """Train a trial so far, and judge it there."""
        conditions, folder = self.conditions, self.folder / trial["trial"]
        file = Path(plan.model) if models.is_file(plan.model) else None
        sampling = choose_sampling(conditions.data.tokenizer, conditions.data, None, 0, None)
        trial["command"] = conditions.command(trial["settings"], plan)
        trial["parameters"] = count_parameters(meta_model(plan.model, plan.model_config))["total"]

        def begin() -> tuple[Run, Any]:
            return session.start(
                plan, conditions.data, folder, conditions.device, self.view, sampling, trial["command"], conditions.base
            )

        peak_known = reset_peak_memory(conditions.device)
        here = {
            "device": plan.train.device,
            "threads": plan.train.threads,
        }  # another process may have begun it elsewhere
        run = OneRun(folder, begin, conditions.data, file, self.view, self.should_stop, until, here)
        status, problem = run.train()
        trial |= {"status": status, "problem": problem, "bits_per_byte": None} | _measured(folder, peak_known)
        if status in ("finished", PAUSED):
            ref = ModelRef(folder, "last" if status == PAUSED else "best", file=file)
            try:
                trial |= self._judged(ref, plan.train.precision, trial["rungs_reached"], n_tokens)
            except (MemoryError, RuntimeError) as error:
                trial |= {"status": OUT_OF_MEMORY, "problem": memory_problem(error)}

    def _judged(self, ref: ModelRef, precision: str, reached: Sequence[float], n_tokens: int) -> dict[str, Any]:
        """What the validation text says of a model at a rung."""
        data = self.conditions.data
        bits = bits_per_byte(load_model(ref, self.conditions.device, precision), data, data.val, n_tokens)
        if bits is None or not math.isfinite(bits):
            return {"status": "diverged", "problem": "its validation loss is no number"}
        return {"bits_per_byte": bits, "rungs_reached": [*reached, bits]}

    # how far it is

    def _done(self, record: Mapping[str, Any]) -> float:
        """The part of the sweep that is done, 0 to 1."""
        shares, n_trials = record["rungs"], record["n_trials"]
        reached = [(len(trial["rungs_reached"]), is_over(trial)) for trial in record["trials"]]
        done = sum(1.0 if over and not rung else [0.0, *shares][rung] for rung, over in reached)
        return min(1.0, done / lengths(n_trials, shares, record["eta"]))

    def _announce(self, record: Mapping[str, Any], trial: Mapping[str, Any]) -> None:
        shares, done, rung = record["rungs"], self._done(record), len(trial["rungs_reached"])
        part = shares[rung] - [0.0, *shares][rung]
        share = part / lengths(record["n_trials"], shares, record["eta"])
        self.view.begins(f"trial {trial['trial']}: {_words(trial)}", done, min(share, 1.0 - done))


@contextmanager
def _hold_trial(lock: Path) -> Iterator[bool]:
    """Hold the lock of a trial; yields False where another process does, or takes the locks away, for all are over."""
    with ExitStack() as stack:
        lock.parent.mkdir(exist_ok=True)
        try:
            held = stack.enter_context(hold_lock(lock))
        except OutputError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            held = False
        yield held


def _measured(folder: Path, peak_known: bool) -> dict[str, Any]:
    """What a run folder tells of a trial."""
    status = Run(folder).status() if folder.exists() else {}
    peaks = [record.get("peak_memory_bytes") or 0 for record in read_log(folder / "metrics.jsonl")] if status else []
    found = {"steps": status.get("step"), "tokens": status.get("tokens"), "time_s": status.get("time_s")}
    return found | {"peak_memory_bytes": (max(peaks, default=0) or None) if peak_known else None}


def _words(trial: Mapping[str, Any]) -> str:
    """The settings of a trial."""
    return ", ".join(f"{name} {shown(value)}" for name, value in trial["settings"].items())


def told(trial: Mapping[str, Any]) -> str:
    """How a trial went, in a line."""
    bits = "" if trial["bits_per_byte"] is None else f" at {trial['bits_per_byte']:.4f} bits per byte"
    after = f" after {duration(trial['time_s'])} of training" if trial["time_s"] else ""
    why = f": {trial['problem']}" if trial["problem"] else ""
    return f"trial {trial['trial']} ({_words(trial)}): {trial['status']}{bits}{after}{why}"
