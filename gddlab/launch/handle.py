"""A handle on a run, from any kernel and at any time."""

from __future__ import annotations

import io
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from gddlab.distill.status import ACTIVE, mark, progress_of, where_it_continues
from gddlab.errors import GddlabError, NotFound
from gddlab.files import path_of, read_end
from gddlab.lock import held, owners
from gddlab.progress import duration, interactive
from gddlab.runs import Run
from gddlab.theme import columns_over_kimg, themed

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class RunFailed(GddlabError):
    """The run ended with an error; the message holds the failing rank's own traceback, or its refusal in one line."""

    whole = True


class RunHandle(Run):
    """A run directory and its processes. It holds no connection: closing the kernel does not end the run."""

    process: subprocess.Popen[bytes] | None = None

    @property
    def status(self) -> str:
        """As `Run.status`."""
        if self.process is not None:
            self.process.poll()  # reaps the child, so that it is no zombie
        return super().status

    def wait(self, timeout: float | None = None) -> RunHandle:
        """Returns when the run has ended.

        Args:
            timeout: Seconds; None waits for ever.

        Raises:
            RunFailed: It failed; the message is the refusal, holds the traceback of the rank that failed, or says that
                its processes were ended and from where the same call continues.
            TimeoutError: It is still running.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while self.status in ACTIVE or held(self.run_dir):
            if end is not None and time.monotonic() > end:
                raise TimeoutError(f"{self.run_dir} is still {self.status} after {timeout:g} s")
            time.sleep(0.2)
        if not self.run_dir.is_dir():
            raise RunFailed(f"{self.run_dir} is gone: somebody removed it")
        if self.status == "failed":
            s = self.written_status
            if s.get("cause") == "refused":
                raise RunFailed(f"{self.run_dir} failed: {str(s['message']).partition(': ')[2]}")
            if "error" in s:
                raise RunFailed(f"{self.run_dir} failed on rank {s.get('rank')}:\n{s['error']}")
            raise RunFailed(
                f"{self.run_dir}: its processes ended without a word, as after kill -9, where memory is short, or when "
                f"the machine goes down; the same call continues from {where_it_continues(self.run_dir)}.\n"
                f"Its log ends: {self.tail(lines=1) or 'empty'}"
            )
        return self

    def stop(self, timeout: float = 120) -> RunHandle:
        """Asks the run to write a checkpoint and end, and waits for that; the same `train` call continues."""
        self._signal(signal.SIGTERM)
        return self.wait(timeout)

    def kill(self) -> RunHandle:
        """Ends every process on this machine at once, without a checkpoint; returns when the lock is free."""
        if self._signal(signal.SIGKILL):
            while held(self.run_dir):
                time.sleep(0.02)
            if self.status == "failed":
                mark(self.run_dir, "stopped")
        return self

    def tail(self, rank: int = 0, lines: int = 20) -> str:
        """Last lines of a rank's log."""
        path = self.run_dir / "log" / f"rank{rank}.txt"
        if not path.exists():
            path = self.run_dir / "log" / "launch.txt"
        return "\n".join(read_end(path)[-lines:])

    def watch(self, *, interval: float = 2.0) -> RunHandle:
        """Follows the run to its end: a live figure in a notebook, a live line at a terminal, a line per 30 s in a log.

        Interrupting it does not touch the run.
        """
        follow(self, interval)
        return self.wait()

    def _signal(self, number: int) -> bool:
        """Sends a signal to the run's owners, SIGKILL also to all their children; False if nothing runs.

        Raises:
            GddlabError: It runs, but on other machines.
        """
        until = time.monotonic() + UNSIGNED
        while (pids := owners(self.run_dir)) is None:  # starting: the lock is taken a moment before it is signed
            if not held(self.run_dir):
                return False
            if time.monotonic() > until:
                raise GddlabError(f"{self.run_dir} is locked by a process that has not said which one: end it by hand")
            time.sleep(0.02)
        if not pids:
            raise GddlabError(f"{self.run_dir} runs on other machines only: stop it on one of them")
        for pid in pids:
            with suppress(psutil.NoSuchProcess):
                for process in _family(pid) if number == signal.SIGKILL else [psutil.Process(pid)]:
                    with suppress(psutil.NoSuchProcess):
                        process.send_signal(number)
        return True


def _family(pid: int) -> list[psutil.Process]:
    """An owner and its descendants; of a rank that torchrun would restart, torchrun and all its ranks."""
    first = psutil.Process(pid)
    above = first.parent()
    if above is not None and any("torchrun" in word or "torch.distributed.run" in word for word in above.cmdline()):
        first = above
    return [first, *first.children(recursive=True)]


def attach(run_dir: str | Path) -> RunHandle:
    """The handle of a run that was started earlier, on this machine or on one that shares the directory.

    Raises:
        NotFound: No run there.
    """
    if not path_of("run_dir", run_dir).exists():
        raise NotFound(f"no such run directory: {run_dir}")
    return RunHandle(run_dir)


LOSSES = {"loss/g": "G", "loss/d": "D", "loss/instance": "instance"}
LOGITS = {"logits/fake": "generated", "logits/real": "real"}
UNSIGNED = 10
"""Seconds that a lock may be held without the name of its owner."""
LOG_SECONDS = 30
"""Seconds between two lines in a log."""


def line(run: RunHandle) -> str:
    """One line: state, progress, losses, time left, the last alarm."""
    alarm = run.written_status.get("alarm")
    return brief_line(run) + (f"  ALARM {alarm}" if alarm else "")


def brief_line(run: RunHandle) -> str:
    """`line` without the alarm."""
    s, last, state = run.written_status, run.last_metrics, run.status
    share = f"  {progress_of(s)} kimg" if progress_of(s) else ""
    if last is None or not share:
        return f"{run.run_dir.name}: {state}{share}"
    seconds = (s["total_nimg"] - s["nimg"]) / 1000 * last["sec_per_kimg"]
    left = f"  {duration(seconds)} left" if seconds and state in ACTIVE else ""
    losses = "  ".join(f"{title} {last[name]:.3f}" for name, title in LOSSES.items() if name in last)
    return f"{run.run_dir.name}: {state}{share}  loss {losses}  {last['sec_per_kimg']:.1f} s/kimg{left}"


def audience() -> str:
    """What the output goes to: "notebook", "terminal", or "log" (a pipe or a file)."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    if shell is not None and hasattr(shell, "kernel"):
        return "notebook"
    return "terminal" if interactive() else "log"


def follow(run: RunHandle, interval: float) -> None:
    """Shows a run until it ends."""
    who, handle = audience(), None
    if who == "notebook":
        from IPython.display import display

        handle = display(_shown(run), display_id=True)
    shown, spoke, alarm = -1, time.monotonic(), None
    while True:
        running = run.status in ACTIVE
        nimg = int(run.written_status.get("nimg", 0))
        if handle is not None and (nimg != shown or not running):
            handle.update(_shown(run))
        elif who == "terminal":
            if (newest := run.written_status.get("alarm")) != alarm:  # once, on a line of its own
                alarm = newest
                sys.stderr.write(f"\r\x1b[K{run.run_dir.name}: ALARM {alarm}\n" if alarm else "")
            width = shutil.get_terminal_size().columns - 1  # a line that wraps cannot be written again
            sys.stderr.write("\r\x1b[K" + (brief_line(run)[:width] if running else brief_line(run) + "\n"))
            sys.stderr.flush()
        elif who == "log" and (time.monotonic() - spoke > LOG_SECONDS or not running):
            spoke = time.monotonic()
            sys.stderr.write(line(run) + "\n")
        shown = nimg
        if not running:
            return
        time.sleep(interval)


def _shown(run: RunHandle):  # type: ignore[no-untyped-def]
    """The picture as PNG: a notebook without matplotlib set up shows a figure object as text."""
    from IPython import display

    fig, content = _picture(run), io.BytesIO()
    fig.savefig(content, format="png", dpi=2 * fig.dpi)
    return display.Image(content.getvalue(), width=round(fig.get_figwidth() * fig.dpi))


@themed
def _picture(run: RunHandle) -> Figure:
    """Losses, logits and the newest grid, as one figure."""
    from matplotlib.figure import Figure
    from PIL import Image

    metrics = run.thinned_metrics()
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
