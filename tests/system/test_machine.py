import subprocess
import sys
from pathlib import Path

import pytest

from nnx_cli.system.machine import peak_rss_bytes, rss_bytes

STATUS = Path("/proc/self/status")


@pytest.mark.skipif(not (STATUS.exists() and "VmHWM" in STATUS.read_text()), reason="the system does not tell")
def test_the_peak_of_memory_is_that_of_this_process():
    held = bytearray(64 * 2**20)
    held[::4096] = b"x" * len(held[::4096])
    code = "from nnx_cli.system.machine import peak_rss_bytes; print(peak_rss_bytes())"
    of_child = int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert of_child < 48 * 2**20 < rss_bytes() <= peak_rss_bytes()
    assert len(held)
