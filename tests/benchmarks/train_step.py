"""The CIFAR-10 GDD-I iteration: reference and fast mode against the plainest correct float32 loop, in pairs; JSON.

python tests/benchmarks/train_step.py [PAIRS] [BATCH]

Random weights of teacher and VGG16 (times do not depend on them). An iteration is the generator's and the
discriminator's step and the average of the parameters; R1 is timed separately, and a cycle is 16 iterations and one R1
step. Before anything is timed, the reference mode's losses, R1 and gradients are compared with the plain loop's.
Memory is measured in one process per mode, which runs one iteration and one R1 step: the system's peak for the process
(VmHWM), networks and their construction included, and the rise of resident memory during each of the two, every 2 ms.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gddlab.distill.presets import FAST
from gddlab.memory import keep_memory
from gddlab.probing.probe import peak_memory
from gddlab.provenance import hardware, versions
from tests.benchmarks.loops import Loop, Ours, Plain, Setting, check, work

INTERVAL = Setting.interval
MODES: dict[str, dict[str, Any]] = {
    "reference": {"precision": "float32", "channels_last": False},
    "reference, channels last": {"precision": "float32", "channels_last": True},
    "fast": FAST,
}


def make(mode: str, n: int) -> Loop:
    setting = Setting(batch=n)
    return Plain(setting) if mode == "plain" else Ours(setting, **MODES[mode])


def iterate(loop: Loop) -> None:
    """An iteration without R1."""
    loop.number = 1
    loop.iterate()


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def memory(mode: str, n: int) -> dict[str, float | None]:
    loop = make(mode, n)
    images = loop.upcoming()[0]
    out: dict[str, float | None] = {}
    for name, run in (("iteration", lambda: iterate(loop)), ("R1 step", lambda: loop.r1(images))):
        with peak_memory(torch.device("cpu")) as rise:
            run()
        out[f"rise in the {name}, MiB"] = rise[0] and round(rise[0])
    status = Path("/proc/self/status").read_text()  # not ru_maxrss, inherited from the process that started this one
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1]
    return {"peak of the process, MiB": round(int(peak) / 1024)} | out


def main(pairs: int, n: int) -> None:
    loops: dict[str, Loop] = {mode: make(mode, n) for mode in ("plain", *MODES)}
    plain, reference = loops["plain"], loops["reference"]
    assert isinstance(plain, Plain) and isinstance(reference, Ours)
    agreement, images = check(plain, reference), reference.upcoming()[0]
    times: dict[str, list[float]] = {f"{m} {s}": [] for m in loops for s in ("iteration", "r1")}
    for i in range(pairs + 1):
        for mode, loop in list(loops.items())[:: 1 if i % 2 else -1]:  # each is first as often as it is last
            took = {
                "iteration": seconds(lambda loop=loop: iterate(loop)),
                "r1": seconds(lambda loop=loop: loop.r1(images)),
            }
            if i:  # the first round warms up
                for name, t in took.items():
                    times[f"{mode} {name}"].append(t)
    cycles = {
        m: [a + b / INTERVAL for a, b in zip(times[f"{m} iteration"], times[f"{m} r1"], strict=True)] for m in loops
    }
    gflop = {
        m: {"iteration": work(lambda x=x: iterate(x))[0], "r1": work(lambda x=x: x.r1(images))[0]}
        for m, x in loops.items()
    }
    results: dict[str, dict[str, object]] = {}
    for m in loops:
        median = {s: statistics.median(times[f"{m} {s}"]) for s in ("iteration", "r1")}
        ratios = [p / t for p, t in zip(cycles["plain"], cycles[m], strict=True)]
        results[m] = {
            "seconds an iteration": round(median["iteration"], 3),
            "seconds an R1 step": round(median["r1"], 3),
            "seconds an iteration and 1/16 of an R1 step": round(statistics.median(cycles[m]), 3),
            "times as fast as plain": round(statistics.median(ratios), 2),
            "times as fast as plain, each pair": [round(r, 2) for r in ratios],
        }
        for s, flop in gflop[m].items():
            results[m] |= {f"GFLOP an image, {s}": round(flop / n), f"GFLOP/s, {s}": round(flop / median[s])}
    here = [sys.executable, str(Path(__file__).resolve()), "--memory"]
    for m in loops:
        out = subprocess.run([*here, m, str(n)], capture_output=True, text=True, check=True).stdout
        results[m]["memory"] = json.loads(out)
    print(
        json.dumps(
            {
                "what": f"CIFAR-10 GDD-I, batch {n}; medians, ratios from pairs within a round",
                "pairs": pairs,
                "results": results,
                "relative differences of the first reference iteration from plain": {
                    k: float(f"{v:.1e}") for k, v in agreement.items()
                },
                "hardware": hardware(),
                "versions": versions(),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    keep_memory()  # as a launched run does
    if sys.argv[1:2] == ["--memory"]:
        print(json.dumps(memory(sys.argv[2], int(sys.argv[3]))))
    else:
        given = dict(enumerate(sys.argv))
        main(int(given.get(1, 7)), int(given.get(2, 8)))
