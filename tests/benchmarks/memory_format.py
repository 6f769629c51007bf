"""Frozen backbones with weights in NHWC, as they are kept, against NCHW, in pairs; prints JSON.

python tests/benchmarks/memory_format.py [PAIRS]
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import torch

from gddlab.pretrained.backbones import Backbone
from gddlab.provenance import hardware, versions

FORMATS = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}
CASES = (("tf_efficientnet_lite0", 32), ("tf_efficientnet_lite0", 64), ("vgg16_bn", 64))
BATCH = 16


def seconds(net: Backbone, images: torch.Tensor, *, backward: bool) -> float:
    x = images.clone().requires_grad_(backward)
    began = time.perf_counter()
    maps = net(x)
    if backward:
        torch.stack([m.sum() for m in maps]).sum().backward()
    return time.perf_counter() - began


def main(pairs: int) -> None:
    rows = []
    for name, size in CASES:
        torch.manual_seed(0)
        net = Backbone(name, size, weights="random" if name == "vgg16_bn" else "auto")
        images = torch.rand(BATCH, 3, size, size) * 2 - 1
        for backward in (False, True):
            times: dict[str, list[float]] = {form: [] for form in FORMATS}
            for i in range(pairs + 1):
                for form, memory_format in FORMATS.items():
                    net.net.to(memory_format=memory_format)
                    t = seconds(net, images, backward=backward)
                    if i:  # the first pair warms up
                        times[form].append(t)
            ratios = [b / a for a, b in zip(times["nhwc"], times["nchw"], strict=True)]
            medians = {form: statistics.median(t) for form, t in times.items()}
            ratio = {"ratio": statistics.median(ratios), "ratios": [min(ratios), max(ratios)]}
            rows.append({"backbone": name, "size": size, "backward": backward, **medians, **ratio})
    about = {
        "what": f"features of {BATCH} images, seconds, medians",
        "pairs": pairs,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(about | {"rows": rows, "hardware": hardware(), "versions": versions()}, indent=2))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 11)
