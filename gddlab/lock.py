"""The lock of a run directory: one run, one owner.

It is an flock by hand, which filelock could not replace: the lock file names its owners (filelock empties it), the
agents of one job on several machines share it, it is inherited by the process that works on the run and ends with it,
however that comes, and whether it is held can be asked by a user who may only read the directory.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from gddlab.errors import GddlabError

OWNED = "GDDLAB_OWNED"
"""Environment variable of a run's processes: id of the one that holds the lock on behalf of its children."""


@dataclass(frozen=True)
class Job:
    """What the agents of one training have in common: a name (their rendezvous) and the number of machines."""

    name: str = "-"
    nodes: int = 1


ALONE = Job()


def take(run_dir: Path, job: Job = ALONE) -> int:
    """Takes the lock of a run directory; it is held until every copy of the returned file descriptor is closed.

    With several nodes, the agents of the same job share the lock.

    Raises:
        GddlabError: Another process holds it.
    """
    fd = os.open(run_dir / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    if _locked(fd, fcntl.LOCK_EX):
        os.ftruncate(fd, 0)  # what is written there names processes that are gone
        os.pwrite(fd, f"{job.name}\n".encode(), 0)
        if job.nodes > 1:
            fcntl.flock(fd, fcntl.LOCK_SH)
        return fd
    if job.nodes > 1 and _locked(fd, fcntl.LOCK_SH) and _lines(run_dir)[0] == job.name:
        return fd
    os.close(fd)
    raise GddlabError(f"{run_dir} is being run by another process: use gddlab.attach({str(run_dir)!r})")


def _locked(fd: int, kind: int) -> bool:
    """Tries for 0.2 s, because `held` takes the lock for a moment to find out whether it is free."""
    for attempt in range(10):
        if attempt:
            time.sleep(0.02)
        try:
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            pass
    return False


def held(run_dir: Path) -> bool:
    """Whether a process holds the lock; read access is enough to ask."""
    path = run_dir / "lock"
    if not path.exists():
        return False
    # network file systems lock only what is open for writing
    fd = os.open(path, os.O_RDWR if os.access(path, os.W_OK) else os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def sign(fd: int, pid: int) -> None:
    """Adds an owner to the lock: the process that `stop` signals, and that `kill` ends with all its children."""
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_APPEND)  # others sign at the same time
    os.write(fd, f"{socket.gethostname()} {pid}\n".encode())


def owners(run_dir: Path) -> list[int] | None:
    """Process ids of the run's owners on this machine; None when nobody holds the lock or it is not signed yet."""
    if not held(run_dir):
        return None
    signed = [line.split() for line in _lines(run_dir)[1:]]
    return [int(pid) for host, pid in signed if host == socket.gethostname()] if signed else None


def _lines(run_dir: Path) -> list[str]:
    """The name of the job, then host and process id of each owner."""
    return (run_dir / "lock").read_text().splitlines() or [""]
