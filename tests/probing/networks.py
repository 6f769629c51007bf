"""Tiny networks, filled so that every branch does something; the memory that a run of one takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gddlab.nets import Precond, from_edm
from tests.conftest import TINY


def tiny(kind: str = "EDMPrecond", seed: int = 0, **changes: Any) -> Precond:
    """A NCSN++ of 8 channels; fresh EDM networks have branches near zero, this one has not."""
    torch.manual_seed(seed)
    net = from_edm(kind, **(TINY | changes))
    for p in net.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)
    return net.eval()


def tiny_adm(**changes: Any) -> Precond:
    kwargs = {"img_resolution": 16, "img_channels": 1, "model_type": "DhariwalUNet", "model_channels": 64}
    return from_edm(
        "EDMPrecond", **(kwargs | {"channel_mult": [1], "num_blocks": 1, "attn_resolutions": [16]} | changes)
    )


def peak_bytes(run: Callable[[], object]) -> int:
    """The most that tensors held at one time beyond the start, as PyTorch's allocator counts it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
