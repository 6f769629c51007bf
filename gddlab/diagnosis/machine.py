"""The processor and the CUDA devices, as this process may use them, and what is wrong with them."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gddlab.limits import usable_cores, usable_memory

GIB = 1 << 30
MIN_MEMORY = 4 * GIB
"""Free memory that training wants, bytes."""
BF16 = ("amx_bf16", "avx512_bf16", "bf16", "svebf16")
"""Names that Linux and torch give to bfloat16 instructions, x86 and ARM."""


def gib(n: float) -> str:
    """Bytes for people."""
    return f"{n / GIB:.1f} GiB"


@dataclass(frozen=True)
class CPU:
    """The processor.

    Attributes:
        model: Its name.
        logical_cores: Cores of the machine.
        usable_cores: Those that this process may use: affinity, and the quota of its container.
        threads: Threads that torch uses in an operation.
        memory, available: Total bytes, and those free without swapping; within the container's limit.
        bf16: Its bfloat16 instructions.
    """

    model: str
    logical_cores: int
    usable_cores: float
    threads: int
    memory: int
    available: int
    bf16: tuple[str, ...]


@dataclass(frozen=True)
class GPU:
    """A CUDA device; memory in bytes; `built_for`: torch has code for it."""

    name: str
    memory: int
    free: int
    capability: tuple[int, int]
    bf16: bool
    built_for: bool


def cpu() -> CPU:
    """The processor as this process may use it."""
    info = cpuinfo()
    known: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # where there is no /proc/cpuinfo
    flags = (info.get("flags") or info.get("Features") or "").split() or [k for k, v in known.items() if v is True]
    total, available = usable_memory()
    return CPU(
        model=info.get("model name") or str(known.get("cpu_name") or platform.processor() or platform.machine()),
        logical_cores=os.cpu_count() or 1,
        usable_cores=usable_cores(),
        threads=torch.get_num_threads(),
        memory=total,
        available=available,
        bf16=tuple(sorted(set(flags) & set(BF16))),
    )


def cpuinfo() -> dict[str, str]:
    """The first core of /proc/cpuinfo; psutil knows neither its name nor its instructions."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().split("\n\n")[0].splitlines() if path.exists() else []
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def cuda_devices() -> list[GPU]:
    """Every CUDA (or ROCm) device that torch can use."""
    out, rocm = [], torch.version.hip is not None
    # code runs on later minor versions; what is kept as PTX ("compute_...") is compiled for any later device
    built = [a.partition("_") for a in torch.cuda.get_arch_list()] if torch.cuda.is_available() else []
    versions = [(kind, int(v.rstrip("af"))) for kind, _, v in built if v.rstrip("af").isdigit()]
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(i)
        free, total = torch.cuda.mem_get_info(i)
        major, minor = properties.major, properties.minor
        fits = any(v <= 10 * major + minor and (kind == "compute" or v // 10 == major) for kind, v in versions)
        out.append(GPU(properties.name, total, free, (major, minor), bf16=major >= 8 or rocm, built_for=fits or rocm))
    return out


def driver_without_cuda() -> bool:
    """An NVIDIA driver is loaded, and torch cannot use it."""
    return Path("/proc/driver/nvidia/version").exists() and not torch.cuda.is_available()


def torch_build() -> str:
    """What torch is built for, in words."""
    if torch.version.hip:
        return f"for ROCm {torch.version.hip}"
    return f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"


def device_problems(cpu: CPU, gpus: Sequence[GPU], *, driver_unused: bool = False) -> list[str]:
    """What slows or prevents training, one line each; `driver_unused` as from `driver_without_cuda`."""
    out, want = [], f"training wants {gib(MIN_MEMORY)}"
    if driver_unused:
        out.append(
            f"an NVIDIA driver is loaded, but torch, built {torch_build()}, sees no device: install the torch that "
            "fits the driver (https://pytorch.org/get-started)"
        )
    for i, gpu in enumerate(gpus):
        if not gpu.built_for:
            version = ".".join(map(str, gpu.capability))
            out.append(f"torch has no code for cuda:{i}, capability {version}: install a build of torch that does")
        if not gpu.bf16:
            out.append(f"cuda:{i} has no bfloat16: train with precision='float32'")
        if gpu.free < MIN_MEMORY:
            out.append(f"cuda:{i} has {gib(gpu.free)} free, {want}: end what uses it, or lower batch_per_device")
    if not gpus and not cpu.bf16:
        out.append("the CPU has no bfloat16 instructions: train with precision='float32', which is faster here")
    if cpu.available < MIN_MEMORY:
        out.append(f"{gib(cpu.available)} of memory are free, {want}: end other programs, or lower batch_per_device")
    cores = max(1, int(cpu.usable_cores))
    if cpu.threads > cores:
        out.append(
            f"torch uses {cpu.threads} threads on {cpu.usable_cores:g} usable cores: set OMP_NUM_THREADS={cores}"
        )
    return out
