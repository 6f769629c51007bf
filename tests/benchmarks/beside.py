"""A kernel that probes beside a run on the same cores, and two runs side by side; prints JSON.

python tests/benchmarks/beside.py [PAIRS]

probe: seconds of `probe(teacher, 18, n=16)` alone, and beside a run of the digits preset, in turn with all threads and
with those that `beside_runs` leaves. run: seconds per thousand images of that run alone, and during each of the two.
two: the same for two runs that started together. All values, and medians. GOMP_SPINCOUNT and OMP_WAIT_POLICY in the
environment say how the threads of the runs wait for each other.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gddlab
from gddlab import runtime

STRETCH = 15.0
"""Seconds in which a run's speed is measured."""


def started(folder: str, name: str) -> Any:
    config = gddlab.presets.digits(
        run_dir=Path(folder) / name, total_kimg=10_000, tick_kimg=0.064, snapshot_kimg=1e4, checkpoint_kimg=1e4
    )
    run = gddlab.train(config)
    while run.metrics.empty:
        time.sleep(0.1)
    return run


def speed(run: Any, work: Callable[[], Any]) -> tuple[float, list[float]]:
    """Seconds per thousand images of a run while `work` is done again and again, and the seconds of each."""
    first, began, spent = run.last_metrics["nimg"], time.perf_counter(), []
    while time.perf_counter() - began < STRETCH:
        start = time.perf_counter()
        work()
        spent.append(time.perf_counter() - start)
    images = max(1, run.last_metrics["nimg"] - first)
    return (time.perf_counter() - began) / images * 1000, spent


def measure(pairs: int) -> dict[str, Any]:
    teacher = gddlab.load_teacher("digits")

    def probe() -> None:
        gddlab.probe(teacher, 18, n=16, progress=False)

    def probe_with_all_threads() -> None:
        look_up, runtime._threads_of_runs = runtime._threads_of_runs, lambda second: 0  # type: ignore[assignment]
        try:
            probe()
        finally:
            runtime._threads_of_runs = look_up

    probe()
    out: dict[str, list[float]] = {}

    def add(name: str, *values: float) -> None:
        out.setdefault(name, []).extend(round(v, 2) for v in values)
        print(name, *(f"{v:.2f}" for v in values), file=sys.stderr)

    for _ in range(5):
        start = time.perf_counter()
        probe()
        add("probe, alone", time.perf_counter() - start)
    with tempfile.TemporaryDirectory() as folder:
        run = started(folder, "one")
        add("run, alone", speed(run, lambda: time.sleep(1))[0])
        for _ in range(pairs):
            for name, work in (("all threads", probe_with_all_threads), ("those left", probe)):
                per_kimg, spent = speed(run, work)
                add(f"run, {name}", per_kimg)
                add(f"probe, {name}", statistics.median(spent))
        run.kill()
        first, second = started(folder, "a"), started(folder, "b")
        for run in (first, second):
            add("two", speed(run, lambda: time.sleep(1))[0])
        first.kill()
        second.kill()
    return {name: {"all": values, "median": statistics.median(values)} for name, values in out.items()}


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]) if len(sys.argv) > 1 else 3), indent=2))
