"""`probe`: statistics of a network's layers over noise levels; `estimate`: what that would cost."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import nn

from gddlab.errors import GddlabError, validated
from gddlab.probing.guard import as_it_was, warn_nonfinite
from gddlab.probing.hooks import Probe
from gddlab.probing.inputs import Data, Inputs, Labels, Precision, States, Timesteps
from gddlab.probing.layers import LayerSelection
from gddlab.probing.result import ProbeResult, network_meta
from gddlab.probing.statistics import DEFAULT, StatisticSelection, stacked, statistic_classes
from gddlab.progress import progress_bar
from gddlab.ranks import present_ranks, share
from gddlab.runtime import beside_runs
from gddlab.sampling.samplers import precision


@beside_runs()
@validated
def probe(
    model: Any,
    timesteps: Timesteps = 18,
    *,
    data: Data = None,
    states: States = "noised",
    layers: LayerSelection = "conv",
    stats: StatisticSelection = DEFAULT,
    per_channel: bool = False,
    n: PositiveInt = 256,
    batch_size: PositiveInt = 64,
    class_labels: Labels = None,
    seed: int = 0,
    start: NonNegativeInt = 0,
    device: str | torch.device | None = None,
    dtype: Precision = None,
    progress: bool = True,
) -> ProbeResult:
    """Measures how active each layer of a network is at each noise level.

    The same images with the same noise are seen at every noise level. Numbers do not depend on `batch_size` or on the
    number of processes, beyond float32 rounding: where torch.distributed is initialised, each process measures its part
    of the images and all return the whole, so all must call it. Memory does not grow with images, layers or noise
    levels, unless statistics compare levels and `batch_size` holds less than two images at all of them. The network is
    run in eval mode without gradients and left as it was. `estimate` takes the same arguments and says what this will
    cost.

    Args:
        model: A denoiser called as `model(x, sigma, class_labels)`: teacher, student, one of yours, or what
            `gddlab.wrap` makes of any other network; also compiled (it runs eagerly here) or in
            DistributedDataParallel.
        timesteps: Number of noise levels, 80 to 0.002 with rho = 7 (Karras et al. 2022, equation 5) within the
            network's range. In Python also the levels themselves, standard deviations on the scale of [-1, 1].
        data: Dataset or its name, for "noised" states; by default the one on the teacher's card.
        states: What the network sees: "noised", image + sigma * noise; "prior", sigma * noise; "trajectory", the states
            of Heun's sampler on its way from noise to image; "student", the one-step generator's input, 80 * noise at
            sigma 80 and nothing else.
        layers: "conv" (4-d weights), "block" (residual blocks), "attention", "norm", "linear", "all", a glob, or
            "re:...". In Python also a list, or a function of name and module.
        stats: Names of statistics. In Python also your own; see `gddlab.probing.STATISTICS` and `Statistic`. Of the
            default ones, "correlation" is NaN for n=1: one image has no covariance.
        per_channel: Keeps mean and variance of each channel too. In Python: `ProbeResult.channels`.
        n: Images; image i is at position `start` + i of the dataset's order under `seed`, its noise has seed
            `seed` + `start` + i.
        batch_size: Rows of one forward pass, images times noise levels. Statistics that compare noise levels need all
            levels of their images in one pass, even where that is more rows: of one image for "cosine", of 2 for
            "correlation", of 8 for "cka". An image without a partner counts for the other statistics alone.
        class_labels: For a conditional network: class ids, (n,), one id for all, or one-hot, (n, label_dim). None takes
            the images' labels, or the classes in turn where there are no images.
        seed: Of the images' order and the noise.
        start: Position of the first image; results of other images of the same seed add up with `ProbeResult.merge`.
        device: Where to run, such as cuda; by default where the network is, to which it returns.
        dtype: "bfloat16" or "float16" run the network under autocast; statistics are float32 and float64 all the same.
        progress: Shows a bar at a terminal.

    Returns:
        The table of values with standard errors over images, and sigma x sigma correlations.

    Raises:
        GddlabError: Unknown dataset, states, layers or statistics; noise levels outside of the network's range; more
            images than there are; labels or images that do not fit the network; a layer that cannot be measured.
    """
    inputs = Inputs(model, timesteps, data=data, states=states, n=n, start=start, seed=seed, class_labels=class_labels)
    measures, passes = _plan(model, inputs, layers, stats, per_channel, batch_size)
    total = len(passes) * len(measures)
    with (
        as_it_was(inputs.denoiser, device=device, dtype=dtype) as target,
        torch.no_grad(),
        progress_bar(total=total, desc="probing", unit="pass", enabled=progress) as bar,
    ):
        for measure in measures:
            with measure:
                for i, j in passes:
                    rows = inputs.rows(i, j, device=target, sigmas=measure.sigmas)
                    with measure.images(j - i):
                        inputs.denoiser(*rows)
                    bar.update()
        for measure in measures:
            _add_ranks(measure)
    meta = network_meta(model, measures[0].layers) | inputs.describe()
    meta["nonfinite"] = [b for m in measures for b in m.nonfinite()]
    meta["settings"] = {"dtype": precision(dtype)}
    warn_nonfinite(meta["nonfinite"], "activations")
    return ProbeResult.of(measures[0].layers, inputs.sigmas, stacked([m.statistics for m in measures]), meta)


def _plan(
    model: nn.Module,
    inputs: Inputs,
    layers: LayerSelection,
    stats: StatisticSelection,
    per_channel: bool,
    batch_size: int,
) -> tuple[list[Probe], list[tuple[int, int]]]:
    """A probe for each part of the noise levels, and first and last image of each pass of this process."""
    if isinstance(layers, Iterable) and not isinstance(layers, str):
        layers = list(layers)  # a generator can be read once, and each probe reads it
    chosen = statistic_classes(stats)
    group = max(s.group for s in chosen)
    if inputs.n < group and stats != DEFAULT:
        name = next(s.name for s in chosen if s.group == group)
        raise GddlabError(f"n={inputs.n} images: {name!r} compares {group} with each other, give n={group} or more")
    ranks = present_ranks()
    across = any(s.across for s in chosen)
    levels, passes = inputs.split(
        batch_size, group, together=across, images=share(inputs.n, group, ranks.rank, ranks.size)
    )
    wanted: StatisticSelection = DEFAULT if stats == DEFAULT else chosen
    return [Probe(model, part, layers=layers, stats=wanted, per_channel=per_channel) for part in levels], passes


def _add_ranks(measure: Probe) -> None:
    """Gives every process the sums of all."""
    ranks = present_ranks()
    if ranks.size > 1:
        states = ranks.gather_objects(measure.state())
        measure.reset()
        for state in states:  # in the order of ranks on every rank, so that all get the same digits
            measure.add(state)


# What it would cost.


@dataclass(frozen=True)
class Estimate:
    """Time and memory of a probe, measured on one pass.

    Attributes:
        seconds: All passes, at the pace of the one measured.
        seconds_bare: The same without hooks.
        peak_mib: Memory that a pass adds to what the process holds, MiB. It does not grow with images.
        passes, rows, layers, sigmas, n_images: Forward passes, rows of each, measured layers, noise levels, images.
    """

    seconds: float
    seconds_bare: float
    peak_mib: float
    passes: int
    rows: int
    layers: int
    sigmas: int
    n_images: int

    def __str__(self) -> str:
        seconds = f"{self.seconds:.2g} s" if self.seconds < 10 else f"{self.seconds:.0f} s"
        if self.seconds > 120:
            seconds = f"{self.seconds / 60:.0f} min"
        return (
            f"about {seconds}, {self.peak_mib:,.0f} MiB more memory: {self.layers} layers at "
            f"{self.sigmas} noise levels, {self.n_images} images, "
            f"{self.passes} pass{'' if self.passes == 1 else 'es'} of {self.rows} rows; "
            f"hooks cost {self.seconds / self.seconds_bare - 1:+.0%}"
        )


@beside_runs()
@validated
def estimate(
    model: Any,
    timesteps: Timesteps = 18,
    *,
    data: Data = None,
    states: States = "noised",
    layers: LayerSelection = "conv",
    stats: StatisticSelection = DEFAULT,
    per_channel: bool = False,
    n: PositiveInt = 256,
    batch_size: PositiveInt = 64,
    class_labels: Labels = None,
    seed: int = 0,
    start: NonNegativeInt = 0,
    device: str | torch.device | None = None,
    dtype: Precision = None,
) -> Estimate:
    """Estimates time and memory of `probe` with the same arguments, by measuring one pass.

    Raises:
        GddlabError: Whatever `probe` refuses.
    """
    inputs = Inputs(model, timesteps, data=data, states=states, n=n, start=start, seed=seed, class_labels=class_labels)
    measures, passes = _plan(model, inputs, layers, stats, per_channel, batch_size)
    measure, (i, j) = measures[0], passes[0] if passes else (0, 1)
    with as_it_was(inputs.denoiser, device=device, dtype=dtype) as target, torch.no_grad():
        began = time.perf_counter()
        rows = inputs.rows(i, j, device=target, sigmas=measure.sigmas)
        made = time.perf_counter() - began

        def bare() -> float:
            _wait(target)
            began = time.perf_counter()
            inputs.denoiser(*rows)
            _wait(target)
            return time.perf_counter() - began

        def hooked() -> float:
            with measure, measure.images(j - i):
                return bare()

        with peak_memory(target) as peak:
            hooked()  # also fills caches and chooses kernels, so that the next passes can be timed
        seconds_bare, seconds = bare(), hooked()
    total = len(passes) * len(measures)
    return Estimate(
        seconds=(seconds + made) * total,
        seconds_bare=(seconds_bare + made) * total,
        peak_mib=peak[0],
        passes=total,
        rows=len(rows[0]),
        layers=len(measure.layers),
        sigmas=len(inputs.sigmas),
        n_images=n,
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[list[float]]:
    """Yields a list, which afterwards holds by how many MiB memory rose inside."""
    out: list[float] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        yield out
        out.append((torch.cuda.max_memory_allocated(device) - held) / 2**20)
        return
    process, done = psutil.Process(), threading.Event()
    seen = [process.memory_info().rss]

    def watch() -> None:
        while not done.wait(0.002):
            seen[1:] = [max(seen[-1], process.memory_info().rss)]

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield out
    finally:
        done.set()
        thread.join()
    out.append((max(seen[-1], process.memory_info().rss) - seen[0]) / 2**20)
