"""R1 on digits: forward-mode product against the backbone's second derivative, in pairs; prints JSON.

python tests/benchmarks/r1_step.py [PAIRS]
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import torch

from gddlab.datasets import digits
from gddlab.distill.losses import r1_penalty
from gddlab.distill.projected import Projected, ProjectedDiscriminator
from gddlab.provenance import hardware, versions


def double_backward(d: ProjectedDiscriminator, images: torch.Tensor) -> torch.Tensor:
    x = images.detach().requires_grad_(True)
    total = torch.stack([y.sum() for y in d(x)]).sum()
    (grad,) = torch.autograd.grad(total, x, create_graph=True)
    return grad.square().sum((1, 2, 3)).mean()


def seconds(d: ProjectedDiscriminator, images: torch.Tensor, forward_mode: bool) -> float:
    d.zero_grad()
    began = time.perf_counter()
    (r1_penalty(d, images, None)[1] if forward_mode else double_backward(d, images)).backward()
    return time.perf_counter() - began


def main(pairs: int) -> None:
    torch.manual_seed(0)
    d = ProjectedDiscriminator(Projected(input_size=64, cout=16, head_width=64)).train()
    images = digits().images(slice(0, 16))
    times: dict[bool, list[float]] = {True: [], False: []}
    for i in range(pairs + 1):
        for mode in (True, False):
            t = seconds(d, images, mode)
            if i:  # the first pair warms up
                times[mode].append(t)
    print(
        json.dumps(
            {
                "what": "R1 step, batch 16, input 64, seconds, medians",
                "pairs": pairs,
                "forward_mode": statistics.median(times[True]),
                "double_backward": statistics.median(times[False]),
                "ratio": statistics.median(b / a for a, b in zip(times[True], times[False], strict=True)),
                "hardware": hardware(),
                "versions": versions(),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 7)
