import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from nnx_cli.system.signals import stop_signals

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no such signals")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_is_a_question_answered(number):
    before = signal.getsignal(number)
    with stop_signals() as should_stop:
        assert not should_stop()
        os.kill(os.getpid(), number)
        assert should_stop()
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_stops_at_once():
    with pytest.raises(KeyboardInterrupt), stop_signals():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_an_ignored_signal_stays_ignored(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals() as should_stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not should_stop()
    finally:
        signal.signal(signal.SIGHUP, before)


def ended_by(number, body, **options):
    """How a process ends that does `body` after `leave_on_signals`, when the signal comes where it prints "ready"."""
    script = f"import signal, sys, time\nfrom nnx_cli.system import signals, files\n{textwrap.dedent(body)}"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        return *process.communicate(), process.returncode


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("place", ["PLAIN", "CALLBACK", "IMPORT"])
def test_with_nothing_to_save_a_signal_is_the_end(number, place):
    """Wherever it comes: in a library that catches everything, in a callback that lets nothing out, in an import."""
    body = globals()[place] + "signals.leave_on_signals(lambda: print('bye', flush=True))\nwork()\nprint('lost')\n"
    assert ended_by(number, body) == ("bye\n", "", 130)


PLAIN = """
def work():
    try:
        print("ready", flush=True)
        time.sleep(9)
    except BaseException:
        pass

"""
CALLBACK = """
class work:
    def __del__(self):
        print("ready", flush=True)
        time.sleep(9)

"""
IMPORT = """
class Finder:
    def find_spec(*_):
        print("ready", flush=True)
        time.sleep(9)

def work():
    sys.meta_path.insert(0, Finder)
    import nothing

"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_what_is_half_made_is_removed_first(number, tmp_path):
    body = """
        signals.leave_on_signals(lambda: None)
        from pathlib import Path
        try:
            with files.new_folder(Path("new")) as folder:
                (folder / "half").write_text("half")
                print("ready", flush=True)
                time.sleep(9)
        except KeyboardInterrupt:
            sys.exit(f"{len(signals.arrived)} came")
    """
    assert ended_by(number, body, cwd=tmp_path) == ("", "1 came\n", 1)
    assert list(tmp_path.iterdir()) == []


def test_what_nohup_asked_to_ignore_is_ignored():
    body = """
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signals.leave_on_signals(lambda: None)
        print("ready", flush=True)
        time.sleep(0.2)
        print("whole")
    """
    assert ended_by(signal.SIGHUP, body) == ("whole\n", "", 0)


def test_ctrl_c_from_the_first_moment_that_is_ours(tmp_path):
    """As soon as the command's first module runs: no traceback, whatever is being imported."""
    for pause in (0.0, 0.03, 0.1, 0.2):
        with subprocess.Popen(
            [sys.executable, "-c", SIGNALLED, "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout.readline() == "ready\n"
            time.sleep(pause)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate()
        assert said == "" and process.returncode in (0, 130, -signal.SIGINT), (pause, process.returncode, said)


SIGNALLED = """
import sys
from nnx_cli import __main__

class Finder:  # says that the first import begins
    def find_spec(*_):
        sys.meta_path.remove(Finder)
        print("ready", flush=True)

sys.meta_path.insert(0, Finder)
__main__.main()
"""
