"""Let the C library of Linux keep the memory of freed tensors for the next ones.

It gives blocks over some MB back to the system as soon as they are freed, and the system clears the pages of every new one. A
frozen model on a CPU makes such blocks at every layer: a fifth of the time of its pass.
"""

from __future__ import annotations

import ctypes
import sys

KEPT = 512 << 20
"""Bytes: larger blocks are given back, as is what is free at the end of the memory beyond as much."""

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of malloc.h


def keep_freed() -> None:
    """Do so for this process; nothing where there is no such C library."""
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(MMAP_THRESHOLD, KEPT) or mallopt(MMAP_THRESHOLD, 32 << 20)  # the most before glibc 2.35
        mallopt(TRIM_THRESHOLD, KEPT)
