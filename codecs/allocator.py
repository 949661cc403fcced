"""How the C library hands out the large blocks that layers of a network need."""

from __future__ import annotations

import ctypes
import sys

# Parameters of mallopt, from glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_THRESHOLD = -3

_KEPT = 1 << 29  # bytes of free memory at the end of the heap that stay with the process
_STEP = 1 << 26  # bytes by which the heap grows beyond what is asked for
_MAPPED = (
    1 << 30,
    1 << 25,
)  # bytes of the smallest block with a mapping of its own; older versions refuse the first


def tune_allocator() -> bool:
    """Makes the C library reuse large blocks of memory instead of returning them to the system.

    By default glibc maps every block of some megabytes anew and unmaps it when it is freed, so that each layer of a
    network has the system clear its output, page by page, before anything is computed. Afterwards such blocks
    come from the heap and stay there; the process keeps up to half a gigabyte that it no longer uses. The settings
    hold for the whole process, so programs call this, never a library on import.

    Returns:
        Whether the settings were accepted; False, and no effect, where the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    mapped = any(mallopt(_M_MMAP_THRESHOLD, size) for size in _MAPPED)
    return bool(mapped and mallopt(_M_TRIM_THRESHOLD, _KEPT) and mallopt(_M_TOP_PAD, _STEP))
