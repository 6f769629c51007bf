"""The process at hand: its device, its memory, its random numbers."""

from __future__ import annotations

import os
import re
import resource
import sys
from pathlib import Path

import torch

from gddlab.errors import GddlabError


def chosen_device(name: str = "auto") -> torch.device:
    """The device of this process.

    Args:
        name: "auto" (CUDA if there is a device, else the CPU), "cpu" or "cuda". Of several GPUs a process takes that of
            its LOCAL_RANK, which torchrun sets; more processes than GPUs share them.

    Raises:
        GddlabError: Another name, or CUDA without a device.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise GddlabError(f"device={name!r}: give auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise GddlabError("device='cuda', but torch sees no CUDA device: use device='auto' or 'cpu'")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


def peak_memory_mib(device: torch.device | None = None) -> float:
    """Peak so far, MiB: of the memory allocated on a CUDA device, else of this process's memory.

    The latter is on Linux since its program began; elsewhere a peak of the process that started it counts too.
    """
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(found[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def generator(seed: int, position: int) -> torch.Generator:
    """A CPU generator for one position of the sequence of `seed`.

    PyTorch's CPU generator takes 32 bits of its seed; seeds are spread over them by the golden ratio (Knuth's
    multiplicative hash), so that sequences of nearby seeds do not overlap for millions of positions.
    """
    return torch.Generator().manual_seed((seed * 0x9E3779B1 + position) % 2**32)
