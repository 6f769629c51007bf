"""One run, one owner: an flock that ends with its process, however that ends."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from gddlab.errors import GddlabError

__all__ = ["held", "owner", "sign", "take"]


def take(run_dir: Path) -> int:
    """Takes the lock of a run directory; the lock lives as long as a process holds the returned file descriptor.

    Raises:
        GddlabError: Somebody holds it.
    """
    fd = os.open(run_dir / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise GddlabError(f"{run_dir} is being run by another process: use gddlab.attach({str(run_dir)!r})") from None
    return fd


def held(run_dir: Path) -> bool:
    """Whether a process holds the lock."""
    if not (run_dir / "lock").exists():
        return False
    try:
        os.close(take(run_dir))
    except GddlabError:
        return True
    return False


def sign(fd: int, pid: int) -> None:
    """Writes into the lock who owns the run: the leader of its process group."""
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{pid}\n".encode(), 0)


def owner(run_dir: Path) -> int | None:
    """Process number of the run's owner; None when nobody holds the lock or it is not signed yet."""
    if not held(run_dir):
        return None
    text = (run_dir / "lock").read_text().strip()
    return int(text) if text else None
