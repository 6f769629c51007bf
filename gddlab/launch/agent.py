"""The process that owns a run on a machine: trains alone, or starts one process per rank through torchrun's API.

`python -m gddlab.launch.agent RUN_DIR LAUNCH`, the launch as JSON.
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

from gddlab.distill.status import ACTIVE, mark, read_status, write_status
from gddlab.launch.plan import Launch, launch_environment
from gddlab.launch.rank import report_failure, run_rank
from gddlab.lock import OWNED

ASKED = {signal.SIGTERM, signal.SIGUSR1}
"""Signals that ask for a checkpoint and the end; they are blocked when this process begins."""
LEAVE_S = 5.0
"""Seconds in which a run without ranks must start new ones or end by itself."""


def main(run_dir: Path, launch: Launch) -> int:
    os.environ |= launch_environment(launch) | {OWNED: str(os.getpid())}
    if launch.alone:
        return run_rank(run_dir)

    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    signal.pthread_sigmask(signal.SIG_BLOCK, ASKED)
    threading.Thread(target=pass_on_stop, args=(run_dir,), daemon=True).start()
    with tempfile.TemporaryDirectory(prefix="gddlab-") as scratch:  # torchrun wants a folder; the ranks log elsewhere
        config = LaunchConfig(
            logs_specs=DefaultLogsSpecs(log_dir=scratch),
            min_nodes=launch.nnodes,
            max_nodes=launch.nnodes,
            nproc_per_node=launch.nproc,
            run_id=uuid.uuid4().hex if launch.nnodes == 1 else run_dir.name,
            rdzv_backend="c10d",
            rdzv_endpoint=launch.rdzv_endpoint or "localhost:0",
            local_addr="localhost" if launch.nnodes == 1 else None,  # the machine's own name may not resolve
            max_restarts=launch.max_restarts,
            monitor_interval=0.1,
        )
        try:
            elastic_launch(config, sys.executable)("-m", "gddlab.launch.rank", str(run_dir))
        except ChildFailedError as e:
            report_failure(run_dir, e, rank=None)  # the ranks wrote their own error; this is torchrun's summary
            status, killed = read_status(run_dir), _killed(e.failures)
            if killed is not None and status.get("cause") == "error":  # the others only saw its connection close
                rank, why = killed
                rest = {k: v for k, v in status.items() if k not in ("state", "heartbeat")}
                write_status(run_dir, "failed", **rest | {"rank": rank, "error": why, "message": why})
            return 1
        except Exception as e:
            report_failure(run_dir, e, rank=None)
            return 1
    return 0


def _killed(failures: Mapping[int, Any]) -> tuple[int, str] | None:
    """The rank that a signal ended, which could not report that itself."""
    for rank, failure in failures.items():
        number = -failure.exitcode
        if number > 0 and number != signal.SIGTERM:  # torchrun ends the others by SIGTERM
            name = signal.Signals(number).name
            hint = ", as the system does when memory is short" if number == signal.SIGKILL else ""
            return rank, f"rank {rank} was ended by {name}{hint}: the same call continues from the last checkpoint"
    return None


def pass_on_stop(run_dir: Path) -> None:
    """Passes a request to stop on to the ranks, also to those just being restarted; without ranks, ends the run.

    The signals are blocked in all threads, and SIGUSR1 in the ranks until they can write a checkpoint. torchrun does
    not see them: it would end the ranks of this machine and leave those of others waiting.
    """
    signal.sigwait(ASKED)
    told: set[psutil.Process] = set()
    seen = time.monotonic()
    while time.monotonic() - seen < LEAVE_S:
        ranks = set(psutil.Process().children())
        for rank in ranks - told:
            with suppress(psutil.NoSuchProcess):
                rank.send_signal(signal.SIGUSR1)  # not SIGTERM, by which torchrun ends ranks whose neighbour has died
        told |= ranks
        if ranks:  # else it is between two starts, waits for other machines, or has just ended
            seen = time.monotonic()
        time.sleep(0.1)
    if read_status(run_dir)["state"] in ACTIVE:
        mark(run_dir, "stopped")
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Launch.of_json(sys.argv[2])))
