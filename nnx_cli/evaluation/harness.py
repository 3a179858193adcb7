"""Tasks of EleutherAI's lm-evaluation-harness, an extra: our models as it asks them, and its results as numbers.

Gao et al., https://github.com/EleutherAI/lm-evaluation-harness. This module imports it, so it is imported where tasks
are asked for and nowhere else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from yaml import YAMLError

from nnx_cli.config import SampleConfig
from nnx_cli.data.tokenizers.base import Tokenizer
from nnx_cli.errors import DataError, MissingFeature, UsageError, nearest
from nnx_cli.evaluation.losses import BATCH_TOKENS, evaluating
from nnx_cli.layers.loss import token_scores
from nnx_cli.models._base import LanguageModel

PROMPTS_PER_BATCH = 16
MAX_NEW_TOKENS = 256  # where a task does not say: the harness's own default
SEED = 1234  # of the examples before a question: the harness's own default
FAULTS = (AttributeError, LookupError, OSError, TypeError, ValueError)
SUFFIXES = (".yaml", ".yml")

Write = Callable[[list[list[int]], SampleConfig, list[str]], list[str]]  # prompts, how, stops: what follows each


class HarnessModel(LM):
    """A model of ours for the harness: log-likelihoods of given text, and text that follows a prompt."""

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        start_ids: Sequence[int],
        write: Write,
        on_progress: Callable[[float], None] = lambda done: None,
    ) -> None:
        """`start_ids` stand where a context is empty; `write` draws text from the model. `on_progress` hears how much
        of the requests of a kind is done, 0 to 1."""
        super().__init__()
        self.model, self.tokenizer, self.start_ids, self.write = model, tokenizer, list(start_ids), write
        self.on_progress = on_progress

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Of requests (context, continuation): the log-likelihood of the continuation in nats, and whether the model
        finds each of its tokens likeliest."""
        return self._score([self._split(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Log-likelihood in nats of whole texts, each after what a text begins with."""
        return [nats for nats, _ in self._score([self._split("", request.args[0]) for request in requests])]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """What follows the contexts of requests (context, settings), up to one of the settings' `until`."""
        by_settings: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            by_settings.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(number)
        texts, done = [""] * len(requests), 0
        for numbers in by_settings.values():
            config, stops = _sampling(requests[numbers[0]].args[1])
            for i in range(0, len(numbers), PROMPTS_PER_BATCH):
                part = numbers[i : i + PROMPTS_PER_BATCH]
                prompts = [self._encode(requests[number].args[0]) or self.start_ids for number in part]
                for number, text in zip(part, self.write(prompts, config, stops), strict=True):
                    texts[number] = text
                done += len(part)
                self.on_progress(done / len(requests))
        return texts

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).tolist()

    def _split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of both, as they are in one text: spaces between them belong to what follows."""
        bare = context.rstrip()
        before = self._encode(bare)
        behind = self._encode(context + continuation)[len(before) :] if bare else self._encode(context + continuation)
        return before or self.start_ids, behind

    def _windows(self, context: list[int], targets: list[int]) -> Iterator[tuple[list[int], int]]:
        """Ids of windows and how many targets are at the end of each: every target once, with as many ids before them
        as the model reads."""
        ids, seq_len, first = [*context, *targets], self.model.config.seq_len, len(context)
        while first < len(ids):
            end = min(first + seq_len, len(ids))
            yield ids[max(0, end - seq_len - 1) : end], end - first
            first = end

    @torch.no_grad()
    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Log-likelihood of every pair's targets after its context, and whether all are the likeliest."""
        windows = [(number, *window) for number, pair in enumerate(pairs) for window in self._windows(*pair)]
        windows.sort(key=lambda window: len(window[1]))
        nats, greedy, done = np.zeros(len(pairs)), np.ones(len(pairs), bool), 0
        with evaluating(self.model):
            for batch in _batches(windows):
                longest = len(batch[-1][1])
                padded = torch.zeros(len(batch), longest, dtype=torch.int64)  # later ids change nothing before them
                for row, (_, ids, _) in zip(padded, batch, strict=True):
                    row[: len(ids)] = torch.tensor(ids)
                padded = padded.to(self.model.device)
                losses, ranks = (x.cpu() for x in token_scores(self.model, padded[:, :-1], padded[:, 1:]))
                for row, (number, ids, n_targets) in enumerate(batch):
                    targets = slice(len(ids) - 1 - n_targets, len(ids) - 1)
                    nats[number] -= losses[row, targets].double().sum().item()
                    greedy[number] &= bool((ranks[row, targets] == 0).all())
                done += len(batch)
                self.on_progress(done / len(windows))
        return list(zip(nats.tolist(), greedy.tolist(), strict=True))


def _batches(windows: Sequence[tuple[int, list[int], int]]) -> Iterator[list[tuple[int, list[int], int]]]:
    """Windows, shortest first, in batches of at most BATCH_TOKENS ids with their padding."""
    batch: list[tuple[int, list[int], int]] = []
    for window in windows:
        if batch and (len(batch) + 1) * len(window[1]) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def _sampling(settings: Mapping[str, Any]) -> tuple[SampleConfig, list[str]]:
    """How a task wants text drawn, and the strings that end it. Greedy unless it says otherwise."""
    until = settings.get("until") or []
    greedy = not settings.get("do_sample", False) or settings.get("temperature") == 0
    values = {name: settings[name] for name in ("temperature", "top_k", "top_p") if settings.get(name) is not None}
    length = next(
        (settings[name] for name in ("max_gen_toks", "max_new_tokens", "max_tokens") if settings.get(name)), 0
    )
    config = SampleConfig(max_new_tokens=length or MAX_NEW_TOKENS, greedy=greedy, **({} if greedy else values))
    return config, [until] if isinstance(until, str) else [str(each) for each in until]


def find_tasks(names: Sequence[str]) -> TaskManager:
    """The harness's tasks, among which `names` are, or which are files of the user's. Raises UsageError."""
    manager = TaskManager(include_defaults=not all(map(_stands_alone, names)))  # they take many seconds to read
    for name in names:
        if name not in manager.all_tasks and not _is_file(name):
            raise UsageError(
                f"there is no task {name!r}{nearest(name, manager.all_tasks)}",
                fix="see them: lm_eval ls tasks; one of yours is a YAML file: --tasks my-task.yaml",
            )
    return manager


def _is_file(name: str) -> bool:
    """Whether a task is named by its file."""
    return name.endswith(SUFFIXES) and Path(name).is_file()


def _stands_alone(name: str) -> bool:
    """Whether a task is a file that names no others, as one of a group does."""
    return _is_file(name) and b"group" not in Path(name).read_bytes()


def load_tasks(manager: TaskManager, names: Sequence[str]) -> Any:
    """Tasks with their data, which some load from the network. Raises DataError where it cannot be had, MissingFeature
    where a task needs a library that is not installed."""
    with _told(names):
        loaded = manager.load(list(names))
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=SEED)
        return loaded


def evaluate_tasks(lm: HarnessModel, loaded: Any) -> dict[str, dict[str, float | None]]:
    """Metrics of every task and group, each with its standard error. Raises DataError where a task does not work."""
    with _told(loaded["tasks"]):
        found = evaluate(lm=lm, task_dict=loaded, log_samples=False)
    assert found is not None
    return {task: _metrics(values) for task, values in found["results"].items()}


@contextmanager
def _told(names: Iterable[str]) -> Iterator[None]:
    """Name the tasks in what goes wrong with them: they are files of others, and can be wrong in every way."""
    try:
        yield
    except ImportError as error:
        raise MissingFeature(f"--tasks {','.join(names)} needs a library: {_brief(error)}") from error
    except (*FAULTS, YAMLError, TemplateError) as error:
        raise DataError(f"--tasks {','.join(names)} does not work: {_brief(error)}") from error


def _brief(error: Exception) -> str:
    """The kind of an error and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).strip()}".partition("\n")[0]


def _metrics(values: Mapping[str, Any]) -> dict[str, float | None]:
    """The numbers of a task: the harness's acc,none is acc here, and other filters stay in the name."""
    metrics = {name.removesuffix(",none"): value for name, value in values.items() if "," in name}
    return {
        name: float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
        for name, value in metrics.items()
    }
