"""A real pseudo-terminal whose screen pyte keeps."""

import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest

NOT_OF_A_TERMINAL = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "JPY_PARENT_PID", "COLAB_RELEASE_TAG")


class Terminal:
    """Runs a command on a terminal of so many columns and lines, which is its own, as a shell's child has it; `screen`
    is what a person sees. What is typed is shown where it `echoes`, which moves the cursor."""

    def __init__(self, command, columns, lines, echoes=False, **variables):
        import pty
        import termios

        pyte = pytest.importorskip("pyte", reason="pyte, which the extra dev installs, keeps the screen")
        self.ours, self.theirs = pty.openpty()
        self.screen = pyte.Screen(columns, lines)
        self.stream = pyte.ByteStream(self.screen)
        self.written = b""
        self.resize(columns, lines)
        settings = termios.tcgetattr(self.theirs)
        settings[3] &= ~(0 if echoes else termios.ECHO)
        termios.tcsetattr(self.theirs, termios.TCSANOW, settings)
        self.process = self.start(command, {"TERM": "xterm-256color", "PYTHONUTF8": "1"} | variables)

    def start(self, command, variables):
        """The process, with these variables of the environment."""
        import fcntl
        import termios

        kept = {name: value for name, value in os.environ.items() if name not in NOT_OF_A_TERMINAL}
        return subprocess.Popen(
            [sys.executable, *command],
            env=kept | variables,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            **dict.fromkeys(("stdin", "stdout", "stderr"), self.theirs),
        )

    def is_over(self):
        return self.process.poll() is not None

    def type(self, text):
        os.write(self.ours, text.encode())

    def resize(self, columns, lines):
        import fcntl
        import struct
        import termios

        fcntl.ioctl(self.theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.screen.resize(lines, columns)

    def read(self, until=lambda text: False, seconds=10.0):
        """Feed the screen until its text satisfies `until` and nothing more comes, or the process is over; returns the
        lines."""
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            is_over = self.is_over()
            if select.select([self.ours], [], [], 0.05)[0]:
                with suppress(OSError):
                    part = os.read(self.ours, 65536)
                    self.written += part
                    self.stream.feed(part)
            elif is_over or until(self.text()):
                break
        return self.text().rstrip("\n").split("\n")

    def text(self):
        return "\n".join(line.rstrip() for line in self.screen.display)

    def wait(self, seconds=None):
        """The exit code."""
        return self.process.wait(seconds)

    def interrupt(self):
        os.killpg(self.process.pid, signal.SIGINT)

    def close(self):
        with suppress(ProcessLookupError):
            self.process.kill()
        self.wait()
        os.close(self.ours)
        os.close(self.theirs)
