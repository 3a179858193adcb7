"""The machine as the system describes it. No torch here."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import sys
import sysconfig
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # names in malloc.h


def n_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def missing_to_compile() -> str | None:
    """What torch.compile needs for a CPU and does not find; on Linux, Python's headers are a package of their own."""
    if not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        return "C++ compiler"
    if sys.platform == "linux" and not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "headers of Python"
    return None


def machine_memory_bytes() -> int:
    """Physical memory of this machine."""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 8 * 2**30


def peak_rss_bytes() -> int | None:
    """Most memory this process has held; None on Windows."""
    if sys.platform == "win32":
        return None
    import resource

    status = Path("/proc/self/status")  # the other source starts with what the process held that started this one
    lines = status.read_text().splitlines() if status.exists() else []
    if own := next((line for line in lines if line.startswith("VmHWM:")), None):
        return int(own.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def rss_bytes() -> int | None:
    """Memory this process holds now; None where only Linux would tell."""
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        return None
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def keep_freed_memory() -> None:
    """Have glibc keep large blocks that are freed, for a step asks for the same ones again and again: to hand them back
    and get them anew, page by page, takes up to a tenth of its time. Other C libraries are left alone."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def reset_peak_rss() -> bool:
    """Hand freed memory back, and let `peak_rss_bytes` begin anew. Returns whether this system can: Linux does, with
    glibc."""
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        return False
    libc.malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def cpu_model() -> str:
    """What the CPU calls itself, where the system tells."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
