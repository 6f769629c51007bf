"""Completing and inverting images: seconds an image by rows at once, compiled or not, in pairs; prints JSON.

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

STEPS, IMAGES = 20, 32
ROWS = (1, 8, 32)
"""Images at once."""


def seconds(student: Any, images: torch.Tensor, call: str, rows: int) -> float:
    how: dict[str, Any] = {"steps": STEPS, "batch_size": rows, "progress": False}
    began = time.perf_counter()
    if call == "inpaint":
        gddlab.inpaint(student, images, "top", n=1, **how)
    else:
        gddlab.invert(student, images, restarts=1, **how)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / IMAGES


def main(pairs: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student = make_student(gddlab.load_teacher("digits")).eval().to(device)
    nets = {"eager": student, "compiled": torch.compile(student)}
    images = gddlab.open_dataset("digits:held-out").images(slice(0, IMAGES))
    cases = [("inpaint", "eager"), ("invert", "eager"), ("invert", "compiled")]
    times: dict[tuple[str, str, int], list[float]] = {(*case, rows): [] for case in cases for rows in ROWS}
    for i in range(pairs + 1):
        for (call, name, rows), found in times.items():
            t = seconds(nets[name], images, call, rows)
            if i:  # the first one compiles
                found.append(t)
    rows_ = []
    for (call, name, rows), found in times.items():
        first = times[call, "eager", ROWS[0]]
        speed = statistics.median(a / b for a, b in zip(first, found, strict=True))
        rows_.append({"call": call, "network": name, "rows": rows, "seconds": statistics.median(found), "speed": speed})
    about = {"what": f"completing or inverting a 16x16 digit, {STEPS} steps: seconds an image, medians", "pairs": pairs}
    about |= {"threads": torch.get_num_threads(), "device": device}
    print(json.dumps(about | {"rows": rows_, "hardware": hardware(), "versions": versions()}, indent=2))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
