"""One-step pass of the CIFAR-10 NCSN++: float32 and bfloat16, contiguous and channels last, interleaved; prints JSON.

python tests/benchmarks/nets.py [ROUNDS] [BATCH] [NAME]
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
import time

import torch

from gddlab.nets import OneStepPrecond, build
from gddlab.nets.io import make_student
from gddlab.provenance import hardware, versions

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def seconds(net: OneStepPrecond, z: torch.Tensor, labels: torch.Tensor | None, bf16: bool) -> float:
    began = time.perf_counter()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        net.generate(z, labels)
    return time.perf_counter() - began


def main(rounds: int, batch: int, name: str) -> None:
    torch.manual_seed(0)
    student = make_student(build(name)).eval()
    z = torch.randn(batch, student.img_channels, student.img_resolution, student.img_resolution)
    labels = torch.eye(student.label_dim)[:1].expand(batch, -1) if student.label_dim else None
    nets = {k: copy.deepcopy(student).to(memory_format=f) for k, f in FORMATS.items()}
    noise = {k: z.contiguous(memory_format=f) for k, f in FORMATS.items()}
    times: dict[str, list[float]] = {f"{p} {k}": [] for p in ("float32", "bfloat16") for k in FORMATS}
    for i in range(rounds + 1):
        for key in times:
            precision, form = key.split()
            t = seconds(nets[form], noise[form], labels, precision == "bfloat16")
            if i:  # the first round warms up
                times[key].append(t)
    base = times["float32 contiguous"]
    print(
        json.dumps(
            {
                "what": f"one-step pass of {name}, batch {batch}; medians, speed-ups from pairs within a round",
                "rounds": rounds,
                "ms": {k: round(statistics.median(t) * 1e3, 1) for k, t in times.items()},
                "fastest_ms": {k: round(min(t) * 1e3, 1) for k, t in times.items()},
                "speed_up": {
                    k: round(statistics.median(b / a for a, b in zip(t, base, strict=True)), 3)
                    for k, t in times.items()
                },
                "hardware": hardware(),
                "versions": versions(),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    given = dict(enumerate(sys.argv))
    main(int(given.get(1, 5)), int(given.get(2, 16)), given.get(3, "ncsnpp-cifar10"))
