"""One rank of a run: `python -m gddlab.launch.rank RUN_DIR`, started by torchrun or by the owner of the run."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from pathlib import Path

from gddlab.distill.recording import write_status
from gddlab.files import read_json

__all__ = ["report_failure", "run_rank"]


def report_failure(run_dir: Path, error: BaseException, *, rank: int | None) -> None:
    """Writes status "failed" with the traceback; the first failure stands."""
    status = read_json(run_dir / "status.json") if (run_dir / "status.json").exists() else {}
    if status.get("state") == "failed":
        return
    text = "".join(traceback.format_exception(error))
    write_status(run_dir, "failed", rank=rank, error=text, message=f"{type(error).__name__}: {error}")


def run_rank(run_dir: str | Path) -> int:
    """Trains as the rank that the environment names; output goes to log/rankN.txt. Returns the exit code."""
    folder = Path(run_dir)
    rank = int(os.environ.get("RANK", 0))
    (folder / "log").mkdir(exist_ok=True)
    with (folder / "log" / f"rank{rank}.txt").open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if "WORLD_SIZE" in os.environ:
        _die_with_parent()
    from gddlab.distill.config import TrainConfig
    from gddlab.distill.distributed import World
    from gddlab.distill.trainer import Trainer
    from gddlab.evaluation import scorer

    try:
        config = TrainConfig.load(folder)
        world = World.start(config.device)
        try:
            Trainer(config, world).train(scorer(config, world) if config.metric_kimg else None)
        finally:
            world.close()
    except Exception as e:
        traceback.print_exc()
        report_failure(folder, e, rank=rank)
        return 1
    return 0


def _die_with_parent() -> None:
    """Linux: this rank is killed when the owner of the run is, so that no rank outlives its run."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(run_rank(sys.argv[1]))
