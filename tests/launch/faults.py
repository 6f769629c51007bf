"""What the fault tests share: the processes of a run, and waiting for its moments."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gddlab.distill.config import TrainConfig
from gddlab.distill.distributed import World
from gddlab.distill.trainer import Trainer
from gddlab.files import read_jsonl
from gddlab.launch import RunHandle

__all__ = ["ALONE", "ended_with", "lines", "processes", "ranks", "until"]

ALONE = World(0, 1, torch.device("cpu"))
TIMING = ("seconds", "sec_per_kimg", "peak_mem_mib")


def processes(run_dir: Path) -> dict[int, list[str]]:
    """Every process that works on a run, by number, with its command line."""
    out = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_text().split("\0")
        except OSError:  # it has ended
            continue
        if str(run_dir) in words and any(w.startswith("gddlab.launch.") for w in words):
            out[int(path.parent.name)] = words
    return out


def ranks(run_dir: Path) -> dict[int, int]:
    """Process of each rank that torchrun started, by rank."""
    out = {}
    for pid, words in processes(run_dir).items():
        if "gddlab.launch.rank" in words:
            try:
                environment = Path(f"/proc/{pid}/environ").read_text().split("\0")
            except OSError:
                continue
            out |= {int(e.removeprefix("RANK=")): pid for e in environment if e.startswith("RANK=")}
    return out


def until(what: Callable[[], Any], seconds: float = 120) -> Any:
    """Waits for something to be true, and returns it."""
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)
    return found


def reached(run: RunHandle, nimg: int) -> Callable[[], bool]:
    """Whether a run has seen this many images since its start; its end, or a failure, counts as well."""

    def seen() -> bool:
        status = run.written_status  # one that is starting still says how far it was before
        began = status.get("state") == "running" and status.get("nimg", 0) >= nimg
        return began or run.status in ("done", "failed", "stopped")

    return seen


def lines(run_dir: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what depends on the clock."""
    return [{k: v for k, v in m.items() if k not in TIMING} for m in read_jsonl(run_dir / "metrics.jsonl")]


def ended_with(config: TrainConfig) -> dict[str, Tensor]:
    """Every parameter and buffer at the end of a run, from its last checkpoint."""
    trainer = Trainer(config, ALONE)
    assert trainer.restore() is not None
    assert trainer.iteration == trainer.total
    nets = {"g": trainer.step.g, "ema": trainer.ema, "d": trainer.step.d}
    return {f"{name}/{k}": v for name, net in nets.items() for k, v in net.state_dict().items()}


def kill(pid: int, number: int = signal.SIGKILL) -> bool:
    """Sends a signal; False where the process has ended."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True
