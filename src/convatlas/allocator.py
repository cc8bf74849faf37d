"""Keeps large blocks of memory in the process, where Linux would take each back and hand out fresh pages again.

By default glibc returns every freed block above 32 MiB to the system, so an operation that writes a large tensor pays
for page faults each time it runs: elementwise ones become up to nine times, whole networks up to two times as fast
without. The command line and the benchmarks keep large blocks; CONVATLAS_ALLOCATOR=0 in the environment turns it off.
"""

from __future__ import annotations

import ctypes
import os

__all__ = ["allocator", "keep_large_blocks"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of parameters in glibc's malloc.h
_kept = False


def keep_large_blocks() -> bool:
    """Let glibc serve blocks up to 1 GiB from memory that the process keeps, and keep up to 2 GiB that are free.

    Nothing is done where CONVATLAS_ALLOCATOR is 0, and nothing can be where the C library is another one. Memory that
    is in use at the same time does not grow.

    Returns:
        Whether large blocks are kept.
    """
    global _kept
    if not _kept and os.environ.get("CONVATLAS_ALLOCATOR", "1") != "0":
        try:
            library = ctypes.CDLL("libc.so.6")
            library.gnu_get_libc_version  # noqa: B018 (another library of this name lacks it)
            mallopt = library.mallopt
        except (OSError, AttributeError):
            return False
        _kept = mallopt(_MMAP_THRESHOLD, 2**30) == 1 and mallopt(_TRIM_THRESHOLD, 2**31 - 1) == 1
    return _kept


def allocator() -> str:
    """How large blocks are handled, in words, for the footer of a report."""
    return "large blocks are kept" if _kept else "as the system sets it"
