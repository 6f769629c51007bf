"""What a probe would cost, from one of its passes."""

from __future__ import annotations

import contextlib
import resource
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from gddlab.probing.hooks import Probe
from gddlab.probing.inputs import Inputs

__all__ = ["Estimate", "estimate", "peak_memory"]


@dataclass(frozen=True)
class Estimate:
    """Time and memory of a probe, measured on one pass.

    Attributes:
        seconds: All passes, at the pace of the one measured.
        seconds_bare: The same without hooks.
        peak_mib: Memory that a pass adds to what the process holds, MiB; None where it cannot be read. It does not grow with images.
        passes, rows, layers, sigmas, n_images: Forward passes, rows of each, measured layers, noise levels, images.
    """

    seconds: float
    seconds_bare: float
    peak_mib: float | None
    passes: int
    rows: int
    layers: int
    sigmas: int
    n_images: int

    def __str__(self) -> str:
        memory = "memory unknown" if self.peak_mib is None else f"{self.peak_mib:,.0f} MiB more memory"
        seconds = f"{self.seconds:.2g} s" if self.seconds < 10 else f"{self.seconds:.0f} s"
        if self.seconds > 120:
            seconds = f"{self.seconds / 60:.0f} min"
        return (
            f"about {seconds}, {memory}: {self.layers} layers at {self.sigmas} noise levels, {self.n_images} images, "
            f"{self.passes} pass{'' if self.passes == 1 else 'es'} of {self.rows} rows; "
            f"hooks cost {self.seconds / self.seconds_bare - 1:+.0%}"
        )


def estimate(measure: Probe, inputs: Inputs, images: tuple[int, int], device: torch.device, *, passes: int) -> Estimate:
    """Times a pass over `images` with and without hooks; inside `as_it_was` and `no_grad`. The probe counts it."""
    i, j = images
    began = time.perf_counter()
    x, sigma, labels = inputs.rows(i, j, device=device, sigmas=measure.sigmas)
    made = time.perf_counter() - began
    # This pass also pays for caches and kernels, so that the next ones can be timed.
    with peak_memory(device) as found, measure, measure.images(j - i):
        inputs.denoiser(x, sigma, labels)
    took: dict[bool, float] = {}
    for hooked in (False, True):
        with contextlib.ExitStack() as stack:
            if hooked:
                stack.enter_context(measure)
                stack.enter_context(measure.images(j - i))
            _wait(device)
            began = time.perf_counter()
            inputs.denoiser(x, sigma, labels)
            _wait(device)
            took[hooked] = time.perf_counter() - began
    return Estimate(
        seconds=(took[True] + made) * passes,
        seconds_bare=(took[False] + made) * passes,
        peak_mib=found[0],
        passes=passes,
        rows=len(x),
        layers=len(measure.layers),
        sigmas=len(inputs.sigmas),
        n_images=inputs.n,
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[list[float | None]]:
    """Yields a list that holds, afterwards, by how many MiB memory rose inside; None where the system does not say."""
    out: list[float | None] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        yield out
        out.append((torch.cuda.max_memory_allocated(device) - held) / 2**20)
        return
    pages = Path("/proc/self/statm")
    if not pages.exists():
        yield out
        out.append(None)
        return

    def read() -> float:
        return float(pages.read_text().split()[1]) * resource.getpagesize() / 2**20

    before = read()
    peak = before
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, read())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield out
    finally:
        done.set()
        thread.join()
    out.append(max(peak, read()) - before)
