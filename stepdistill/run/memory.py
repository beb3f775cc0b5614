"""Keep freed memory in the process on a CPU, as a GPU's caching allocator does."""

from __future__ import annotations

import ctypes
import os
import platform

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Tell glibc not to hand freed memory back after every step; True if it listened.

    Otherwise a step whose peak is higher than its neighbours' pays for page faults each time.
    STEPDISTILL_KEEP_MEMORY=0 turns it off.
    """
    if os.environ.get("STEPDISTILL_KEEP_MEMORY", "1") == "0":
        return False
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL("libc.so.6")
    return bool(libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
