"""`gddlab.train`: starts a run in fresh processes, which inherit no CUDA, threads or locks of the caller."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from gddlab.distill.status import write_status
from gddlab.errors import GddlabError
from gddlab.launch.handle import RunHandle
from gddlab.launch.worker import Launch, launch_environment
from gddlab.lock import sign, take
from gddlab.workers import start

if TYPE_CHECKING:
    from gddlab.distill.config import TrainConfig

SIGNALS = "SIGTERM,SIGINT,SIGUSR1"
"""Signals that torchrun passes on to the ranks, which then write a checkpoint and end; clusters send SIGUSR1."""
HEAD = "$head:29500"
"""Default rendezvous of a SLURM job: its first machine."""
GRACE = 120
"""How long before the time limit SLURM sends SIGUSR1, seconds."""


def torchrun_command(run_dir: Path, launch: Launch, *, job: str | None = None) -> str:
    """The command that starts one machine's ranks, in `launch_environment`; `run_dir` must hold the configuration.

    Args:
        run_dir: The run.
        launch: Processes and machines.
        job: Name of the rendezvous, a shell word; that of the run if None.
    """
    words = ["torchrun", f"--nnodes={launch.nnodes}", f"--nproc-per-node={launch.nproc}"]
    if launch.nnodes == 1:
        words.append("--standalone")
    else:
        words += ["--rdzv-backend=c10d", f'--rdzv-endpoint="{launch.rdzv_endpoint}"']
        words += [f"--rdzv-id={job or shlex.quote(run_dir.name)}"]
    words += [f"--max-restarts={launch.max_restarts}", f"--signals-to-handle={SIGNALS}"]
    return " ".join([*words, "-m", "gddlab.launch.rank", shlex.quote(str(run_dir))])


def slurm_script(config: TrainConfig, launch: Launch) -> str:
    """A script for `sbatch`: one torchrun per machine, a checkpoint before the time limit, requeued until done."""
    run, name = shlex.quote(str(config.run_dir)), re.sub(r"[^\w.-]", "-", config.run_dir.name)
    line = torchrun_command(config.run_dir, launch, job='"$SLURM_JOB_ID"')
    gpus = [] if config.device == "cpu" else [f"#SBATCH --gpus-per-node={launch.nproc}"]
    return "\n".join(
        [
            "#!/bin/bash",
            f"#SBATCH --job-name={name}",
            f"#SBATCH --nodes={launch.nnodes}",
            "#SBATCH --ntasks-per-node=1",
            *gpus,
            f"#SBATCH --cpus-per-task={max(2, 8 * launch.nproc)}",
            f"#SBATCH --signal=USR1@{GRACE}",
            "#SBATCH --requeue",
            "#SBATCH --open-mode=append",
            f"#SBATCH --output={name}-%j.txt",
            "# add what your cluster wants: --time, --partition, --account, and how Python is found",
            "",
            *(f"export {k}={v}" for k, v in launch_environment(launch).items()),
            'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            f"srun --kill-on-bad-exit=1 {line}",
            f'if [ "$(gddlab runs --state {run})" = stopped ]; then scontrol requeue "$SLURM_JOB_ID"; fi',
            "",
        ]
    )


def prepared(config: TrainConfig, launch: Launch, kind: str) -> str:
    """Writes a run's configuration into its directory and returns what starts it elsewhere.

    Args:
        config: The run.
        launch: Processes and machines.
        kind: "torchrun" for the command of each machine; "slurm" for a batch script.

    Raises:
        GddlabError: What `gddlab.train` would refuse.
    """
    from gddlab.distill.build import check

    config = config.model_copy(update={"run_dir": config.run_dir.resolve()})
    check(config, world_size=launch.world_size)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    config.write()
    if kind == "slurm":
        return slurm_script(config, launch)
    words = [f"{k}={v}" for k, v in launch_environment(launch).items()]
    return " ".join([*words, torchrun_command(config.run_dir, launch)])


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
    directory continues a run that was stopped, killed or failed, and returns the handle of one that is done.

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
        GddlabError: Teacher, data, mask or batch do not fit each other; the directory holds another configuration, or
            is in use.
    """
    from gddlab.distill.build import check
    from gddlab.distill.config import TrainConfig

    if type(config) is not TrainConfig:
        kind = type(config)
        raise GddlabError(
            f"config is a {kind.__module__}.{kind.__qualname__}, which the processes of a run do not know: give a "
            "TrainConfig, such as gddlab.presets.digits(run_dir=...)"
        )
    launch = Launch(nproc, nnodes, rdzv_endpoint, max_restarts, timeout_s)
    config = config.model_copy(update={"run_dir": config.run_dir.resolve()})
    check(config, world_size=launch.world_size)
    run_dir = config.run_dir
    run_dir.mkdir(parents=True, exist_ok=True)
    fd = take(run_dir, launch.job)
    try:
        config.write()
        handle = RunHandle(run_dir)
        if handle.written_status.get("state") == "done":
            return handle
        write_status(run_dir, "starting")
        (run_dir / "log").mkdir(exist_ok=True)
        # a request to stop that comes while the process starts waits until a checkpoint can be written
        with (run_dir / "log" / "launch.txt").open("ab") as log, blocked(signal.SIGTERM, signal.SIGUSR1):
            handle.process = start(
                "gddlab.launch.worker",
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
