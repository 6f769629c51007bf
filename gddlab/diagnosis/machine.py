"""The processor and the CUDA devices, as this process may use them, and what is wrong with them."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

GIB = 1 << 30
MIN_MEMORY = 4 * GIB
"""Free memory that training wants, bytes."""
BF16 = ("amx_bf16", "avx512_bf16", "bf16", "svebf16")
"""Names that Linux and torch give to bfloat16 instructions, x86 and ARM."""
NO_LIMIT = 1 << 60
"""Control groups of version 1 write "no limit" as a number near 2^63."""


def gib(n: float | None) -> str:
    """Bytes for people."""
    return "unknown" if n is None else f"{n / GIB:.1f} GiB"


@dataclass(frozen=True)
class Limits:
    """What control groups allow: cores (a quota may be a fraction), bytes, bytes in use; None for no limit."""

    cores: float | None = None
    memory: int | None = None
    used: int | None = None


@dataclass(frozen=True)
class CPU:
    """The processor.

    Attributes:
        model: Its name.
        logical_cores: Cores of the machine.
        usable_cores: Those that this process may use: affinity, and the quota of its container.
        threads: Threads that torch uses in an operation.
        memory, available: Total bytes, and those free without swapping; within the container's limit. None if unknown.
        bf16: Its bfloat16 instructions.
    """

    model: str
    logical_cores: int
    usable_cores: float
    threads: int
    memory: int | None
    available: int | None
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
    limits, info = container_limits(), cpuinfo()
    logical = os.cpu_count() or 1
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else logical
    ram = psutil.virtual_memory()
    total, available = ram.total, ram.available
    if limits.memory is not None and limits.memory < total:
        total = limits.memory
        if limits.used is not None:
            available = min(available, max(0, total - limits.used))
    flags = (info.get("flags") or info.get("Features") or "").split() or _capabilities()
    return CPU(
        model=info.get("model name") or _brand() or platform.processor() or platform.machine(),
        logical_cores=logical,
        usable_cores=affinity if limits.cores is None else min(affinity, limits.cores),
        threads=torch.get_num_threads(),
        memory=total,
        available=available,
        bf16=tuple(sorted(set(flags) & set(BF16))),
    )


def cpuinfo() -> dict[str, str]:
    """The first core of /proc/cpuinfo; psutil knows neither its name nor its instructions."""
    pairs = (line.partition(":") for line in _read(Path("/proc/cpuinfo")).split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _capabilities() -> list[str]:
    """Instructions that torch knows of, for systems without /proc/cpuinfo."""
    known: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return [name for name, there in known.items() if there is True]


def _brand() -> str:
    if platform.system() != "Darwin":
        return ""
    try:
        out = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return out.stdout.strip()


def container_limits(own: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> Limits:
    """The tightest limits between this process's control group and the root, versions 1 and 2; none off Linux."""
    cores: list[float] = []
    memory: list[tuple[int, int | None]] = []
    for line in _read(own).splitlines():
        _, controllers, path = line.split(":", 2)
        names = controllers.split(",")
        for folder in _ancestors(root, path) if not controllers else ():
            cores += _quota(*_read(folder / "cpu.max").split())
            memory += _memory(folder, "memory.max", "memory.current", "inactive_file")
        for folder in _ancestors(root / "cpu", path) if "cpu" in names else ():
            cores += _quota(_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us"))
        for folder in _ancestors(root / "memory", path) if "memory" in names else ():
            memory += _memory(folder, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    limit, used = min(memory, key=lambda m: m[0], default=(None, None))
    return Limits(min(cores, default=None), limit, used)


def _ancestors(root: Path, path: str) -> Iterator[Path]:
    """A group's folder and those above; inside a container the path may be the host's, then only the root exists."""
    folder = root / path.lstrip("/")
    while folder != root and root in folder.parents:
        yield folder
        folder = folder.parent
    yield root


def _quota(quota: str = "", period: str = "") -> list[float]:
    """Cores; none for "max" and -1."""
    return [int(quota) / int(period)] if quota.isdigit() and period.isdigit() else []


def _memory(folder: Path, limit: str, usage: str, cache: str) -> list[tuple[int, int | None]]:
    """Limit and use, without the file cache that the kernel can free."""
    value, used = _read(folder / limit), _read(folder / usage)
    if not value.isdigit() or int(value) >= NO_LIMIT:
        return []
    stat = dict(line.split()[:2] for line in _read(folder / "memory.stat").splitlines() if len(line.split()) == 2)
    return [(int(value), max(0, int(used) - int(stat.get(cache, 0))) if used.isdigit() else None)]


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


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
    """What slows or prevents training, one line each.

    Args:
        cpu: The processor.
        gpus: CUDA devices.
        driver_unused: An NVIDIA driver is loaded, and torch sees no device.
    """
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
    free = cpu.memory if cpu.available is None else cpu.available
    if free is not None and free < MIN_MEMORY:
        out.append(f"{gib(free)} of memory are free, {want}: end other programs, or lower batch_per_device")
    cores = max(1, int(cpu.usable_cores))
    if cpu.threads > cores:
        out.append(
            f"torch uses {cpu.threads} threads on {cpu.usable_cores:g} usable cores: set OMP_NUM_THREADS={cores}"
        )
    return out
