"""Keep freed memory for the next step instead of giving it back to the system, which costs a page fault for every 4 KiB."""

from __future__ import annotations

import contextlib
import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # from malloc.h
_LARGEST = 2**25


def keep_freed_memory() -> None:
    """Tell glibc's allocator to keep what is freed; elsewhere nothing happens. Holds for the whole process.

    A training step asks for the same large tensors again and again, each of which is mapped anew by default.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        allocator = ctypes.CDLL(None).mallopt
        allocator(_MMAP_THRESHOLD, _LARGEST)
        allocator(_TRIM_THRESHOLD, 2**31 - 1)
