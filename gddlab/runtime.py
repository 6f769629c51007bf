"""The device, the memory and the random numbers of this process."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
from pydantic import Field

from gddlab.errors import GddlabError, shown
from gddlab.limits import usable_cores
from gddlab.lock import OWNED


def chosen_device(name: str = "auto") -> torch.device:
    """The device of this process.

    Args:
        name: "auto" (CUDA if there is a device, else the CPU), "cpu" or "cuda". Of several GPUs a process takes that of
            its LOCAL_RANK, which torchrun sets; more processes than GPUs share them.

    Raises:
        GddlabError: Another name, or CUDA without a device.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise GddlabError(f"device={shown(name)}: give auto, cpu or cuda")
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


@contextlib.contextmanager
def switched(name: str, value: Any, *owners: Any) -> Iterator[None]:
    """Inside, this attribute of each owner has the value; afterwards its own again."""
    before = [getattr(owner, name) for owner in owners]
    try:
        for owner in owners:
            setattr(owner, name, value)
        yield
    finally:
        for owner, own in zip(owners, before, strict=True):
            setattr(owner, name, own)


def tf32(allowed: bool) -> contextlib.AbstractContextManager[None]:
    """Inside, float32 convolutions and matrix products on CUDA use TF32, 10 bits of mantissa, or do not.

    PyTorch's own default is to use it in convolutions. By the settings since PyTorch 2.9; the older ones may raise
    where they are read inside.
    """
    backends: Any = torch.backends
    return switched("fp32_precision", "tf32" if allowed else "ieee", backends.cudnn.conv, backends.cuda.matmul)


@contextlib.contextmanager
def beside_runs() -> Iterator[None]:
    """Inside, torch takes only the cores that runs on this machine leave, at least one.

    Where both want all cores, their threads wait for each other by spinning, and both become many times slower. Runs on
    GPUs leave the cores to others.
    """
    before = torch.get_num_threads()
    busy = 0 if OWNED in os.environ or torch.cuda.is_available() else _threads_of_runs(int(time.monotonic()))
    if not busy:
        yield
        return
    torch.set_num_threads(max(1, min(before, int(usable_cores()) - busy)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.lru_cache(maxsize=1)
def _threads_of_runs(second: int) -> int:
    """Threads of all ranks on this machine; looked up once a second."""
    found = 0
    for process in psutil.process_iter(["cmdline"]):
        if {"gddlab.launch.agent", "gddlab.launch.rank"}.isdisjoint(process.info["cmdline"] or ()):
            continue
        with contextlib.suppress(psutil.Error):  # it ended, or belongs to somebody else
            if not process.children():  # an agent beside its ranks waits
                found += int(process.environ().get("OMP_NUM_THREADS", math.ceil(usable_cores())))
    return found


MAX_SEED = 2**32 - 1
"""PyTorch's CPU generator takes 32 bits."""
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]


def generator(seed: int, position: int) -> torch.Generator:
    """A CPU generator for one position of the sequence of `seed`.

    PyTorch's CPU generator takes 32 bits of its seed; seeds are spread over them by the golden ratio (Knuth's
    multiplicative hash), so that sequences of nearby seeds do not overlap for millions of positions.
    """
    return torch.Generator().manual_seed((seed * 0x9E3779B1 + position) % 2**32)
