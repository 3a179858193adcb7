"""nnx from Python: `prepare`, `train`, `load` and `sample` take the options of the commands, with underscores.

They run the same code and raise the same errors, `nnx_cli.errors.NnxError` and its kinds. Nothing is printed unless
`progress=True`; warnings are Python's.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnx_cli.cli import call
from nnx_cli.commands._options import CALLER, Caller
from nnx_cli.console.output import Output
from nnx_cli.errors import NnxError, UsageError

if TYPE_CHECKING:
    from nnx_cli.data.tokenizers.base import Tokenizer
    from nnx_cli.models._base import LanguageModel
    from nnx_cli.runs.load import ModelRef

OF_THE_COMMAND_LINE = ("gpus", "dry_run", "json", "quiet", "debug", "help")


class TrainedModel:
    """A run, or what was quantized, merged or imported: its weights, numbers and text."""

    def __init__(self, ref: ModelRef) -> None:
        self._ref = ref

    def __repr__(self) -> str:
        return f"TrainedModel({self._ref.label!r})"

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self._ref.folder

    @cached_property
    def model(self) -> LanguageModel:
        """The network in evaluation mode, fp32, on the GPU where there is one: input_ids (B, T) to logits (B, T, V)."""
        from nnx_cli.runs.load import load_model
        from nnx_cli.system.device import pick_device

        return load_model(self._ref, pick_device("auto"))

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Text to ids and back; None for a model over bare ids."""
        return self._ref.tokenizer

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, one for each logged step."""
        from nnx_cli.runs.logs import read_intact

        path = self.folder / "metrics.jsonl"
        return read_intact(path)[0] if path.exists() else []

    def sample(self, prompt: str = "", **options: Any) -> str:
        """`prompt` and what the model writes behind it; options of `nnx sample`, such as max_new_tokens."""
        return sample(self, prompt, **options)


def prepare(*paths: str | Path, progress: bool = False, **options: Any) -> dict[str, Any]:
    """Make a token folder of text; what `nnx prepare --json` prints, `out` is the folder."""
    return _run("prepare", _as_words(paths), options, progress)


def train(*filepath: str | Path, progress: bool = False, **options: Any) -> TrainedModel:
    """Train on files of text, on `data`, or on the documentation that Python ships; `resume` goes on with a run."""
    if filepath:
        options["filepath"] = _as_words(filepath)
    file = options.get("bank_file") or (options.get("model") if str(options.get("model")).endswith(".py") else None)
    return load(_run("train", [], options, progress)["out"], model=file)


def load(
    run: str | Path | None = None,
    /,
    *,
    model: str | Path | None = None,
    bank_file: str | Path | None = None,
) -> TrainedModel:
    """A MODEL by its folder or name, also RUN@last; by default the newest run. `model` and `bank_file` are as in `nnx
    sample`: the file of its architecture or bank, where that is yours."""
    from nnx_cli.runs.find import find_model
    from nnx_cli.runs.load import architecture_of

    if model is not None and bank_file is not None:
        raise UsageError("load takes model or bank_file, not both")
    file = model if model is not None else bank_file
    with _advising():
        ref = find_model(None if run is None else str(run), None if file is None else Path(file))
        architecture_of(ref.config, ref.folder, ref.file)
    return TrainedModel(ref)


def sample(model: TrainedModel | str | Path | None = None, prompt: str = "", **options: Any) -> str:
    """`prompt` and what a model writes behind it; options of `nnx sample`, such as max_new_tokens."""
    if not isinstance(prompt, str):
        raise UsageError(f"a prompt is text, a str, not {type(prompt).__name__}")
    if options.get("num_samples", 1) != 1:
        raise UsageError("num_samples is for the command line", fix="call sample several times, with another seed each")
    if isinstance(model, TrainedModel):
        ref = model._ref
        model = ref.label
        if ref.file is not None:
            options.setdefault("model", ref.file)
    made = _run("sample", [] if model is None else [str(model)], options | ({"prompt": prompt} if prompt else {}))
    return made["prompt"] + made["samples"][0]["text"]


def _as_words(paths: tuple[str | Path, ...]) -> list[str]:
    """Paths as the command line has them. Raises UsageError where one is none."""
    for path in paths:
        if not isinstance(path, str | Path):
            raise UsageError(f"paths are given one by one, as str or Path, not as {type(path).__name__}")
    return [*map(str, paths)]


class _Returned(Output):
    """A screen whose product is kept instead of printed."""

    def __init__(self, progress: bool) -> None:
        super().__init__(json=True, quiet=not progress)
        self.value: dict[str, Any] = {}

    def show_json(self, value: Any) -> None:
        """Keep the product."""
        self.value = value

    def warn(self, text: str) -> None:
        """Warn as Python does."""
        warnings.warn(text, stacklevel=2)


def _run(command: str, arguments: list[str], options: dict[str, Any], progress: bool = False) -> dict[str, Any]:
    """The product of a command. Raises NnxError."""
    for name in OF_THE_COMMAND_LINE:
        if name in options:
            raise UsageError(f"{name} is for the command line: nnx {command} --help")
    screen = _Returned(progress)
    words = [command, *_words(options), *(["--", *arguments] if arguments else [])]
    token = CALLER.set(Caller(words, screen))
    try:
        with _advising():
            call(words)
    finally:
        CALLER.reset(token)
    return screen.value


@contextmanager
def _advising() -> Iterator[None]:
    """Give an error what mends it as a note, which Python shows below it."""
    try:
        yield
    except NnxError as error:
        if error.fix is not None:
            error.add_note(error.fix)
        raise


def _words(options: dict[str, Any]) -> Iterator[str]:
    """Options as they are typed; those that are None are left out."""
    for name, value in options.items():
        for each in value if isinstance(value, (list, tuple)) else [value]:
            if each is not None:
                yield f"--{name.replace('_', '-')}={each}"
