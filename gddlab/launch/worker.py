"""The process that owns a run: trains alone, or starts one process a rank through torchrun's API.

`python -m gddlab.launch.worker RUN_DIR NPROC`
"""

from __future__ import annotations

import signal
import sys
import uuid
from pathlib import Path

from gddlab.distill.recording import write_status
from gddlab.files import read_json
from gddlab.launch.handle import PROGRESS
from gddlab.launch.rank import run_rank

__all__: list[str] = []


def main(run_dir: str, nproc: int) -> int:
    if nproc == 1:
        return run_rank(run_dir)

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        signals_to_handle="SIGTERM,SIGINT",
    )

    def asked(number: int, frame: object) -> None:
        raise SignalException("asked to stop", signal.Signals(number))

    try:
        signal.signal(signal.SIGTERM, asked)  # until torchrun sets its own
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGUSR1})
        elastic_launch(config, sys.executable)("-m", "gddlab.launch.rank", run_dir)
    except SignalException as e:
        if e.sigval != signal.SIGTERM:
            return 1
        settle(Path(run_dir))  # the ranks made a checkpoint and left, or had not begun
    except Exception as e:  # the ranks wrote their own error; this is torchrun's summary
        from gddlab.launch.rank import report_failure

        report_failure(Path(run_dir), e, rank=None)
        return 1
    return 0


def settle(run_dir: Path) -> None:
    """A run whose ranks were ended before they could say so is stopped; its last checkpoint stands."""
    status = read_json(run_dir / "status.json")
    if status["state"] in ("starting", "running"):
        write_status(run_dir, "stopped", **{k: status[k] for k in PROGRESS if k in status})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
