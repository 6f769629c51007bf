"""Devices as findings, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import torch

from gddlab.diagnosis.findings import Finding
from gddlab.diagnosis.machine import CPU, GPU

__all__ = ["GIB", "device_findings", "device_problems", "gib"]

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
