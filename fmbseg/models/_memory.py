"""Let the C library of Linux keep the memory of freed tensors for the next ones.

By default it gives blocks over some MB back to the system as soon as they are freed, and the system clears the pages of every new
block. A frozen model on a CPU makes such blocks at every layer, which takes a fifth of its time.
"""

from __future__ import annotations

import ctypes
import sys

KEPT = 512 << 20
"""Bytes: larger blocks are given back, and so is free memory at the end beyond this size."""

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of malloc.h


def keep_freed() -> None:
    """Keep freed memory in this process; does nothing with another C library."""
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(MMAP_THRESHOLD, KEPT) or mallopt(MMAP_THRESHOLD, 32 << 20)  # the most before glibc 2.35
        mallopt(TRIM_THRESHOLD, KEPT)
