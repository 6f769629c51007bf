"""How a run is started: how many processes and machines, torchrun's command, and a script for SLURM."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gddlab.distill.status import OUT_OF_TIME
from gddlab.errors import GddlabError, integer, seconds, shown
from gddlab.lock import Job

if TYPE_CHECKING:
    from gddlab.distill.config import TrainConfig

TIMEOUT = "GDDLAB_TIMEOUT"
"""Environment variable: timeout of a collective, seconds."""
FRESH_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""Set to 1, every restart of the ranks gets a store of its own. In a shared one, restarted ranks find the addresses of
those that died (pytorch#135712)."""
SHUTDOWN = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
"""Seconds that torchrun waits for ranks that write a checkpoint before it kills them; 30 if not set."""
ENDPOINT = re.compile(r"(\[[0-9a-fA-F:]+\]|[^\s:]+):(\d{1,5})")
SIGNALS = "SIGTERM,SIGINT,SIGUSR1"
"""Signals that torchrun passes on to the ranks, which then write a checkpoint and end; clusters send SIGUSR1."""
HEAD = "$head:29500"
"""Default rendezvous of a SLURM job: its first machine."""
GRACE = 120
"""How long before the time limit SLURM sends SIGUSR1, seconds."""


@dataclass(frozen=True)
class Launch:
    """Arguments of `gddlab.train` beside the configuration.

    Raises:
        GddlabError: A number out of range, or several machines without a rendezvous.
    """

    nproc: int = 1
    nnodes: int = 1
    rdzv_endpoint: str | None = None
    max_restarts: int = 0
    timeout_s: float = 600

    def __post_init__(self) -> None:
        for name, least in (("nproc", 1), ("nnodes", 1), ("max_restarts", 0)):
            if integer(name, getattr(self, name)) < least:
                raise GddlabError(f"{name}={getattr(self, name)}: give at least {least}")
        seconds("timeout_s", self.timeout_s)
        if self.nnodes > 1 and self.rdzv_endpoint is None:
            raise GddlabError(
                f"nnodes={self.nnodes} without rdzv_endpoint: give HOST:PORT of one of the machines, the same on all"
            )
        if self.rdzv_endpoint is not None:
            found = ENDPOINT.fullmatch(str(self.rdzv_endpoint))
            if not found or not 0 < int(found[2]) < 65536:
                raise GddlabError(f"rdzv_endpoint={shown(self.rdzv_endpoint)}: give HOST:PORT, such as node0:29500")

    @property
    def world_size(self) -> int:
        return self.nproc * self.nnodes

    @property
    def job(self) -> Job:
        return Job(self.rdzv_endpoint or "-", self.nnodes)

    @property
    def alone(self) -> bool:
        """Whether one process trains, without torchrun and without a process group."""
        return self.world_size == 1 and not self.max_restarts

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def of_json(cls, text: str) -> Launch:
        return cls(**json.loads(text))


def launch_environment(launch: Launch) -> dict[str, str]:
    """Environment variables for torchrun and the ranks."""
    return {FRESH_STORE: "1", SHUTDOWN: f"{GRACE}", TIMEOUT: f"{launch.timeout_s:g}"}


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
            f'if grep -q \'"cause": "{OUT_OF_TIME}"\' {run}/status.json; then scontrol requeue "$SLURM_JOB_ID"; fi',
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
    config.write()
    if kind == "slurm":
        return slurm_script(config, launch)
    words = [f"{k}={v}" for k, v in launch_environment(launch).items()]
    return " ".join([*words, torchrun_command(config.run_dir, launch)])
