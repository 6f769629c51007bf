"""Starting, stopping, checkpoints and two processes, on the digits preset; prints JSON.

python tests/benchmarks/launch.py [RUNS]

torch: a process that imports torch and nothing else. first_step: from `gddlab.train` to the first line of
metrics.jsonl, one line per step. stop: how long `stop()` takes in the middle of a run. Both with one and two processes.
checkpoints: stretches of 100 steps of one training, in turn with and without a checkpoint written beside them; the
ratio of neighbours. scaling: seconds per thousand images with one and two processes, one thread each. Seconds; all
runs, and medians.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import gddlab
from gddlab.distill.distributed import World
from gddlab.distill.trainer import Trainer


def config(folder: str, name: str, **fields: Any) -> gddlab.TrainConfig:
    settings: dict[str, Any] = {"snapshot_kimg": 1000, "checkpoint_kimg": 1000, "total_kimg": 1000} | fields
    return gddlab.presets.digits(run_dir=Path(folder) / name, **settings)


def timed(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def started_and_stopped(folder: str, name: str, nproc: int) -> tuple[float, float]:
    began = time.perf_counter()
    run = gddlab.train(config(folder, name, tick_kimg=0.016), nproc=nproc)
    while run.metrics.empty:
        time.sleep(0.02)
    first = time.perf_counter() - began
    time.sleep(3)
    return first, timed(run.stop)


def stretches(folder: str, pairs: int) -> list[tuple[float, float]]:
    """Seconds of 100 steps, with a checkpoint and without."""
    trainer = Trainer(config(folder, "stretches"), World(0, 1, torch.device("cpu")))

    def stretch(checkpoint: bool) -> float:
        began = time.perf_counter()
        if checkpoint:
            trainer.checkpoint()
        for _ in range(100):
            trainer.iterate()
        return time.perf_counter() - began

    trainer.cache_real()
    stretch(True)
    out = []
    for i in range(pairs):
        first, second = stretch(i % 2 == 0), stretch(i % 2 == 1)
        out.append((first, second) if i % 2 == 0 else (second, first))
    return out


def sec_per_kimg(folder: str, name: str, nproc: int) -> float:
    run = gddlab.train(config(folder, name, total_kimg=1.6, tick_kimg=0.8), nproc=nproc).wait()
    last = run.metrics.iloc[-1]
    first = run.metrics.iloc[0]
    return float((last["seconds"] - first["seconds"]) / (last["kimg"] - first["kimg"]))


def median(values: list[float]) -> float:
    return round(statistics.median(values), 3)


def main(runs: int) -> dict[str, Any]:
    load = os.getloadavg()[0]
    out: dict[str, Any] = {"runs": runs, "load_before": load, "cores": os.cpu_count(), "torch": torch.__version__}
    torch_alone = [
        timed(lambda: subprocess.run([sys.executable, "-c", "import torch"], check=True)) for _ in range(runs)
    ]
    out["torch"] = {"median": median(torch_alone), "all": [round(x, 3) for x in torch_alone]}
    with tempfile.TemporaryDirectory() as folder:
        for nproc in (1, 2):
            pairs = [started_and_stopped(folder, f"start-{nproc}-{i}", nproc) for i in range(runs)]
            for what, values in zip(("first_step", "stop"), zip(*pairs, strict=True), strict=True):
                out[f"{what}, {nproc} process(es)"] = {
                    "median": median(list(values)),
                    "all": [round(x, 3) for x in values],
                }
        found = stretches(folder, runs)
        ratios = [with_one / without for with_one, without in found]
        out["checkpoints"] = {
            "ratio": median(ratios),
            "ratios": [round(x, 4) for x in ratios],
            "seconds": [round(x, 2) for pair in found for x in pair],
        }
        os.environ["OMP_NUM_THREADS"] = "1"
        one = [sec_per_kimg(folder, f"one-{i}", 1) for i in range(runs)]
        two = [sec_per_kimg(folder, f"two-{i}", 2) for i in range(runs)]
        out["scaling"] = {
            "one": median(one),
            "two": median(two),
            "speedup": median([statistics.median(one) / x for x in two]),
            "all": [round(x, 3) for x in one + two],
        }
    return out


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(int(sys.argv[1]) if len(sys.argv) > 1 else 5), indent=2) + "\n")
