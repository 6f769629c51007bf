"""One run, one owner: an flock that ends with its processes, however they end; the agents of several machines share it."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from gddlab.errors import GddlabError

__all__ = ["Job", "held", "owners", "sign", "take"]


@dataclass(frozen=True)
class Job:
    """What the agents of one training have in common: a name, their rendezvous; and how many of them there are."""

    name: str = "-"
    nodes: int = 1


ALONE = Job()


def take(run_dir: Path, job: Job = ALONE) -> int:
    """Takes the lock of a run directory; it lives as long as a process holds the returned file descriptor.

    Args:
        run_dir: The run.
        job: With several nodes, the agents of the same job share the lock.

    Raises:
        GddlabError: Somebody else holds it.
    """
    fd = os.open(run_dir / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    if _locked(fd, fcntl.LOCK_EX):
        os.ftruncate(fd, 0)  # nobody else: what is written there is of processes that are gone
        os.pwrite(fd, f"{job.name}\n".encode(), 0)
        if job.nodes > 1:
            fcntl.flock(fd, fcntl.LOCK_SH)
        return fd
    if job.nodes > 1 and _locked(fd, fcntl.LOCK_SH) and _lines(run_dir)[0] == job.name:
        return fd
    os.close(fd)
    raise GddlabError(f"{run_dir} is being run by another process: use gddlab.attach({str(run_dir)!r})")


def _locked(fd: int, kind: int) -> bool:
    """Tries for a moment: whoever asks whether a lock is held takes it for as long as that lasts."""
    for attempt in range(10):
        try:
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if attempt < 9:
                time.sleep(0.02)
        else:
            return True
    return False


def held(run_dir: Path) -> bool:
    """Whether a process holds the lock; also of a run that this user may only read."""
    path = run_dir / "lock"
    if not path.exists():
        return False
    fd = os.open(
        path, os.O_RDWR if os.access(path, os.W_OK) else os.O_RDONLY
    )  # network file systems lock what is writable
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def sign(fd: int, pid: int) -> None:
    """Writes into the lock who works on the run: the process that stops it when told to, and that is killed with what it started."""
    os.lseek(fd, 0, os.SEEK_END)
    os.write(fd, f"{socket.gethostname()} {pid}\n".encode())


def owners(run_dir: Path) -> list[int] | None:
    """Process numbers of the run's owners on this machine; None when nobody holds the lock or it is not signed yet."""
    if not held(run_dir):
        return None
    signed = [line.split() for line in _lines(run_dir)[1:]]
    return [int(pid) for host, pid in signed if host == socket.gethostname()] if signed else None


def _lines(run_dir: Path) -> list[str]:
    """The job's name, then host and process of each owner."""
    return (run_dir / "lock").read_text().splitlines() or [""]
