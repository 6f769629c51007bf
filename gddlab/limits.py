"""Cores and memory that this process may use: what the machine has, within the limits of its container."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

NO_LIMIT = 1 << 60
"""Control groups of version 1 write "no limit" as a number near 2^63."""


@dataclass(frozen=True)
class Limits:
    """What control groups allow: cores (a quota may be a fraction), bytes, bytes in use; None for no limit."""

    cores: float | None = None
    memory: int | None = None
    used: int | None = None


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


def usable_cores() -> float:
    """Cores that this process may use: affinity, and the quota of its container."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(affinity, container_limits().cores or affinity)


def usable_memory() -> tuple[int, int]:
    """Bytes in all, and those free without swapping; within the container's limit."""
    ram, limits = psutil.virtual_memory(), container_limits()
    if limits.memory is None or limits.memory >= ram.total:
        return ram.total, ram.available
    left = ram.available if limits.used is None else min(ram.available, limits.memory - limits.used)
    return limits.memory, max(0, left)
