"""Which architecture learns a text better: ordinary runs of each on the same batches, of one size, on one budget.

A race is a folder: MODEL-SEED/ are its runs, race.json says how it stands. What is recorded there is not done again;
a run that was interrupted goes on from its checkpoint.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from nnx_cli import models
from nnx_cli.errors import CheckpointError
from nnx_cli.experiments import plasticity, race_file, rate_search
from nnx_cli.experiments.entrants import Entrant, Field
from nnx_cli.experiments.folders import ANOTHER, difference, find_or_name, make_folder
from nnx_cli.experiments.one_run import OUT_OF_MEMORY, Spectator, Stopped, drop_weights
from nnx_cli.experiments.race_run import Runner
from nnx_cli.planning.plan import Plan
from nnx_cli.runs.find import WEIGHTS
from nnx_cli.runs.manifest import versions
from nnx_cli.system.device import describe
from nnx_cli.system.files import sha256_file
from nnx_cli.system.text import duration
from nnx_cli.training.sampling import choose_sampling

SEARCH = "search"  # the folder of the short runs
OUTSIDE = "embedding and head"
SEARCHES = 3.5  # short runs that a competitor takes, about


def new_record(field: Field, settings: Mapping[str, Any]) -> dict[str, Any]:
    """race.json of a race that has not begun. Raises DataError where the training text is too short for a search."""
    data = field.data
    rate_search.training_text(data, field.seq_len)
    assert data.tokenizer is not None
    known = {"kind": data.tokenizer.kind, "vocab_size": data.vocab_size, "fingerprint": data.tokenizer.fingerprint}
    record: dict[str, Any] = {
        "format": race_file.FORMAT,
        "versions": versions(),
        "settings": dict(settings),
        "device": describe(field.device),
        "fingerprint": data.fingerprint,
        "state": "running",
        "comparisons": 0,
        "equal": field.config.equal,
        "budget": field.config.amount(),
        "data": str(data.path),
        "tokenizer": known,
        "train_tokens": len(data.train),
        "seq_len": field.seq_len,
        "tokens_per_step": field.tokens_per_step,
        "parameters_counted": {"target": field.target, "outside": OUTSIDE},
        "learning_rate_search": {"rates": {}, "tokens_each": rate_search.tokens_each(field), "time_s": 0.0},
        "target_bits_per_byte": field.config.target,
        "competitors": [_blank(entrant) for entrant in field.entrants],
    }
    race_file.judge(record)
    return record


def _blank(entrant: Entrant) -> dict[str, Any]:
    """A competitor before its first run."""
    plan = entrant.plan
    train = None if plan is None else plan.train
    return {
        "model": entrant.name,
        "size": entrant.match.size,
        "config": models.config_dict(entrant.match.config if plan is None else plan.model_config),
        "parameters": entrant.match.parameters,
        "parameters_without_tables": entrant.match.without_tables,
        "flops_per_token": entrant.flops,
        "lr": None,
        "optimizer": train and train.optimizer,
        "weight_decay": train and train.weight_decay,
        "dropout": plan and plan.model_config.dropout,
        "warmup_steps": train and train.warmup_steps,
        "status": "waiting" if plan else OUT_OF_MEMORY,
        "problem": entrant.problem,
        "runs": [],
    }


def identity(field: Field, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that make a race: with others it is another one. `asked` are those of training that were given."""
    config = field.config
    files = {entrant.name: sha256_file(entrant.file) for entrant in field.entrants if entrant.file is not None}
    return {
        **asked,
        **({"sha256": files} if files else {}),
        "task": config.task,
        "models": [entrant.spec for entrant in field.entrants],
        **({"texts": [text.fingerprint for text in field.texts]} if field.texts else {}),
        "parameters": field.target,
        "equal": config.equal,
        "budget": config.amount(),
        "seeds": config.seeds,
        "seq_len": field.seq_len,
        "tokens_per_step": field.tokens_per_step,
    }


def find_race(
    settings: Mapping[str, Any], fingerprint: str, device: str, stem: str, out: Path | None
) -> tuple[Path, bool]:
    """The folder of a race, and whether it has begun: the race of these settings on this text in weights/race-STEM, -2,
    …, or a free name there; or `out`. One of equal time is a race of `device` alone.

    Raises OutputError where `out` is something else.
    """

    def differs(folder: Path) -> str | None:
        record, by_clock = race_file.read_race(folder / race_file.NAME), settings["equal"] == "time"
        return difference(record, settings, fingerprint, device if by_clock else None)

    return find_or_name(WEIGHTS / f"race-{stem}", out, "race", differs)


def begin(folder: Path, record: Mapping[str, Any]) -> None:
    """Make the folder of a race. Raises OutputError."""
    make_folder(folder, race_file.NAME, record)


class Race:
    """A race in its folder. `record` is what race.json says, `write` keeps it, `changed` is called with it whenever a
    run is over."""

    def __init__(
        self,
        field: Field,
        folder: Path,
        record: dict[str, Any],
        view: Spectator,
        command: str,
        should_stop: Callable[[], bool],
        changed: Callable[[dict[str, Any]], None] = lambda record: None,
        write: Callable[[Path, dict[str, Any]], None] | None = None,
    ) -> None:
        self.field = field
        self.folder = folder
        self.record = record
        self.view = view
        self.changed = changed
        self.write = write or race_file.write_race
        self.seeds = range(1, field.config.seeds + 1)
        sampling = choose_sampling(field.data.tokenizer, field.data, None, 0, None)
        self.runner = Runner(field, sampling, view, command, should_stop)
        self._take_over()
        self.racing = [entrant for entrant in field.entrants if self._may_race(entrant)]
        self.plans: dict[str, Plan] = {}

    def run(self) -> None:
        """Do what is not done yet: search the rates, then run seed after seed. Raises Stopped where it is to stop."""
        self.set_state("running")
        try:
            for entrant in self.racing:
                self.search(entrant)
            for seed in self.seeds:
                for entrant in self.racing:
                    self.race(entrant, seed)
        except Stopped:
            self.set_state("interrupted")
            raise
        self.set_state("finished")
        self.changed(self.record)

    def entry(self, entrant: Entrant) -> dict[str, Any]:
        """What race.json says of a competitor."""
        return next(each for each in self.record["competitors"] if each["model"] == entrant.name)

    def _take_over(self) -> None:
        """Say what may have changed since the race began: the target, and where its folder and its text are."""
        if self.field.config.target is not None:
            self.record["target_bits_per_byte"] = self.field.config.target
        self.record["data"] = str(self.field.data.path)
        for entry in self.record["competitors"]:
            for run in entry["runs"]:
                run["out"] = str(self.folder / f"{entry['model']}-{run['seed']}")

    def _may_race(self, entrant: Entrant) -> bool:
        """Whether there is memory for a competitor. Raises CheckpointError where its shape is not the one recorded."""
        entry = self.entry(entrant)
        if entry["parameters"] != entrant.match.parameters or entry["size"] != entrant.match.size:
            raise CheckpointError(
                f"{self.folder} was begun by another version of nnx, with another shape of {entrant.name}", fix=ANOTHER
            )
        return entrant.plan is not None and entry["status"] != OUT_OF_MEMORY

    # what is recorded

    def _save(self) -> None:
        race_file.judge(self.record)
        self.write(self.folder, self.record)

    def set_state(self, state: str) -> None:
        """Record that the race is running, interrupted or finished. Raises OutputError."""
        self.record["state"] = state
        if state == "finished":
            shutil.rmtree(self.folder / SEARCH, ignore_errors=True)
        for entry in self.record["competitors"]:
            self._set_status(entry)
        self._save()

    def _set_status(self, entry: dict[str, Any]) -> None:
        """How a competitor stands, by its runs."""
        ended = [run["status"] for run in entry["runs"]]
        if entry["status"] == OUT_OF_MEMORY:
            return
        begun = self.record["state"] if ended else "waiting"
        bad = [status for status in (OUT_OF_MEMORY, "diverged") if status in ended]
        entry["status"] = bad[0] if bad else "finished" if len(ended) == len(self.seeds) else begun

    # what is run

    def search(self, entrant: Entrant) -> None:
        """Find a competitor's rate, unless it is known."""
        entry, search = self.entry(entrant), self.record["learning_rate_search"]
        tried = search["rates"].setdefault(entrant.name, [])
        while entry["lr"] is None:
            factor = rate_search.next_factor(tried)
            if factor is None:
                entry["lr"] = rate_search.best_rate(tried)
                entry["weight_decay"] = self._plan(entrant).train.weight_decay
                shutil.rmtree(self.folder / SEARCH / entrant.name, ignore_errors=True)
                self._save()
                break
            rate = rate_search.rate_of(entrant, factor)
            self._announce(f"{entrant.name}, trying lr {rate:g}", self._short_s(entrant))
            folder = self.folder / SEARCH / entrant.name / f"{factor:g}"
            tokens = search["tokens_each"]
            tried.append({"factor": factor} | rate_search.try_rate(self.runner, entrant, rate, tokens, folder))
            self._save()

    def race(self, entrant: Entrant, seed: int) -> None:
        """One run from its beginning, or from where it was interrupted, unless it is done."""
        entry, folder = self.entry(entrant), self.folder / f"{entrant.name}-{seed}"
        if entry["status"] == OUT_OF_MEMORY:
            return
        if seed not in {run["seed"] for run in entry["runs"]}:
            self._announce(f"{entrant.name}, seed {seed}", self._run_s(entrant))
            plan = self._plan(entrant)
            plan = replace(plan, train=replace(plan.train, seed=seed))
            peak_known = self.runner.forget()
            if self.field.texts:
                result, problem = plasticity.learn_in_turn(self.runner, entrant, plan, folder, seed)
            else:
                status, problem = self.runner.train(entrant, plan, self.field.data, folder)
                result, judging = self.runner.result(entrant, folder, seed, status, peak_known)
                problem = problem or judging
            entry["runs"].append(result)
            entry["problem"] = problem or entry["problem"]
            self._set_status(entry)
            self._save()
            self.changed(self.record)
            self.view.note(told(entrant.name, result))
        for places in plasticity.folders(folder, len(self.field.texts) or 1):
            for each in filter(None, places):
                drop_weights(each, self.field.config.keep)

    def _plan(self, entrant: Entrant) -> Plan:
        """The plan of a competitor's runs, with the rate that was found."""
        if entrant.name not in self.plans:
            asked = replace(entrant.asked, lr=self.entry(entrant)["lr"])
            self.plans[entrant.name] = self.field.plan(entrant.model, entrant.match, asked)
        return self.plans[entrant.name]

    # how far it is

    def _announce(self, what: str, seconds: float) -> None:
        done_s, left_s = self.seconds()
        done = done_s / (done_s + left_s or 1.0)
        self.view.begins(what, done, min(seconds / (done_s + left_s or 1.0), 1.0 - done))

    def seconds(self) -> tuple[float, float]:
        """Of training that is over, and that is left, about; a run that was interrupted is left."""
        done = left = 0.0
        for entrant in self.racing:
            entry, tried = self.entry(entrant), self.record["learning_rate_search"]["rates"].get(entrant.name, [])
            n_short = len(tried) if entry["lr"] is not None else max(SEARCHES, len(tried))
            n_runs = len(entry["runs"]) if entry["status"] == OUT_OF_MEMORY else len(self.seeds)
            over = len(tried) * self._short_s(entrant) + len(entry["runs"]) * self._run_s(entrant)
            done += over
            left += n_short * self._short_s(entrant) + n_runs * self._run_s(entrant) - over
        return done, left

    def _run_s(self, entrant: Entrant) -> float:
        """What a run takes on a device of this kind, about."""
        assert entrant.plan is not None
        n_runs = max(1, 2 * len(self.field.texts) - 1)
        if self.field.config.equal == "time":
            return n_runs * self.field.config.amount()
        planned_s = self.field.expected_tokens(entrant) / entrant.plan.tokens_per_s
        return n_runs * planned_s * self._slowdown(entrant)

    def _short_s(self, entrant: Entrant) -> float:
        return self._planned_short_s(entrant) * self._slowdown(entrant)

    def _planned_short_s(self, entrant: Entrant) -> float:
        assert entrant.plan is not None
        return rate_search.tokens_each(self.field) / entrant.plan.tokens_per_s

    def _slowdown(self, entrant: Entrant) -> float:
        """How many times as long as planned short runs took, of a competitor or else of all; 1 before there are any."""
        rates = self.record["learning_rate_search"]["rates"]
        for some in ([entrant], self.racing):
            whole = [
                (tried["time_s"], self._planned_short_s(each))
                for each in some
                for tried in rates.get(each.name, [])
                if tried["bits_per_byte"] is not None and tried["time_s"]
            ]
            if whole:
                return sum(took for took, _ in whole) / sum(planned for _, planned in whole)
        return 1.0


def told(name: str, result: Mapping[str, Any]) -> str:
    """How a run ended, in a line."""
    bits = "" if result["bits_per_byte"] is None else f" at {result['bits_per_byte']:.4f} bits per byte"
    return (
        f"{name}, seed {result['seed']}: {result['status']}{bits}, {result['tokens']:,} tokens in "
        f"{duration(result['time_s'])} of training"
    )
