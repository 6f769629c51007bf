"""Sampling on the CPU; prints JSON.

python tests/benchmarks/sampling.py [PAIRS] [BATCH]

one_step: the full CIFAR-10 student, contiguous float32 against channels_last with bfloat16 autocast, in pairs.
heun: the sampler of a small teacher beside as many bare network calls, on one thread, in pairs: what the sampler adds.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from gddlab.nets import Precond, from_edm
from gddlab.nets.architectures import NCSNPP
from gddlab.provenance import hardware, versions
from gddlab.sampling import heun, latents, sample

CIFAR10 = {"img_resolution": 32, "img_channels": 3, "model_channels": 128, "channel_mult": [2, 2, 2], "dropout": 0.13}
DIGITS = {"img_resolution": 16, "img_channels": 1, "model_channels": 32, "channel_mult": [1, 2], "num_blocks": 2}
GFLOP_AN_IMAGE = 42.8  # of the CIFAR-10 network


def seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def pairs(n: int, one: Callable[[], Any], other: Callable[[], Any]) -> list[tuple[float, float]]:
    """Times of both, in turn; the first pair warms up."""
    return [(seconds(one), seconds(other)) for _ in range(n + 1)][1:]


def one_step(n: int, batch: int) -> dict[str, Any]:
    net = from_edm("OneStepPrecond", **CIFAR10, **NCSNPP).eval().requires_grad_(False)

    def fast() -> torch.Tensor:
        return sample(net, batch, batch_size=batch, dtype=torch.bfloat16, channels_last=True)

    times = pairs(n, lambda: sample(net, batch, batch_size=batch), fast)
    float32, bfloat16 = (statistics.median(t) for t in zip(*times, strict=True))
    return {
        "what": "one-step CIFAR-10 NCSN++, seconds a batch, medians",
        "parameters": sum(p.numel() for p in net.parameters()),
        "batch": batch,
        "pairs": n,
        "float32_contiguous": float32,
        "bfloat16_channels_last": bfloat16,
        "ratio": statistics.median(a / b for a, b in times),
        "gflop_per_s": {
            "float32_contiguous": GFLOP_AN_IMAGE * batch / float32,
            "bfloat16_channels_last": GFLOP_AN_IMAGE * batch / bfloat16,
        },
    }


def overhead(n: int, steps: int = 6, batch: int = 64) -> dict[str, Any]:
    torch.set_num_threads(1)  # small layers on several threads measure the other programs of the machine
    net: Precond = from_edm("EDMPrecond", **DIGITS, **NCSNPP, attn_resolutions=[8]).eval().requires_grad_(False)
    z = latents(range(batch), (1, 16, 16))
    calls = 2 * steps - 1

    def bare() -> None:
        for _ in range(calls):
            net(z, torch.tensor(1.0))

    with torch.inference_mode():
        times = pairs(n, lambda: heun(net, z, num_steps=steps), bare)
    sampler, network = (statistics.median(t) for t in zip(*times, strict=True))
    return {
        "what": f"heun-{steps}, {calls} network calls, digits architecture, one thread, seconds, medians",
        "batch": batch,
        "pairs": n,
        "sampler": sampler,
        "bare_network_calls": network,
        "overhead": statistics.median(a / b for a, b in times) - 1,
    }


def main(n: int, batch: int) -> None:
    load = os.getloadavg()[0]
    about = {"load_before": load, "hardware": hardware(), "versions": versions()}
    print(json.dumps({"one_step": one_step(n, batch), "heun": overhead(n)} | about, indent=2))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5, int(sys.argv[2]) if len(sys.argv) > 2 else 32)
