"""Findings of `gddlab.doctor()`, as a table, a dictionary, and text."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "CPU",
    "GIB",
    "GPU",
    "SECTIONS",
    "Doctor",
    "Finding",
    "Limits",
    "container_limits",
    "cpu",
    "cuda_devices",
    "device_findings",
    "device_problems",
    "driver_without_cuda",
    "gib",
]

SECTIONS = ("devices", "versions", "weights", "data", "folders", "able")


@dataclass(frozen=True)
class Finding:
    """One thing looked for.

    Attributes:
        section: One of `SECTIONS`.
        name: What was looked for.
        found: Whether it is there; of an ability, whether gddlab has it.
        value: What it is, or where.
        remedy: What to do to get it; empty where it is there or cannot be had.
        details: What is behind it, plain values.
    """

    section: str
    name: str
    found: bool
    value: str
    remedy: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def mark(self) -> str:
        """ "+" for what is there, "-" for what could be, a space for what need not be."""
        if self.found:
            return "+"
        return "-" if self.remedy or self.section == "able" else " "


@dataclass(frozen=True)
class Doctor:
    """What a machine has.

    Attributes:
        findings: Everything looked for, in the order of `SECTIONS`.
        problems: A line each: what is wrong, and what to do.
        broken: A package that gddlab needs is missing.
    """

    findings: tuple[Finding, ...]
    problems: tuple[str, ...]
    broken: bool

    def __getitem__(self, name: str) -> Finding:
        """The finding of a name.

        Raises:
            KeyError: Nothing of that name was looked for.
        """
        for f in self.findings:
            if f.name == name:
                return f
        raise KeyError(name)

    def brief(self, section: str) -> list[Finding]:
        """The findings of a section for reading: published teachers that are not here are one line."""
        rows = [f for f in self.findings if f.section == section]
        absent = [f for f in rows if f.details.get("published") and not f.found]
        rows = [f for f in rows if f not in absent]
        if absent:
            places = absent[0].details["places"]
            value, remedy = "not here", f"downloaded when asked for by name, or put NAME.pkl into {places}"
            if absent[0].details["offline"]:
                value, remedy = "not here, and GDDLAB_OFFLINE is set", f"put NAME.pkl into {places}"
            rows.append(Finding(section, f"{len(absent)} published teachers", False, value, remedy))
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for strict JSON: a dictionary a section, by name; `problems`; `broken`."""
        out: dict[str, Any] = {s: {} for s in SECTIONS}
        for f in self.findings:
            out[f.section][f.name] = {k: v for k, v in asdict(f).items() if k not in ("section", "name")}
        return out | {"problems": list(self.problems), "broken": self.broken}

    def to_frame(self) -> pd.DataFrame:
        """A row a finding: section, name, found, value, remedy."""
        import pandas as pd

        columns = ["section", "name", "found", "value", "remedy"]
        return pd.DataFrame([[getattr(f, c) for c in columns] for f in self.findings], columns=columns)

    def __str__(self) -> str:
        lines: list[str] = []
        for section in SECTIONS:
            rows = self.brief(section)
            width = max((len(f.name) for f in rows), default=0)
            texts = [f"{f.value}; {f.remedy}" if f.remedy else f.value for f in rows]
            lines += [section, *(f"  {f.mark} {f.name:<{width}}  {t}" for f, t in zip(rows, texts, strict=True))]
        return "\n".join([*lines, "problems", *([f"  ! {p}" for p in self.problems] or ["  none"])])


BF16 = ("amx_bf16", "avx512_bf16", "bf16", "svebf16")
"""Names that Linux and torch give to bfloat16 instructions, x86 and ARM."""
NO_LIMIT = 1 << 60
"""Control groups of version 1 write "no limit" as a number near 2^63."""


@dataclass(frozen=True)
class Limits:
    """What control groups leave to this process: cores (a quota may be a fraction), bytes, bytes in use; None for no limit."""

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
        memory, available: Bytes in all, and without swapping; within the container's limit. None where unknown.
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
    """A CUDA device; memory in bytes, `built_for`: torch has code for it."""

    name: str
    memory: int
    free: int
    capability: tuple[int, int]
    bf16: bool
    built_for: bool


def container_limits(own: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> Limits:
    """The tightest limits on the way from this process's control group to the root, versions 1 and 2; none off Linux."""
    cores: list[float] = []
    memory: list[tuple[int, int | None]] = []
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return Limits()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        names = controllers.split(",")
        for folder in _ancestors(root, path) if not controllers else ():
            quota, period = (_read(folder / "cpu.max").split() + ["", ""])[:2]
            if quota.isdigit() and period.isdigit():
                cores.append(int(quota) / int(period))
            memory += _memory(folder, "memory.max", "memory.current", "inactive_file")
        for folder in _ancestors(root / "cpu", path) if "cpu" in names else ():
            quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
            if quota.isdigit() and period.isdigit():  # a quota of -1 is none
                cores.append(int(quota) / int(period))
        for folder in _ancestors(root / "memory", path) if "memory" in names else ():
            memory += _memory(folder, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    limit, used = min(memory, key=lambda m: m[0], default=(None, None))
    return Limits(min(cores, default=None), limit, used)


def _ancestors(root: Path, path: str) -> Iterator[Path]:
    """Inside a container the path may be the host's, which is not mounted: then only the root is there."""
    folder = root / path.lstrip("/")
    while folder != root and root in folder.parents:
        yield folder
        folder = folder.parent
    yield root


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _memory(folder: Path, limit: str, usage: str, cache: str) -> list[tuple[int, int | None]]:
    """Limit and use, without the file cache that the kernel gives back."""
    value, used = _read(folder / limit), _read(folder / usage)
    if not value.isdigit() or int(value) >= NO_LIMIT:
        return []
    stat = dict(line.split()[:2] for line in _read(folder / "memory.stat").splitlines() if len(line.split()) == 2)
    return [(int(value), max(0, int(used) - int(stat.get(cache, 0))) if used.isdigit() else None)]


def cpu() -> CPU:
    """The processor as this process may use it."""
    limits, info = container_limits(), _cpuinfo()
    logical = os.cpu_count() or 1
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else logical
    total, available = _ram()
    if limits.memory is not None and (total is None or limits.memory < total):
        left = None if limits.used is None else max(0, limits.memory - limits.used)
        total = limits.memory
        available = min((x for x in (left, available) if x is not None), default=None)
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


def _cpuinfo() -> dict[str, str]:
    """The first core of /proc/cpuinfo."""
    pairs = (line.partition(":") for line in _read(Path("/proc/cpuinfo")).split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _capabilities() -> list[str]:
    """Instructions that torch knows of, where the system does not say."""
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


def _ram() -> tuple[int | None, int | None]:
    """Bytes in all and available."""
    info = dict(line.split(":", 1) for line in _read(Path("/proc/meminfo")).splitlines() if ":" in line)
    if "MemTotal" in info:
        total, free = (info.get(k, "").split() for k in ("MemTotal", "MemAvailable"))
        return int(total[0]) << 10, int(free[0]) << 10 if free else None
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), None
    except (AttributeError, ValueError, OSError):
        return None, None


def cuda_devices() -> list[GPU]:
    """Every CUDA (or ROCm) device that torch can use."""
    out = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(i)
        free, total = torch.cuda.mem_get_info(i)
        major, minor = properties.major, properties.minor
        # Code runs on later minor versions; what is kept as PTX ("compute_...") is compiled for any later device.
        built = [a.partition("_") for a in torch.cuda.get_arch_list()]
        versions = [(kind, int(v.rstrip("af"))) for kind, _, v in built if v.rstrip("af").isdigit()]
        own = 10 * major + minor
        fits = any(v <= own and (kind == "compute" or v // 10 == major) for kind, v in versions)
        out.append(
            GPU(
                name=properties.name,
                memory=total,
                free=free,
                capability=(major, minor),
                bf16=major >= 8 or torch.version.hip is not None,
                built_for=fits or torch.version.hip is not None,
            )
        )
    return out


def driver_without_cuda() -> bool:
    """An NVIDIA driver is loaded, and torch cannot use it."""
    return Path("/proc/driver/nvidia/version").exists() and not torch.cuda.is_available()


GIB = 1 << 30
MIN_MEMORY = 4 * GIB


def gib(n: float | None) -> str:
    """Bytes for people."""
    return "unknown" if n is None else f"{n / GIB:.1f} GiB"


def _build() -> str:
    if torch.version.hip:
        return f"for ROCm {torch.version.hip}"
    return f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"


def device_findings(cpu: CPU, gpus: Sequence[GPU]) -> list[Finding]:
    """CPU, CUDA devices, MPS."""
    text = (
        f"{cpu.model}, {cpu.usable_cores:g} of {cpu.logical_cores} cores usable, {cpu.threads} threads in torch, "
        f"{gib(cpu.available)} of {gib(cpu.memory)} free, bfloat16: {', '.join(cpu.bf16) or 'emulated'}"
    )
    out = [Finding("devices", "cpu", True, text, details=asdict(cpu) | {"bf16": list(cpu.bf16)})]
    nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    for i, gpu in enumerate(gpus):
        major, minor = gpu.capability
        text = (
            f"{gpu.name}, capability {major}.{minor}, {gib(gpu.free)} of {gib(gpu.memory)} free, "
            f"bfloat16: {'yes' if gpu.bf16 else 'no'}, NCCL: {'yes' if nccl else 'no'}"
        )
        about = asdict(gpu) | {"capability": [major, minor], "nccl": nccl}
        out.append(Finding("devices", f"cuda:{i}", True, text, details=about))
    if not gpus:
        out.append(Finding("devices", "cuda", False, f"none; torch is built {_build()}", details={"nccl": nccl}))
    mps = torch.backends.mps.is_available()
    text = "for networks that you move there; training takes CUDA or the CPU" if mps else "none"
    return [*out, Finding("devices", "mps", mps, text)]


def device_problems(cpu: CPU, gpus: Sequence[GPU], *, driver_unused: bool = False) -> list[str]:
    """What slows or stops a training, a line each.

    Args:
        cpu: The processor.
        gpus: CUDA devices.
        driver_unused: An NVIDIA driver is loaded, and torch sees no device.
    """
    out = []
    if driver_unused:
        out.append(
            f"an NVIDIA driver is loaded, but torch, built {_build()}, sees no device: install the torch that fits the driver "
            "(https://pytorch.org/get-started)"
        )
    for i, gpu in enumerate(gpus):
        major, minor = gpu.capability
        if not gpu.built_for:
            out.append(
                f"torch has no code for cuda:{i}, capability {major}.{minor}: install a build of torch that does"
            )
        if not gpu.bf16:
            out.append(f"cuda:{i} has no bfloat16: train with precision='float32'")
        if gpu.free < MIN_MEMORY:
            out.append(
                f"cuda:{i} has {gib(gpu.free)} free, training wants {gib(MIN_MEMORY)}: end what uses it, or lower batch_per_device"
            )
    if not gpus and not cpu.bf16:
        out.append("the CPU has no bfloat16 instructions: train with precision='float32', which is faster here")
    free = cpu.memory if cpu.available is None else cpu.available
    if free is not None and free < MIN_MEMORY:
        out.append(
            f"{gib(free)} of memory are free, training wants {gib(MIN_MEMORY)}: end other programs, or lower batch_per_device"
        )
    cores = max(1, int(cpu.usable_cores))
    if cpu.threads > cores:
        out.append(
            f"torch uses {cpu.threads} threads on {cpu.usable_cores:g} usable cores: set OMP_NUM_THREADS={cores}"
        )
    return out
