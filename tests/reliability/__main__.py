"""`python -m tests.reliability [--full] [NAME…]`: the parts by name, all of them without one; --list shows them."""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from tests.reliability import Result


def find_parts() -> dict[str, Callable[[bool], Result]]:
    """The tables PARTS of all test files here, in one."""
    parts: dict[str, Callable[[bool], Result]] = {}
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        table = getattr(importlib.import_module(f"tests.reliability.{path.stem}"), "PARTS", {})
        assert not parts.keys() & table.keys(), f"{path.name} has a name that another file has"
        parts |= table
    return parts


def main() -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    parser = argparse.ArgumentParser(prog="python -m tests.reliability", description="What a run survives.")
    parser.add_argument("names", nargs="*", help="parts to run; all without one")
    parser.add_argument("--full", action="store_true", help="the long version of each")
    parser.add_argument("--list", action="store_true", help="name the parts and stop")
    options = parser.parse_args()
    parts = find_parts()
    if options.list:
        print("\n".join(parts))
        return 0
    if unknown := set(options.names) - parts.keys():
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(parts)}")
    import torch

    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}", flush=True
    )
    broken = 0
    for name in options.names or parts:
        started = time.monotonic()
        try:
            result = parts[name](options.full)
        except Exception:  # whatever a broken part raises, the others still run
            traceback.print_exc()
            print(f"{name}: BROKEN after {time.monotonic() - started:.0f} s", flush=True)
            broken += 1
            continue
        verdict = "ok" if result.passed == result.times else "BROKEN"
        broken += verdict != "ok"
        print(
            f"{name}: {verdict}: promise {result.promise}, {result.tried}: {result.passed} of {result.times}, "
            f"{time.monotonic() - started:.0f} s",
            *(f"    {note}" for note in result.notes),
            sep="\n",
            flush=True,
        )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
