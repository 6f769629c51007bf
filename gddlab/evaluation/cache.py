"""A folder for what is dear to compute; without a writable one everything works, only slower."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from gddlab.files import atomic_path, cache_dir

__all__ = ["recall"]

T = TypeVar("T")


def recall(name: str, compute: Callable[[], T], *, read: Callable[[Path], T], write: Callable[[Path, T], None]) -> T:
    """The value in the cache file `name`, or computed and put there.

    A file that `read` refuses (ValueError, OSError, EOFError) is computed again and replaced.
    """
    path = cache_dir() / name
    try:
        return read(path)
    except (ValueError, OSError, EOFError):
        value = compute()
    try:
        with atomic_path(path) as tmp:
            write(tmp, value)
    except OSError:
        pass  # a read-only or full home costs time at the next call, nothing else
    return value
