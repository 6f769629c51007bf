"""One rank of a run: `python -m gddlab.launch.rank RUN_DIR`, started by torchrun, or by the owner of the run."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
import time
import traceback
import warnings
from pathlib import Path

from gddlab.distill.status import mark, read_status
from gddlab.errors import GddlabError
from gddlab.launch.plan import TIMEOUT
from gddlab.lock import OWNED, Job, sign, take
from gddlab.memory import keep_memory


class RankTimeout(GddlabError):
    """A rank kept the others waiting for too long."""


def run_rank(run_dir: str | Path) -> int:
    """Trains as the rank that the environment names; output goes to log/rankN.txt. Returns the exit code."""
    keep_memory()
    folder = Path(run_dir)
    rank, restarts = int(os.environ.get("RANK", 0)), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    (folder / "log").mkdir(exist_ok=True)
    with (folder / "log" / f"rank{rank}.txt").open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)  # of a dependency, in each log
    if "WORLD_SIZE" in os.environ:
        end_with(int(os.environ.get(OWNED, os.getppid())))
        # torchrun sends SIGTERM when another rank has died
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        # Ctrl-C at the terminal of torchrun, which passes it on
        signal.signal(signal.SIGINT, lambda *_: signal.raise_signal(signal.SIGTERM))
    from gddlab.distill.config import TrainConfig
    from gddlab.distill.distributed import World
    from gddlab.distill.trainer import Trainer
    from gddlab.evaluation import scorer

    timeout = float(os.environ.get(TIMEOUT, 600))
    try:
        _lock(folder)
        if restarts and read_status(folder).get("cause") == "refused":
            return 1  # it would be refused again
        if rank == 0:
            mark(folder, "starting")
        config = TrainConfig.load(folder)
        world = World.start(config.device, timeout_s=timeout)
        try:
            Trainer(config, world).train(scorer(config, world) if config.metric_kimg else None)
        except Exception as e:
            if (refused := _of_the_system(e, folder)) is not None:
                raise refused from e
            hanging = world.silent(e)
            if hanging is None:
                raise
            raise RankTimeout(f"{hanging} for {timeout:g} s: see its log/rank*.txt") from e
        world.close()
    except Exception as e:
        sys.stderr.write(f"failed: {e}\n")  # first, since on a full disk the rest may not fit
        traceback.print_exc()
        report_failure(folder, e, rank=rank)
        return 1
    finally:
        for number in (signal.SIGTERM, signal.SIGUSR1):  # too late to stop; while Python shuts down they would kill it
            signal.signal(number, signal.SIG_IGN)
    return 0


def report_failure(run_dir: Path, error: BaseException, *, rank: int | None) -> None:
    """Writes the status "failed" with the traceback; keeps the first failure, which those of other ranks follow from.

    Args:
        run_dir: The run.
        error: What happened.
        rank: Where; None if unknown.
    """
    if not run_dir.is_dir() or read_status(run_dir).get("state") == "failed":
        return
    text = "".join(traceback.format_exception(error)) if error.__traceback__ else str(error)
    about = {"rank": rank, "error": text, "message": f"{type(error).__name__}: {error}"}
    cause = "silent" if isinstance(error, RankTimeout) else "refused" if isinstance(error, GddlabError) else "error"
    with contextlib.suppress(OSError):  # a full disk, or a folder that is gone: log and exit code remain
        mark(run_dir, "failed", **about, cause=cause)


def _of_the_system(error: Exception, folder: Path) -> GddlabError | None:
    """One line for a full disk, or a folder that is gone or cannot be written."""
    if isinstance(error, OSError) and error.strerror and not isinstance(error, ConnectionError):
        where, why = error.filename or folder, error.strerror
    elif found := re.search(r"([\w ]+) \(os error \d+\)", str(error)):  # safetensors raises its own class
        where, why = folder, found[1].strip()
    else:
        return None
    return GddlabError(
        f"{where}: {why}; what was written before is intact, and the same call continues once that is mended"
    )


def _lock(folder: Path) -> None:
    """Locks the run, once per machine, where whoever started this process did not (torchrun by hand)."""
    if OWNED in os.environ or int(os.environ.get("LOCAL_RANK", 0)):
        return
    nodes = int(os.environ.get("WORLD_SIZE", 1)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    sign(take(folder, Job(os.environ.get("TORCHELASTIC_RUN_ID", "-"), nodes)), os.getpid())


def end_with(parent: int) -> None:
    """Ends this process when its parent ends (at once on Linux, else within 1 s), so that no rank outlives its run.

    Args:
        parent: The process that started this one; if it has ended already, this one ends here.
    """
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    if os.getppid() != parent:
        os._exit(1)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    code = run_rank(sys.argv[1])
    if code:  # threads may still wait for ranks that are gone
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
