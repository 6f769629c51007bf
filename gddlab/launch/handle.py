"""A handle on a run, from any kernel and at any time."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from gddlab.distill.recorder import write_status
from gddlab.errors import GddlabError, NotFound
from gddlab.files import last_jsonl, read_end, thin_jsonl
from gddlab.launch.lock import held, owners
from gddlab.progress import duration, interactive
from gddlab.runs import Run, load_runs
from gddlab.teachers.catalog import is_run
from gddlab.theme import columns_over_kimg, themed

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["RunFailed", "RunHandle", "attach", "audience", "follow", "line", "listing"]

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


LOSSES = {"loss/g": "G", "loss/d": "D", "loss/instance": "instance"}
LOGITS = {"logits/fake": "generated", "logits/real": "real"}
LOG_SECONDS = 30
"""Seconds between two lines where nobody sees them live."""


def line(run: RunHandle) -> str:
    """One line: state, progress, losses, time left."""
    s, last = run.written_status, last_jsonl(run.run_dir / "metrics.jsonl")
    if last is None or "total_nimg" not in s:
        return f"{run.run_dir.name}: {run.status}"
    seconds = (s["total_nimg"] - last["nimg"]) / 1000 * last["sec_per_kimg"]
    left = f"  {duration(seconds)} left" if seconds else ""
    losses = "  ".join(f"{title} {last[name]:.3f}" for name, title in LOSSES.items() if name in last)
    alarm = f"  ALARM {s['alarm']}" if "alarm" in s else ""
    return (
        f"{run.run_dir.name}: {run.status}  {last['kimg']:.1f} of {s['total_nimg'] / 1000:.1f} kimg  "
        f"loss {losses}  {last['sec_per_kimg']:.1f} s/kimg{left}{alarm}"
    )


def audience() -> str:
    """Who looks: "notebook", "terminal", "log" (a pipe or a file), or "nobody" (a test, whose output must not vary)."""
    if "PYTEST_VERSION" in os.environ:
        return "nobody"
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    if shell is not None and hasattr(shell, "kernel"):
        return "notebook"
    return "terminal" if interactive() else "log"


def follow(run: RunHandle, interval: float) -> None:
    """Shows a run until it ends."""
    who = audience()
    if who == "nobody":
        return
    handle = None
    if who == "notebook":
        from IPython.display import display

        handle = display(_shown(run), display_id=True)
    shown, spoke = -1, time.monotonic()
    while True:
        running = run.status in ("starting", "running")
        nimg = int(run.written_status.get("nimg", 0))
        if handle is not None and (nimg != shown or not running):
            handle.update(_shown(run))
        elif who == "terminal":
            sys.stderr.write("\r\x1b[K" + line(run) + ("" if running else "\n"))
            sys.stderr.flush()
        elif who == "log" and (time.monotonic() - spoke > LOG_SECONDS or not running):
            spoke = time.monotonic()
            sys.stderr.write(line(run) + "\n")
        shown = nimg
        if not running:
            return
        time.sleep(interval)


def _shown(run: RunHandle):  # type: ignore[no-untyped-def]
    """The picture as a notebook takes it; a figure would be shown as text where nothing has set matplotlib up for notebooks."""
    from IPython import display

    fig, content = _picture(run), io.BytesIO()
    fig.savefig(content, format="png", dpi=2 * fig.dpi)
    return display.Image(content.getvalue(), width=round(fig.get_figwidth() * fig.dpi))


@themed
def _picture(run: RunHandle) -> Figure:
    """Losses, logits and the newest grid, as one figure."""
    import pandas as pd
    from matplotlib.figure import Figure
    from PIL import Image

    metrics = pd.DataFrame(thin_jsonl(run.run_dir / "metrics.jsonl"))
    fig = Figure(figsize=(10, 2.8), layout="constrained")
    *axes, samples = fig.subplots(1, 3)
    for ax, names, title in zip(axes, (LOSSES, LOGITS), ("loss", "mean logit"), strict=True):
        columns_over_kimg(ax, metrics, names, "")
        ax.set_title(title)
    samples.set_axis_off()
    if grids := run.grids():
        with Image.open(grids[-1]) as image:
            samples.imshow(image)
        samples.set_title(f"{float(grids[-1].stem):.1f} thousand images")
    fig.suptitle(line(run))
    return fig


def listing(folder: str | Path) -> pd.DataFrame:
    """A row a run.

    Args:
        folder: Folder of run directories, or one of them.

    Returns:
        Columns run (path below the folder), state, kimg ("3.2 of 12"), processes, heard (seconds since the last sign of life of one that runs; else
        empty), note (the last alarm, or why it failed).

    Raises:
        NotFound: No run there.
    """
    import pandas as pd

    folder = Path(folder)
    if not folder.is_dir():
        raise NotFound(f"no such folder: {folder}")
    runs = [attach(folder)] if is_run(folder) else [attach(r.run_dir) for r in load_runs(folder)]
    rows = []
    for run in runs:
        s, state = run.written_status, run.status
        seen = f"{s['nimg'] / 1000:.4g} of {s['total_nimg'] / 1000:.4g}" if "total_nimg" in s else ""
        heard = f"{time.time() - s['heartbeat']:.0f} s ago" if state == "running" and "heartbeat" in s else ""
        note = str(s.get("message") or s.get("alarm") or "").partition("\n")[0]
        name = folder.name if run.run_dir == folder else str(run.run_dir.relative_to(folder))
        rows.append((name, state, seen, str(s.get("world_size", "")), heard, note))
    return pd.DataFrame(rows, columns=["run", "state", "kimg", "processes", "heard", "note"])
