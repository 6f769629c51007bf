"""Completing and inverting images: seconds an image by setting and by rows at once, in rounds; prints JSON.

python tests/benchmarks/editing.py [ROUNDS]
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

import torch

import gddlab
from gddlab.experiments.studies import SEARCHED, TAUGHT
from gddlab.nets.io import make_student
from gddlab.provenance import hardware, versions

IMAGES = 32
ROWS = (1, 8, 32)
"""Images at once, of a search of `STEPS` steps; the settings of the notebook take all of them."""
STEPS = 20


def seconds(call: Any, net: Any, images: torch.Tensor, **how: Any) -> float:
    began = time.perf_counter()
    call(net, images, progress=False, **how)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / len(images)


def main(rounds: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases: list[tuple[dict[str, Any], Any, Any, torch.Tensor, dict[str, Any]]] = []
    for data in ("digits", "emoji"):
        teacher = gddlab.load_teacher(data).to(device)
        student = make_student(teacher).eval()
        images = gddlab.open_dataset(f"{data}:held-out").images(slice(0, IMAGES))
        half: dict[str, Any] = {"keep": "top", "n": 1}
        if data == "digits":
            for rows in ROWS:
                how = {"steps": STEPS, "batch_size": rows}
                cases.append(({"call": "inpaint", "rows": rows, **how}, gddlab.inpaint, student, images, half | how))
            for name, net in {"plain": student, "compiled": torch.compile(student)}.items():
                how = {"steps": STEPS, "restarts": 1}
                cases.append(({"call": f"invert, {name}", "rows": IMAGES, **how}, gddlab.invert, net, images, how))
        for method, steps, net in (
            *(("optimise", steps, student) for steps in SEARCHED),
            *(("teacher", steps, teacher) for steps in TAUGHT),
        ):
            how = {"method": method, "steps": steps}
            cases.append(({"call": "inpaint", "rows": IMAGES, **how}, gddlab.inpaint, net, images, half | how))
        for about, *_ in cases:
            about.setdefault("data", data)
    times: list[list[float]] = [[] for _ in cases]
    for i in range(rounds + 1):
        for found, (_, call, net, images, how) in zip(times, cases, strict=True):
            t = seconds(call, net, images, **how)
            if i:  # the first one compiles
                found.append(t)
    rows_ = [about | {"seconds": statistics.median(t)} for (about, *_), t in zip(cases, times, strict=True)]
    about = {"what": "seconds an image, medians; the upper half of an image is known", "rounds": rounds}
    about |= {"threads": torch.get_num_threads(), "device": device}
    print(json.dumps(about | {"rows": rows_, "hardware": hardware(), "versions": versions()}, indent=2))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
