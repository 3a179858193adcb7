"""The Typer app: mounts the commands, and turns every error into a line and an exit code."""

from __future__ import annotations

import copy
import errno
import importlib
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.exceptions import TyperException

from nnx_cli import __version__
from nnx_cli.errors import (
    DataError,
    DoesNotFit,
    Interrupted,
    MissingFeature,
    NnxError,
    OutputError,
    UsageError,
    is_out_of_memory,
    nearest,
    quoted,
)
from nnx_cli.system import signals
from nnx_cli.system.streams import set_up_streams

EXAMPLE = re.compile(r"^ +(nnx .*?)(?: {2,}|$)", re.MULTILINE)  # a line of those behind the help of a command
MAX_LINE_CHARS = 600
OPEN_FILES = 1024  # of a process are enough, and what most systems allow
SPINS = "1000"  # before a thread sleeps: 1.3 times as fast as none on idle cores, 0.8 times on two that others use too
NO_MORE_FILES = {errno.EMFILE, errno.ENFILE}  # of this process, of all of them
COMMANDS = {  # name: (module in commands/ that has its `run`, line in `nnx --help`)
    "prepare": ("prepare", "Turn text into a token folder."),
    "train": ("train", "Train a model from scratch."),
    "sample": ("sample", "Write text with a trained model."),
    "chat": ("chat", "Talk to a trained model."),
    "eval": ("evaluate", "Measure loss, perplexity and bits per byte on held-out text."),
    "serve": ("serve", "Serve a model to programs and browsers."),
    "report": ("report", "Draw runs as a page: curves, plan, samples; several compared."),
    "visualize": ("visualize", "Show what a model attends to, gates and selects in a text."),
    "summarize": ("summarize", "Show layers, parameters, FLOPs, memory, and whether it fits."),
    "compare": ("compare", "Race architectures on one text, size and budget."),
    "sweep": ("sweep", "Search settings of training: many runs, the best first."),
    "quantize": ("quantize", "Make a smaller, faster copy of a model."),
    "merge": ("merge", "Add the adapters of --lora-rank to the weights."),
    "export": ("export", "Write a model for other programs, and check it there."),
    "import": ("import_original", "Read an original's checkpoint, running nothing that is in it."),
    "list": ("list_runs", "List the models in weights/: runs, and what was made of them."),
    "doctor": ("doctor", "Look at this machine's set-up and say how to mend it."),
    "bench": ("bench", "Measure training and decoding speed on this machine."),
}
ELSEWHERE = {  # command: options of other commands or programs, and what to write instead, with the value given
    "train": {
        "budget": "--max-time {10m}",
        "seconds": "--max-time 10m",
        "max-new-tokens": "--generate-length {100}",
        "block-size": "--seq-len {256}",
        "context-length": "--seq-len {256}",
        "hidden-size": "--dim {384}",
        "n-embd": "--dim {384}",
    },
    "compare": {
        "max-time": "--equal time --budget {10m}",
        "max-steps": "--budget 2M, a number of tokens",
        "epochs": "--budget 2M, a number of tokens",
    },
    "bench": {"max-time": "--seconds 30", "budget": "--seconds 30"},
    "visualize": {"out": "--html FILE"},
    "eval": {"data": "--filepath FILE"},
    "quantize": {"data": "--filepath FILE"},
}


@cache
def _load(name: str) -> TyperCommand:
    """The command of that name. Its module is imported only now: help for one builds the options of no other."""
    module = importlib.import_module(f"nnx_cli.commands.{COMMANDS[name][0]}")
    from nnx_cli.commands._help import make_command

    return make_command(module.run, name, getattr(module, "EXAMPLES", None))


class Commands(Mapping[str, TyperCommand]):
    """All commands by name, each loaded when it is asked for."""

    def __getitem__(self, name: str) -> TyperCommand:
        if name not in COMMANDS:
            raise KeyError(name)
        return _load(name)

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


class Group(TyperGroup):
    """The app, with errors as the contract has them: one line, the command that mends it, an exit code."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**(options | {"commands": Commands()}))

    def list_commands(self, ctx: Any) -> list[str]:
        """Names in the order of help."""
        return list(COMMANDS)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help of a copy whose commands have a name and a line: to load them all would take long."""
        from nnx_cli.console.help import prepare_help

        shown = copy.copy(self)
        prepare_help(shown)
        shown.commands = {name: TyperCommand(name, help=line, short_help=line) for name, (_, line) in COMMANDS.items()}
        TyperGroup.format_help(shown, ctx, formatter)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command line and exit with the code of how it ended."""
        arguments = (sys.argv[1:] if args is None else list(args)) or ["--help"]
        debug = "--debug" in arguments
        try:
            code = super().main(arguments, prog_name or "nnx", complete_var, False, windows_expand_args, **extra)
            sys.stdout.flush()
        except TyperException as error:
            code = _report(_with_choice(error, self, arguments), debug)
        except NnxError as error:
            code = _report(_explain(error), debug)
        except (typer.Abort, KeyboardInterrupt):
            code = Interrupted.exit_code
        except SystemExit as ended:  # what Typer and rich make of a closed pipe
            if not isinstance(ended.__context__, BrokenPipeError):
                raise
            code = 0
        except Exception as error:
            code = Interrupted.exit_code if signals.arrived else _report(_explain(error), debug)
        sys.exit(code if isinstance(code, int) else 0)


def _explain(error: Exception) -> NnxError:
    """An error as one line: what it says itself, unless what it comes from says better what to do."""
    if (refused := _no_more_files(error)) is not None:
        why = str(error) if isinstance(error, NnxError) else "cannot open what it needs: too many open files"
        limit = "" if os.name == "nt" else f": ulimit -n {OPEN_FILES}"
        others = refused.errno == errno.ENFILE
        return OutputError(
            why, fix="end other programs, then run the command again" if others else f"allow more{limit}"
        )
    if isinstance(error, NnxError):
        return error
    text = str(error)
    number = error.errno if isinstance(error, OSError) else None
    if is_out_of_memory(error):
        return DoesNotFit("out of memory", fix="take less at once or a smaller model; see what fits: nnx summarize")
    if isinstance(error, RuntimeError) and "can't start new thread" in text:
        return DoesNotFit("the system allows no more threads", fix="allow it more (ulimit -u, pids of a container)")
    if isinstance(error, OSError) and number == errno.ENOSPC:
        return OutputError(f"cannot write: {error.strerror}", fix="free some space, then run the command again")
    if isinstance(error, OSError) and isinstance(error.filename, (str, bytes)):
        return DataError(f"cannot use {os.fsdecode(error.filename)}: {error.strerror}")
    if "no kernel image is available" in text:  # CUDA's words
        return MissingFeature("this torch has no kernels for this GPU", fix="see which torch has them: nnx doctor")
    if type(error).__name__ == "AcceleratorError" and "captur" not in text:  # torch's; the latter is a mistake of ours
        why = text.partition("\n")[0]
        return NnxError(f"the GPU failed: {why}", fix="run the command again; resume a run: nnx train --resume last")
    return NnxError(f"internal error: {type(error).__name__}: {text}", fix="see where: add --debug")


def _no_more_files(error: BaseException) -> OSError | None:
    """What an error comes from, where that is the system's refusal to open one more file."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in NO_MORE_FILES:
            return seen
        if isinstance(seen, ImportError) and os.strerror(errno.EMFILE) in str(seen):  # of a shared library
            return OSError(errno.EMFILE, str(seen))
        seen = seen.__cause__ or seen.__context__
    return None


def _report(error: NnxError, debug: bool) -> int:
    """Print an error on stderr, with `debug` after the traceback of what is being handled; returns its exit code."""
    from nnx_cli.console.output import Output
    from nnx_cli.system.text import printable

    output = Output()
    lines = traceback.format_exc().splitlines() if debug else []
    lines.append(f"nnx: {_shortened(str(error))}")
    if fix := getattr(error, "fix", None):
        lines.append(f"     {_shortened(fix)}")
    for line in lines:
        output.err.print(printable(line), markup=False, emoji=False, highlight=False)
    return error.exit_code


def _with_choice(error: Any, group: Group, arguments: Sequence[str]) -> NnxError:
    """What Typer refuses, as an error of ours that says what may be meant."""
    if hasattr(error, "possibilities"):
        return _no_such_option(error, group, arguments)
    message, ctx = error.format_message(), getattr(error, "ctx", None)
    refused = NnxError(message)
    refused.exit_code = error.exit_code
    surplus = re.search(r"unexpected extra argument.*\((.*)\)", message)
    if surplus and ctx is not None and any(param.name == "filepath" for param in ctx.command.params):
        refused.fix = f"a text is named with --filepath: nnx {ctx.info_name} --filepath {quoted(surplus[1])}"
    elif surplus and ctx is not None and any(param.name == "prompt" for param in ctx.command.params):
        refused.fix = 'words of one text stand in quotes: "AI is a power!"'
    elif message.startswith("Missing") and ctx is not None and (example := EXAMPLE.search(ctx.command.epilog or "")):
        refused.fix = f"for example: {example[1]}"
    elif "Did you mean" not in message:
        name = ctx.info_name if ctx is not None else next((word for word in arguments if word in COMMANDS), None)
        refused.fix = f"see: {_help_of(name)}"
    return refused


def _help_of(command: str | None) -> str:
    """What shows the help of a command, or that of all."""
    return f"nnx {command} --help" if command in COMMANDS else "nnx --help"


def _no_such_option(error: Any, group: Group, arguments: Sequence[str]) -> NnxError:
    """An option that a command does not have: which of its own may be meant, or whose it is."""
    option, command = error.option_name, error.ctx.command
    if not option.startswith("--"):  # of -lr, Typer names the first letter that is no option
        words = (word.partition("=")[0] for word in arguments if re.match(r"-\w\w", word) and option[1:] in word)
        option = next(words, option).replace("_", "-")
    bare = f"--{option.lstrip('-')}"
    if (here := ELSEWHERE.get(error.ctx.info_name, {}).get(bare[2:])) is not None:
        written = re.sub(r"\{(.*)}", lambda example: _value_behind(option, arguments) or example[1], here)
        return UsageError(f"No such option: {option}; in nnx {error.ctx.info_name} it is {written}")
    own = [name for param in command.get_params(error.ctx) for name in param.opts]
    near = nearest(option, own if command is group else [*command.spellings(error.ctx), "--help"])
    owners = [name for name, other in group.commands.items() if any(bare in p.opts for p in other.params)]
    if not near and owners:
        near = f"; it belongs to {', '.join(owners)}" if len(owners) < len(COMMANDS) else "; it stands behind a command"
    return UsageError(f"No such option: {option}{near}", fix=None if near else f"see: {_help_of(error.ctx.info_name)}")


def _value_behind(option: str, arguments: Sequence[str]) -> str:
    """What was given to an option, in its word or in the next one."""
    for word, after in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name.replace("_", "-") == option:
            return value if equals else "" if after.startswith("-") else after
    return ""


def _shortened(text: str) -> str:
    """`text` in one line that a screen can hold, whatever a file or an argument brought into it; blanks stay, which may
    be those of a name."""
    line = " ".join(part.strip() for part in text.splitlines())
    return line if len(line) <= MAX_LINE_CHARS else f"{line[: MAX_LINE_CHARS // 2]} … {line[-MAX_LINE_CHARS // 2 :]}"


FIRST_STEPS = """First steps:

  nnx train --filepath book.txt    (without it: Python's documentation)
  nnx sample --prompt "Once upon a time"
  nnx report    (how the training went, as a page)"""

app = typer.Typer(
    cls=Group,
    epilog=FIRST_STEPS,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda token: token.replace("_", "-"),
    },
)


def _version(value: bool) -> None:
    if value:
        print(f"nnx {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Train a small language model from scratch on your own text, on the computer you already have."""


def call(words: Sequence[str]) -> None:
    """Run a command line inside of another program. Raises NnxError where it fails."""
    group = typer.main.get_command(app)
    assert isinstance(group, Group)
    try:
        TyperGroup.main(group, [*words], "nnx", standalone_mode=False)
    except TyperException as error:
        raise _with_choice(error, group, words) from error
    except typer.Abort as error:
        raise KeyboardInterrupt from error


def main() -> None:
    """The command `nnx`."""
    from nnx_cli.console.terminal import clean_screen

    set_up_streams()
    signals.leave_on_signals(clean_screen)
    if "OMP_WAIT_POLICY" not in os.environ:  # threads that spin while they wait stall a busy machine; waking takes time
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    if sys.platform == "linux":
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # less memory lost to gaps
    app()
