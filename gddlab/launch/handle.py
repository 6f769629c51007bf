"""A handle on a run, from any kernel and at any time."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil

from gddlab.distill.recorder import write_status
from gddlab.errors import GddlabError, NotFound
from gddlab.files import read_end
from gddlab.launch.lock import held, owners
from gddlab.runs import Run

__all__ = ["RunFailed", "RunHandle", "attach"]

STALE_S = 120.0
"""Without a sign of life for so long, a run on another machine is taken for dead."""
PROGRESS = ("nimg", "total_nimg", "world_size", "alarm")
"""What status.json says of a run beside its state."""


class RunFailed(GddlabError):
    """The run ended with an error; the message holds the failing rank's own traceback."""


class RunHandle(Run):
    """A run directory and the processes that work on it, if any. It holds no connection: closing the kernel does not end the run."""

    process: subprocess.Popen[bytes] | None = None

    @property
    def status(self) -> str:
        """ "starting", "running", "done", "failed" or "stopped"; a run whose processes died without a word reads "failed".

        A rank has failed while processes are left: they are ended, or started again (`max_restarts`), and until then this reads "running".
        """
        if self.process is not None:
            self.process.poll()  # reaps the child, so that it is no zombie
        if not self.run_dir.is_dir():
            return "failed"
        state = str(self.written_status.get("state", "stopped"))
        if state in ("starting", "running") and not held(self.run_dir) and not self._heard_elsewhere():
            state = str(self.written_status.get("state", "stopped"))  # it may have ended between the two looks
            return "failed" if state in ("starting", "running") else state
        return "running" if state == "failed" and held(self.run_dir) else state

    def _heard_elsewhere(self) -> bool:
        """Whether another machine, whose lock may not be seen here, gave a sign of life of late."""
        s = self.written_status
        return s.get("host", socket.gethostname()) != socket.gethostname() and time.time() - s["heartbeat"] < STALE_S

    def wait(self, timeout: float | None = None) -> RunHandle:
        """Returns when the run has ended.

        Args:
            timeout: Seconds; None for ever.

        Raises:
            RunFailed: It failed; the message holds the traceback of the rank that did.
            TimeoutError: It is still running.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while self.status in ("starting", "running") or held(self.run_dir):
            if end is not None and time.monotonic() > end:
                raise TimeoutError(f"{self.run_dir} is still {self.status} after {timeout:g} s")
            time.sleep(0.2)
        if not self.run_dir.is_dir():
            raise RunFailed(f"{self.run_dir} is gone: somebody removed it")
        if self.status == "failed":
            error = self.written_status.get("error") or f"its processes died; log:\n{self.tail()}"
            raise RunFailed(f"{self.run_dir} failed on rank {self.written_status.get('rank')}:\n{error}")
        return self

    def stop(self, timeout: float = 120) -> RunHandle:
        """Asks for a checkpoint and the end, and waits for both; the same `train` call continues."""
        self._signal(signal.SIGTERM)
        return self.wait(timeout)

    def kill(self) -> RunHandle:
        """Ends every process on this machine at once, without a checkpoint; returns when none is left and the lock is free."""
        if self._signal(signal.SIGKILL):
            while held(self.run_dir):
                time.sleep(0.02)
            if self.status == "failed":
                known = self.written_status
                write_status(self.run_dir, "stopped", **{k: known[k] for k in PROGRESS if k in known})
        return self

    def tail(self, rank: int = 0, lines: int = 20) -> str:
        """Last lines of a rank's log."""
        path = self.run_dir / "log" / f"rank{rank}.txt"
        if not path.exists():
            path = self.run_dir / "log" / "launch.txt"
        return "\n".join(read_end(path)[-lines:])

    def watch(self, *, interval: float = 2.0) -> RunHandle:
        """Follows the run until it ends: live figure in a notebook, live line at a terminal, a line now and then in a log.

        Interrupting it leaves the run alone.
        """
        from gddlab.launch.watching import follow

        follow(self, interval)
        return self.wait()

    def _signal(self, number: int) -> bool:
        """Sends a signal to the run's owners (SIGTERM), or to all processes that belong to them (SIGKILL); False if nothing runs.

        Raises:
            GddlabError: It runs, but on other machines.
        """
        if not held(self.run_dir):
            return False
        while (pids := owners(self.run_dir)) is None:  # starting: the lock is taken a moment before it is signed
            if not held(self.run_dir):
                return False
            time.sleep(0.02)
        if not pids:
            raise GddlabError(f"{self.run_dir} is run by other machines only: stop it on one of them")
        for pid in pids:
            with suppress(psutil.NoSuchProcess):
                for process in _family(pid) if number == signal.SIGKILL else [psutil.Process(pid)]:
                    with suppress(psutil.NoSuchProcess):
                        process.send_signal(number)
        return True

    def __repr__(self) -> str:
        s = self.written_status
        share = f", {s['nimg'] / 1000:.1f} of {s['total_nimg'] / 1000:.1f} kimg" if "nimg" in s else ""
        return f"<run {self.run_dir.name}: {self.status}{share}>"


def _family(pid: int) -> list[psutil.Process]:
    """An owner and what it started; where it is a rank of torchrun's, which would start it again, torchrun and all its ranks."""
    first = psutil.Process(pid)
    above = first.parent()
    if above is not None and any("torchrun" in word or "torch.distributed.run" in word for word in above.cmdline()):
        first = above
    return [first, *first.children(recursive=True)]


def attach(run_dir: str | Path) -> RunHandle:
    """The handle of a run started earlier, here or elsewhere on this machine.

    Raises:
        NotFound: No run there.
    """
    if not Path(run_dir).exists():
        raise NotFound(f"no such run directory: {run_dir}")
    return RunHandle(run_dir)
