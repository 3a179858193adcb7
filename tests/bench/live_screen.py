"""What watching a run costs: the share of a run's time in its screen, its report, its coach and its trackers.

    python tests/bench/live_screen.py [--runs 3] [--size 80x24] [--tracker ok|raises|hangs|spins|none ...]
                                      [--results FILE] [--markdown FILE] [-- WORDS OF nnx train]

Each run is the whole command as a process on a pseudo-terminal that somebody reads, with everything on. All of what
watches it is called from the thread that trains, so that the time of these calls, by the clock, is what they cost;
what else the machine does slows both alike. A tracker has a process besides, whose processor time is told apart. The
fake ones follow the run's logs as real ones do; they raise or hang when the first step is told, or never stop
computing. POSIX only.
"""

import argparse
import datetime
import fcntl
import json
import os
import platform
import pty
import resource
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any

from nnx_cli.system.machine import cpu_model

WORDS = ["--model", "nyx", "--size", "nano", "--max-steps", "1850"]  # about as many as the first run of the README
TRACKERS = {"none": None, "ok": ("nowhere", "raise"), "raises": ("scalars", "raise"), "hangs": ("scalars", "sleep")}
TRACKERS |= {"spins": ("scalars", "spin")}
FAKES = Path(__file__).parents[1] / "trackers"
MOST = {"screen": 0.01, "report": 0.02, "coach": 0.01, "tracker": 0.01}  # that it is to cost


def watch_watchers(seconds: dict[str, float]) -> None:
    """Add up, by part, the time of every call of what watches a run; a call within another counts once."""
    from nnx_cli.console.block import Block
    from nnx_cli.console.run_view import TrainingView
    from nnx_cli.reporting.live_coach import LiveCoach
    from nnx_cli.reporting.live_report import LiveReport
    from nnx_cli.trackers._process import Tracking

    inside: list[str] = []

    def timed(part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def timed_call(*args: Any, **kwargs: Any) -> Any:
            if inside:
                return call(*args, **kwargs)
            inside.append(part)
            started = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                seconds[part] += time.perf_counter() - started
                inside.clear()

        return timed_call

    parts = {TrainingView: "screen", Block: "screen", LiveReport: "report", LiveCoach: "coach", Tracking: "tracker"}
    names = ["step", "moved", "sampled", "saved", "note", "weighed", "start", "stop", "draw", "__enter__", "__exit__"]
    for owner, part in parts.items():
        for name in names:
            if (call := getattr(owner, name, None)) is not None:
                setattr(owner, name, timed(part, call))


def child(words: list[str], tracker: str, results: Path) -> None:
    """Run the command, and keep what it cost."""
    started = time.perf_counter()
    seconds: dict[str, float] = defaultdict(float)
    watch_watchers(seconds)
    if (place := TRACKERS[tracker]) is not None:
        from nnx_cli.trackers import _process, _tracker

        where, how = place
        fake = results.with_name(f"{how}_{where}.py")
        fake.write_text(f"import fake\nstart = fake.at({where!r}, {how!r})\n")
        paths = [str(fake.parent), str(FAKES)]
        os.environ |= {"PYTHONPATH": os.pathsep.join(paths), "CALLS": str(fake.parent)}
        begin = _process.Tracking.__init__

        def begin_fake(self: Any, folder: Path, modules: Any, *rest: Any) -> None:
            begin(self, folder, [fake.stem], *rest)

        _process.Tracking.__init__ = begin_fake  # type: ignore[method-assign]
        _tracker.check_installed = lambda names: None  # the fake takes its place
        words = [*words, "--log-to", "tensorboard"]
    from nnx_cli import cli

    try:
        sys.argv = ["nnx", "train", *words]
        cli.main()
    finally:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        row = {"seconds": time.perf_counter() - started, "side_cpu_s": used.ru_utime + used.ru_stime, "in": seconds}
        results.write_text(json.dumps(row))


def measure(tracker: str, words: list[str], size: tuple[int, int], work: Path) -> dict[str, Any]:
    """One run: seconds of it and of what watched it, and the bytes that it wrote to the terminal."""
    folder = Path(tempfile.mkdtemp(dir=work))
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", size[1], size[0], 0, 0))
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
    own = [__file__, "--child", str(folder / "cost.json"), "--tracker", tracker]
    command = [sys.executable, *own, "--", *words, "--out", str(folder / "run")]
    environment = kept | {"TERM": "xterm-256color"}
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        n_bytes = 0
        with suppress(OSError):  # what Linux raises at the end
            while part := os.read(ours, 65536):
                n_bytes += len(part)
    os.close(ours)
    if process.returncode != 0:
        raise SystemExit(f"nnx train ended with {process.returncode}")
    row = json.loads((folder / "cost.json").read_text())
    return {"tracker": tracker, "size": f"{size[0]}x{size[1]}", "words": words, "terminal_bytes": n_bytes} | row


def as_markdown(rows: list[dict[str, Any]], machine: str) -> str:
    """What the runs cost, as the page live_screen.md."""
    lines = ["# What watching a run costs", "", machine, ""]
    lines += ["Shares of the whole command's time that the thread which trains spends in what watches the run, by the"]
    lines += ["clock; mean of the runs (most). `spins` never stops computing, in a process of lower priority.", ""]
    lines += ["| run | tracker | terminal | runs | seconds | screen | report | coach | tracker | its processor time |"]
    lines += ["| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]
    groups = dict.fromkeys((" ".join(row["words"]), row["tracker"], row["size"]) for row in rows)
    for words, tracker, size in groups:
        own = [r for r in rows if (" ".join(r["words"]), r["tracker"], r["size"]) == (words, tracker, size)]
        cells = [f"`{words}`", tracker, size, str(len(own)), f"{statistics.mean(r['seconds'] for r in own):.0f}"]
        for part in MOST:
            shares = [r["in"].get(part, 0.0) / r["seconds"] for r in own]
            cells.append(f"{statistics.mean(shares):.2%} ({max(shares):.2%})")
        cells.append(f"{statistics.mean(r['side_cpu_s'] for r in own):.1f} s")
        lines.append(f"| {' | '.join(cells)} |")
    asked = ", ".join(f"{part} {most:.0%}" for part, most in MOST.items())
    return "\n".join([*lines, "", f"Asked for: at most {asked}.", ""])


def main() -> None:
    """Measure, and print the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--size", default="80x24", help="columns x lines of the terminal")
    parser.add_argument("--tracker", action="append", choices=list(TRACKERS), help="default: none")
    parser.add_argument("--results", type=Path, help="JSON lines: what stands there counts too")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("words", nargs="*", help="of nnx train, after --")
    options = parser.parse_args()
    trackers = options.tracker or ["none"]
    if options.child:
        child(options.words, trackers[0], options.child)
        return
    columns, lines = map(int, options.size.split("x"))
    rows: list[dict[str, Any]] = []
    if options.results and options.results.exists():
        rows = [json.loads(line) for line in options.results.read_text(encoding="utf-8").splitlines()]
    with tempfile.TemporaryDirectory() as work:
        for _ in range(options.runs):
            for tracker in trackers:
                rows.append(measure(tracker, options.words or WORDS, (columns, lines), Path(work)))
                print(json.dumps(rows[-1]), flush=True)
                if options.results:
                    with options.results.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(rows[-1]) + "\n")
    import torch

    machine = (
        f"{cpu_model()}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python "
        f"{platform.python_version()}, {platform.system()}, {datetime.date.today().isoformat()}. "
        "Made by `python tests/bench/live_screen.py`."
    )
    text = as_markdown(rows, machine)
    print(text)
    if options.markdown:
        options.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
