"""`gddlab.train`: starts a run in fresh processes, which inherit no CUDA, threads or locks of the caller."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from gddlab.distill.status import mark
from gddlab.errors import GddlabError, Unwritable
from gddlab.files import writing
from gddlab.launch.handle import RunHandle
from gddlab.launch.plan import Launch
from gddlab.lock import sign, take
from gddlab.workers import start

if TYPE_CHECKING:
    from gddlab.distill.config import TrainConfig


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

    The run does not end with the calling kernel; `gddlab.attach(run_dir)` finds it again. The same call on the same
    directory continues a run that was stopped, killed or failed, and returns the handle of one that runs or is done.

    On several machines, each makes this call with the same configuration, on a directory that all of them see; training
    starts when the last one has joined.

    Args:
        config: What to run, from a preset.
        nproc: Processes on this machine; several run through torchrun (gloo on CPUs, NCCL on GPUs).
        nnodes: Machines.
        rdzv_endpoint: HOST:PORT of one of the machines, where they meet; on one machine a free port is found.
        max_restarts: How often to restart the processes from the last checkpoint when one of them has died.
        timeout_s: Seconds after which a process that does not answer the others ends the run, which names it.

    Raises:
        GddlabError: Teacher, data, mask or batch do not fit each other; there is no such device; the directory holds
            another configuration, or on several machines another job works in it.
    """
    from gddlab.distill.build import check
    from gddlab.distill.config import TrainConfig
    from gddlab.evaluation.extractors import find_extractor
    from gddlab.runtime import chosen_device

    if type(config) is not TrainConfig:
        kind = type(config)
        raise GddlabError(
            f"config is a {kind.__module__}.{kind.__qualname__}, which the processes of a run do not know: give a "
            "TrainConfig, such as gddlab.presets.digits(run_dir=...)"
        )
    chosen_device(config.device)
    judge = None if config.metric_kimg is None else find_extractor(config.metric_extractor)
    if judge is not None:
        judge.check()
    launch = Launch(nproc, nnodes, rdzv_endpoint, max_restarts, timeout_s)
    config = config.model_copy(update={"run_dir": config.run_dir.resolve()})
    _, data = check(config, world_size=launch.world_size)
    if judge is not None:
        judge.fitted(data.channels, data.resolution)
    run_dir = config.run_dir
    config.make_folder()
    try:
        with writing(run_dir):
            fd = take(run_dir, launch.job)
    except GddlabError as e:
        if isinstance(e, Unwritable) or launch.nnodes > 1 or not (run_dir / "config.json").exists():
            raise
        config.write()  # refuses another configuration
        return RunHandle(run_dir)
    try:
        config.write()
        handle = RunHandle(run_dir)
        if handle.written_status.get("state") == "done":
            return handle
        mark(run_dir, "starting")
        (run_dir / "log").mkdir(exist_ok=True)
        # a request to stop that comes while the process starts waits until a checkpoint can be written
        with (run_dir / "log" / "launch.txt").open("ab") as log, blocked(signal.SIGTERM, signal.SIGUSR1):
            handle.process = start(
                "gddlab.launch.agent",
                str(run_dir),
                launch.to_json(),
                log=log,
                nproc=nproc,
                stdin=subprocess.DEVNULL,
                stdout=log,
                start_new_session=True,  # it outlives the kernel
                pass_fds=(fd,),
            )
        sign(fd, handle.process.pid)
        return handle
    finally:
        os.close(fd)


@contextmanager
def blocked(*signals: signal.Signals) -> Iterator[None]:
    """Inside, these signals wait; a process started here inherits that."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
