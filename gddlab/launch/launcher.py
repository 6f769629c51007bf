"""Starts a run in fresh processes: nothing of the calling kernel (CUDA, threads, locks) is inherited."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from gddlab.distill.building import check
from gddlab.distill.config import TrainConfig
from gddlab.distill.recording import write_status
from gddlab.errors import GddlabError
from gddlab.launch.handle import RunHandle
from gddlab.launch.lock import sign, take
from gddlab.processes import fresh_environment

__all__ = ["train"]


def train(config: TrainConfig, *, nproc: int = 1) -> RunHandle:
    """Starts or continues a run in fresh processes and returns at once.

    The run goes on when the calling kernel ends; `gddlab.attach(run_dir)` finds it again. The same call on the same directory continues
    a run that was stopped, killed or failed, and returns the handle of one that is done.

    Args:
        config: What to run, from a preset.
        nproc: Processes on this machine; 1 has no process group, more run through torchrun (gloo on CPUs, NCCL on GPUs).

    Raises:
        GddlabError: Teacher, data, mask or batch do not fit each other; the directory holds another configuration, or is running.
    """
    if nproc < 1:
        raise GddlabError(f"nproc={nproc}: give at least 1")
    run_dir = config.run_dir.resolve()
    config = config.model_copy(update={"run_dir": run_dir})
    check(config, world_size=nproc)
    run_dir.mkdir(parents=True, exist_ok=True)
    fd = take(run_dir)
    try:
        config.write()
        handle = RunHandle(run_dir)
        if handle.written_status.get("state") == "done":
            return handle
        write_status(run_dir, "starting")
        (run_dir / "log").mkdir(exist_ok=True)
        # asked to stop while it starts, the process hears it once it can make a checkpoint
        with (run_dir / "log" / "launch.txt").open("ab") as log, held_back(signal.SIGTERM, signal.SIGUSR1):
            handle.process = subprocess.Popen(
                [sys.executable, "-m", "gddlab.launch.worker", str(run_dir), str(nproc)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                pass_fds=(fd,),
                env=fresh_environment(nproc),
            )
        sign(fd, handle.process.pid)
        return handle
    finally:
        os.close(fd)


@contextmanager
def held_back(*signals: signal.Signals) -> Iterator[None]:
    """Inside, these signals wait; a process started here inherits that."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
