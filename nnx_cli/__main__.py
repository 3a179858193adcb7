"""The command `nnx`, also as `python -m nnx_cli`."""

import _signal as signal  # type: ignore[import-not-found]  # signal without its enums: soon, before Python hears Ctrl-C
import gc
import os

INTERRUPTED = 130


def main() -> None:
    """Run the command. What stops it while its modules are imported ends it at once, without a traceback."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup and a shell's & ask for
            signal.signal(number, lambda *_: os._exit(INTERRUPTED))
    gc.disable()  # nothing of what is imported is garbage; a command begins with gc.enable
    from nnx_cli import cli

    cli.main()


if __name__ == "__main__":
    main()
