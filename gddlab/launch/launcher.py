"""Starts a run in fresh processes: nothing of the calling kernel (CUDA, threads, locks) is inherited."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from gddlab.distill.build import check
from gddlab.distill.config import TrainConfig
from gddlab.distill.recorder import write_status
from gddlab.errors import GddlabError
from gddlab.launch.handle import RunHandle
from gddlab.launch.lock import sign, take
from gddlab.launch.plan import Launch
from gddlab.runtime import fresh_environment

__all__ = ["train"]


def train(
    config: TrainConfig,
    *,
    nproc: int = 1,
    nnodes: int = 1,
    rdzv_endpoint: str | None = None,
    max_restarts: int = 0,
    timeout_s: float = 600,
) -> RunHandle:
    """Starts or continues a run in fresh processes and returns at once.

    The run goes on when the calling kernel ends; `gddlab.attach(run_dir)` finds it again. The same call on the same directory continues
    a run that was stopped, killed or failed, and returns the handle of one that is done.

    On many machines, each makes this call with the same configuration, on a directory that all of them see; the run begins when the last has come.

    Args:
        config: What to run, from a preset.
        nproc: Processes on this machine; 1 has no process group, more run through torchrun (gloo on CPUs, NCCL on GPUs).
        nnodes: Machines.
        rdzv_endpoint: HOST:PORT of one of them, where they meet; for one machine a free port is found.
        max_restarts: So many times the processes are started again from the last checkpoint when one of them has died.
        timeout_s: Seconds after which a process that does not answer the others ends the run, which says which it was.

    Raises:
        GddlabError: Teacher, data, mask or batch do not fit each other; the directory holds another configuration, or is running.
    """
    if type(config) is not TrainConfig:
        kind = type(config)
        raise GddlabError(
            f"config is a {kind.__module__}.{kind.__qualname__}, which the processes of a run do not know: give a TrainConfig, such as gddlab.presets.digits(run_dir=...)"
        )
    launch = Launch(nproc, nnodes, rdzv_endpoint, max_restarts, timeout_s)
    run_dir = config.run_dir.resolve()
    config = config.model_copy(update={"run_dir": run_dir})
    check(config, world_size=launch.world_size)
    run_dir.mkdir(parents=True, exist_ok=True)
    fd = take(run_dir, launch.job)
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
                [sys.executable, "-m", "gddlab.launch.worker", str(run_dir), launch.to_json()],
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
