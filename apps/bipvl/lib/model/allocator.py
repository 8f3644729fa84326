"""Tell the C library to keep the memory of freed tensors instead of giving it back after every layer.

A forward pass on a CPU frees and asks for hundreds of megabytes between any two layers. glibc's defaults return such
blocks to the kernel at once, and the kernel has to clear the same pages again: half of the time of a forward pass
(docs/research/speed.md). The environment variables MALLOC_* alone do not help a server, which computes in a thread:
threads get arenas of 64 MB, into which no such block fits, whatever the thresholds. So this process has one arena.
"""

from __future__ import annotations

import ctypes
import os

_LARGEST = 2**31 - 1
_OPTIONS = {  # numbers of mallopt(3)
    -8: 1,  # M_ARENA_MAX
    -1: _LARGEST,  # M_TRIM_THRESHOLD
    -2: 64 * 2**20,  # M_TOP_PAD
    -3: _LARGEST,  # M_MMAP_THRESHOLD
}


def keep_freed_memory() -> bool:
    """Set it for this process; a process whose environment sets any MALLOC_* variable is left as it is.

    Returns:
        Whether it was set: not if the C library is not glibc.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    return all(library.mallopt(option, value) for option, value in _OPTIONS.items())
