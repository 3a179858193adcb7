"""A training run as its view is told of it, without a model: what it shows is for a terminal to keep.

    python driver.py N_STEPS PAUSE [run | wait | fail | leave | spin | race | quiet | work | at-once] [quiet]

`wait` takes a line of standard input before its last drawing, and one before its end. `work` is no run, but a line of
progress and then a spinner; `at-once` is work by a clock that its pauses move, so that it takes no time.
"""

import math
import os
import signal
import sys
import time
import warnings

from nnx_cli.console.output import Output
from nnx_cli.console.progress import Progress
from nnx_cli.console.run_screen import RunFacts
from nnx_cli.console.run_view import RunsView, TrainingView
from nnx_cli.console.terminal import clean_screen
from nnx_cli.system.signals import leave_on_signals

HOSTILE = (
    "\x1b[2J\x1b[31mred\x07 \u202eright to left\u202c e"
    + "\u0301" * 300
    + " 小猫小猫" * 30
    + " 👩‍👩‍👧‍👦 " * 9
    + "x" * 500
    + "\r\n\t\x85\x9b2J"
)
PARTS = {"critic 1": [0.1, 0.0, 0.2], "moderator": [0.5, 1.0, 0.75]}


def record(step, n_steps, validates):
    loss = 1.2 + 4 * math.exp(-6 * step / n_steps)
    val = loss + 0.1 if validates else None
    return {
        "step": step,
        "tokens": 1024 * step,
        "time_s": 0.1 * step,
        "train_loss": loss,
        "val_loss": val,
        "val_bits_per_byte": val and val / math.log(2),
        "lr": 0.01 * (1 - step / n_steps),
        "grad_norm": 0.8,
        "tokens_per_s": 7300.0,
        "peak_memory_bytes": 414 << 20,
        "skipped_steps": 0,
        "mfu": 0.31,
    }


def work(output, n_steps, pause):
    with Progress(output) as progress:
        for step in range(1, n_steps + 1):
            progress.n_bytes("preparing \x1b[2J", step * 10**6, n_steps * 10**6)
            time.sleep(pause)
    with output.spinner("at work"):
        time.sleep(pause)
    output.show("the end")


def pass_at_once():
    """Have time pass in pauses alone, and these end as they begin."""
    clock = [1000.0]
    time.monotonic = lambda: clock[0]
    time.sleep = lambda seconds: clock.append(clock.pop() + seconds)


def main():
    n_steps, pause, how = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
    if how == "at-once":
        pass_at_once()
    output = Output(quiet="quiet" in sys.argv[3:])
    facts = RunFacts("nyx nano, 787,072 parameters", n_steps, 7 << 30, 2.31)
    if how in ("work", "at-once"):
        work(output, n_steps, pause)
        return
    output.note("the plan of the run")
    if how in ("leave", "spin"):
        leave_on_signals(clean_screen)
    if how == "spin":
        with output.spinner("at work"):
            time.sleep(pause)
            os.kill(os.getpid(), signal.SIGTERM)
    with RunsView(output) if how == "race" else TrainingView(output, facts) as view:
        if how == "race":
            view.begins("llama, seed 1", 0.0, 1.0)
        for step in range(1, n_steps + 1):
            view.step(record(step, n_steps, step % 10 == 0), step / n_steps)
            if step == n_steps // 2:
                view.sampled(step, HOSTILE)
                if how != "race":
                    view.weighed(step, "contribution", ["the", " \x1b[2J", "cat"], PARTS)
                warnings.warn("a library warns", stacklevel=1)
                if how == "fail":
                    raise RuntimeError("it failed")
                if how == "leave":
                    os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(pause)
            if step == n_steps - 1:
                view.next_draw = 0.0  # the last one is drawn
        if how == "wait":
            sys.stdin.readline()
            view.next_draw = 0.0
            view.step(record(n_steps, n_steps, False), 1.0)
            sys.stdin.readline()
    output.show("the end")


if __name__ == "__main__":
    main()
