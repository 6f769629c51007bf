"""Fresh processes: what they inherit from the calling kernel is their environment, nothing else."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["fresh_environment"]

# glibc returns freed megabytes to the system at once, and the next tensor of that size pays for its pages again: about a tenth of a step on a CPU.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 33)}


def fresh_environment(nproc: int) -> dict[str, str]:
    """Environment of one of `nproc` processes that share this machine: its threads, and where gddlab is imported from."""
    env = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // nproc)), **MALLOC, **os.environ}
    root = str(Path(__file__).resolve().parents[1])  # gddlab may be imported from a clone that is not installed
    env["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [env.get("PYTHONPATH")])])
    return env
