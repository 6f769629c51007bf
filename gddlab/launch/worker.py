"""The process that owns a run on a machine: trains alone, or starts one process a rank through torchrun's API.

`python -m gddlab.launch.worker RUN_DIR LAUNCH`, the launch as JSON
"""

from __future__ import annotations

import os
import signal
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gddlab.distill.recording import write_status
from gddlab.files import read_json, write_json
from gddlab.launch.handle import PROGRESS
from gddlab.launch.plan import FRESH_STORE, SIGNALS, TIMEOUT, Launch
from gddlab.launch.rank import report_failure, run_rank

__all__: list[str] = []

STOP_S = 60
"""Seconds in which ranks that were asked to leave must have made their checkpoint."""


def main(run_dir: Path, launch: Launch) -> int:
    os.environ |= {TIMEOUT: str(launch.timeout_s), FRESH_STORE: "1"}
    if launch.alone:
        return run_rank(run_dir)

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=launch.nnodes,
        max_nodes=launch.nnodes,
        nproc_per_node=launch.nproc,
        run_id=uuid.uuid4().hex if launch.nnodes == 1 else run_dir.name,
        rdzv_backend="c10d",
        rdzv_endpoint=launch.rdzv_endpoint or "localhost:0",
        max_restarts=launch.max_restarts,
        monitor_interval=0.1,
        signals_to_handle=SIGNALS,
        shutdown_timeout=STOP_S,
    )

    def asked(number: int, frame: object) -> None:
        raise SignalException("asked to stop", signal.Signals(number))

    try:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, asked)  # until torchrun sets its own
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGUSR1})
        elastic_launch(config, sys.executable)("-m", "gddlab.launch.rank", str(run_dir))
    except SignalException as e:
        if e.sigval == signal.SIGINT:
            return 1
        settle(run_dir)  # the ranks made a checkpoint and left, or had not begun
    except ChildFailedError as e:
        report_failure(run_dir, e, rank=None)  # the ranks wrote their own error; this is torchrun's summary
        told = read_json(run_dir / "status.json")
        killed = _killed(e.failures)
        if killed is not None and told.get("cause") == "error":  # what the others saw of it
            rank, why = killed
            write_json(run_dir / "status.json", told | {"rank": rank, "error": why, "message": why})
        return 1
    except Exception as e:
        report_failure(run_dir, e, rank=None)
        return 1
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


def settle(run_dir: Path) -> None:
    """A run whose ranks were ended before they could say so is stopped; its last checkpoint stands."""
    status = read_json(run_dir / "status.json")
    if status["state"] in ("starting", "running"):
        write_status(run_dir, "stopped", **{k: status[k] for k in PROGRESS if k in status})


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Launch.of_json(sys.argv[2])))
