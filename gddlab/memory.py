"""`keep_memory`: the C library keeps what torch frees on a CPU, in place of giving it back after each layer."""

from __future__ import annotations

import ctypes
import os
import sys

TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4
"""Parameters of mallopt(3)."""
PAD = 256 << 20
"""Bytes by which the heap grows at once; they take memory when they are used."""


def keep_memory() -> bool:
    """Makes this process keep the memory that torch frees on a CPU, for the next tensor.

    glibc takes each large tensor's memory from the system and gives it back at once. The next layer then waits for the
    system to clear the same pages again, which costs large passes up to a third of their time. Afterwards memory stays
    with the process until it ends: as a rule the most that it needed at once, in large passes up to half more.

    gddlab's commands, the ranks of runs and its worker processes call this when they start. In a notebook call it once,
    before the first network. The environment variable GDDLAB_KEEP_MEMORY=0 switches it off, and so does any setting of
    glibc's own (MALLOC_MMAP_MAX_ and the like, GLIBC_TUNABLES).

    Returns:
        Whether it took effect: False with another C library (macOS, Windows, musl), or where it is switched off.
    """
    own = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if own or os.environ.get("GDDLAB_KEEP_MEMORY") == "0" or sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    return all(libc.mallopt(*setting) for setting in ((MMAP_MAX, 0), (TRIM_THRESHOLD, -1), (TOP_PAD, PAD)))
