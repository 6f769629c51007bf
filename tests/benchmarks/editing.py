"""Completing images: seconds a completion by rows at once, compiled or not, in pairs; prints JSON.

python tests/benchmarks/editing.py [PAIRS]
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

import torch

import gddlab
from gddlab.nets.io import make_student
from gddlab.provenance import hardware, versions

STEPS, IMAGES, WAYS = 20, 8, 4
ROWS = (1, 8, 32)
"""Completions at once."""


def seconds(student: Any, images: torch.Tensor, rows: int) -> float:
    began = time.perf_counter()
    gddlab.inpaint(student, images, "top", n=WAYS, steps=STEPS, batch_size=rows, progress=False)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / (IMAGES * WAYS)


def main(pairs: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student = make_student(gddlab.load_teacher("digits")).eval().to(device)
    nets = {"eager": student, "compiled": torch.compile(student)}
    images = gddlab.open_dataset("digits:held-out").images(slice(0, IMAGES))
    times: dict[tuple[str, int], list[float]] = {(name, rows): [] for name in nets for rows in ROWS}
    for i in range(pairs + 1):
        for (name, rows), found in times.items():
            t = seconds(nets[name], images, rows)
            if i:  # the first one compiles
                found.append(t)
    first = times["eager", ROWS[0]]
    rows_ = [
        {"network": name, "rows": rows, "seconds": statistics.median(found)}
        | {"speed": statistics.median(a / b for a, b in zip(first, found, strict=True))}
        for (name, rows), found in times.items()
    ]
    about = {"what": f"inpainting of a 16x16 digit, {STEPS} steps: seconds a completion, medians", "pairs": pairs}
    about |= {"threads": torch.get_num_threads(), "device": device}
    print(json.dumps(about | {"rows": rows_, "hardware": hardware(), "versions": versions()}, indent=2))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
