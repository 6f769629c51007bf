"""The process that owns a run on a machine: trains alone, or starts one process a rank through torchrun's API.

`python -m gddlab.launch.worker RUN_DIR LAUNCH`, the launch as JSON
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from gddlab.distill.status import write_status
from gddlab.files import read_json
from gddlab.launch.handle import PROGRESS
from gddlab.launch.rank import report_failure, run_rank
from gddlab.launch.train import OWNED, Launch, launch_environment

__all__: list[str] = []

ASKED = {signal.SIGTERM, signal.SIGUSR1}
"""Signals that ask for a checkpoint and the end; they are held back when this process begins."""
LEAVE_S = 5.0
"""Seconds in which a run without ranks must begin again or end by itself."""


def main(run_dir: Path, launch: Launch) -> int:
    os.environ |= launch_environment(launch) | {OWNED: str(os.getpid())}
    if launch.alone:
        return run_rank(run_dir)

    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    scratch = tempfile.TemporaryDirectory(prefix="gddlab-")  # torchrun wants a folder; the ranks log elsewhere
    config = LaunchConfig(
        logs_specs=DefaultLogsSpecs(log_dir=scratch.name),
        min_nodes=launch.nnodes,
        max_nodes=launch.nnodes,
        nproc_per_node=launch.nproc,
        run_id=uuid.uuid4().hex if launch.nnodes == 1 else run_dir.name,
        rdzv_backend="c10d",
        rdzv_endpoint=launch.rdzv_endpoint or "localhost:0",
        max_restarts=launch.max_restarts,
        monitor_interval=0.1,
    )
    signal.pthread_sigmask(signal.SIG_BLOCK, ASKED)
    threading.Thread(target=hand_on, args=(run_dir,), daemon=True).start()
    try:
        elastic_launch(config, sys.executable)("-m", "gddlab.launch.rank", str(run_dir))
    except ChildFailedError as e:
        report_failure(run_dir, e, rank=None)  # the ranks wrote their own error; this is torchrun's summary
        told = read_json(run_dir / "status.json")
        killed = _killed(e.failures)
        if killed is not None and told.get("cause") == "error":  # what the others saw of it
            rank, why = killed
            write_status(run_dir, **(told | {"rank": rank, "error": why, "message": why}))
        return 1
    except Exception as e:
        report_failure(run_dir, e, rank=None)
        return 1
    finally:
        scratch.cleanup()
    return 0


def _killed(failures: Mapping[int, Any]) -> tuple[int, str] | None:
    """The rank that a signal ended, which cannot say so itself; the others only saw a connection close."""
    for rank, failure in failures.items():
        number = -failure.exitcode
        if number > 0 and number != signal.SIGTERM:  # SIGTERM is what the others get from torchrun
            name = signal.Signals(number).name
            hint = ", as the system does when memory is short" if number == signal.SIGKILL else ""
            return rank, f"rank {rank} was ended by {name}{hint}: the same call continues from the last checkpoint"
    return None


def hand_on(run_dir: Path) -> None:
    """Hands a request to stop on to the ranks, also to those that are just being started again; without ranks, the run ends here.

    The signals are blocked in all threads, and SIGUSR1 so in the ranks until they can make a checkpoint; torchrun, which would end the ranks of this
    machine and leave those of others waiting, does not see them.
    """
    signal.sigwait(ASKED)
    told: set[psutil.Process] = set()
    seen = time.monotonic()
    while time.monotonic() - seen < LEAVE_S:
        ranks = set(psutil.Process().children())
        for rank in ranks - told:
            with suppress(psutil.NoSuchProcess):
                rank.send_signal(signal.SIGUSR1)  # SIGTERM is how torchrun ends ranks whose neighbour has died
        told |= ranks
        if ranks:  # else it is between two starts, waits for other machines, or has just ended
            seen = time.monotonic()
        time.sleep(0.1)
    settle(run_dir)
    os._exit(0)


def settle(run_dir: Path) -> None:
    """A run whose ranks were ended before they could say so is stopped; its last checkpoint stands."""
    status = read_json(run_dir / "status.json")
    if status["state"] in ("starting", "running"):
        write_status(run_dir, "stopped", **{k: status[k] for k in PROGRESS if k in status})


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Launch.of_json(sys.argv[2])))
