"""`probe`: statistics of a network's layers over noise levels."""

from __future__ import annotations

import contextlib
import resource
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from gddlab.datasets import ImageDataset
from gddlab.errors import GddlabError
from gddlab.probing.hooks import Probe
from gddlab.probing.inputs import Inputs, as_it_was
from gddlab.probing.layers import PRESETS, LayerSelection
from gddlab.probing.result import ProbeResult, network_meta
from gddlab.probing.statistics import DEFAULT, Statistic, StatisticSelection, statistic_classes
from gddlab.progress import progress_bar
from gddlab.ranks import present_ranks, share
from gddlab.sampling.samplers import positive, precision

__all__ = ["Estimate", "estimate", "peak_memory", "probe"]


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


def probe(
    model: nn.Module,
    timesteps: int | Sequence[float] | None = 18,
    *,
    data: str | ImageDataset | None = None,
    states: str = "noised",
    layers: LayerSelection = "conv",
    stats: StatisticSelection = DEFAULT,
    per_channel: bool = False,
    n: int = 256,
    batch_size: int = 64,
    class_labels: Tensor | Sequence[int] | int | None = None,
    seed: int = 0,
    start: int = 0,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    progress: bool = True,
    dry_run: bool = False,
) -> ProbeResult:
    """Measures how active each layer of a network is at each noise level.

    The same images with the same noise are seen at every noise level. Numbers do not depend on `batch_size` beyond
    float32 rounding, nor on the number of processes: where torch.distributed is initialised, each process measures its part of the images and
    all return the whole, so that all have to call it. Memory does not grow with images, layers or noise levels, but for more
    levels than `batch_size` where statistics compare them. The network is run in eval mode without gradients and left
    as it was.

    Args:
        model: A denoiser called as `model(x, sigma, class_labels)`: teacher, student, one of yours, or what `gddlab.wrap` makes of
            any other network; compiled (it runs eagerly here) or in DistributedDataParallel if you like.
        timesteps: A number of noise levels, 80 to 0.002 with rho = 7 (Karras et al. 2022, equation 5) within the
            network's range; or the levels themselves, standard deviations on the scale of images in [-1, 1].
        data: Dataset or its name, for "noised" states; None takes the one on the teacher's card.
        states: What the network sees: "noised", image + sigma * noise; "prior", sigma * noise; "trajectory", the states of Heun's sampler on its way
            from noise to image; "student", the one-step generator's input, 80 * noise at sigma 80 and nothing else.
        layers: "conv" (4-d weights), "block" (residual blocks), "attention", "norm", "linear", "all", a glob, "re:..." , a list, or a function of
            name and module.
        stats: Names of statistics, see `gddlab.probing.STATISTICS`, or statistics of your own, see `gddlab.probing.Statistic`.
        per_channel: Keeps mean and variance of each channel, `ProbeResult.channels`.
        n: Images; image i is at position `start` + i of the dataset's order under `seed`, its noise has seed `seed` + `start` + i.
        batch_size: Rows of one forward pass, images times noise levels. Statistics that compare noise levels ("cosine", "cka") need an
            image's noise levels in one pass, even where that is more rows; without these a pass holds no more.
        class_labels: For a conditional network: class ids, (n,), one id for all, or one-hot, (n, label_dim). None takes
            the images' labels, or deals classes in turn where there are no images.
        seed: Of the images' order and the noise.
        start: Position of the first image; results of other images of the same seed add up with `ProbeResult.merge`.
        device: Where to run; None means where the network is. The network returns to where it was.
        dtype: "bfloat16" or "float16" run the network under autocast; statistics are float32 and float64 all the same.
        progress: Shows a bar at a terminal.
        dry_run: Measures one pass and returns an `Estimate` of time and memory of the whole, in place of the result.

    Returns:
        The table of values with standard errors over images, and sigma x sigma cosines.

    Raises:
        GddlabError: Unknown dataset, states, layers or statistics; noise levels outside of the network's range; more
            images than there are; labels or images that do not fit the network; a layer that cannot be measured.
    """
    inputs = Inputs(model, timesteps, data=data, states=states, n=n, start=start, seed=seed, class_labels=class_labels)
    positive("batch_size", batch_size)
    layers = layers if isinstance(layers, str) or callable(layers) else _listed(layers)
    chosen: list[type[Statistic]] = statistic_classes(stats)
    group = max(s.group for s in chosen)
    if n < group:
        name = next(s.name for s in chosen if s.group == group)
        raise GddlabError(f"n={n} images: {name!r} compares {group} with each other, give n={group} or more")

    sigmas = inputs.sigmas
    across = any(s.across for s in chosen)
    ranks = present_ranks()
    levels, passes = inputs.split(batch_size, group, together=across, images=share(n, group, ranks.rank, ranks.size))
    wanted: StatisticSelection = DEFAULT if stats == DEFAULT else chosen
    measures = [Probe(model, part, layers=layers, stats=wanted, per_channel=per_channel) for part in levels]

    with as_it_was(inputs.denoiser, device=device, dtype=dtype) as target, torch.no_grad():
        if dry_run:
            cost = estimate(
                measures[0],
                inputs,
                passes[0] if passes else (0, min(n, group)),
                target,
                passes=len(passes) * len(levels),
            )
            return cost  # type: ignore[return-value]  # the one call in which a user wants no result
        total = len(passes) * len(levels)
        with progress_bar(total=total, desc="probing", unit="pass", enabled=progress) as bar:
            for measure in measures:
                with measure:
                    for i, j in passes:
                        x, sigma, labels = inputs.rows(i, j, device=target, sigmas=measure.sigmas)
                        with measure.images(j - i):
                            inputs.denoiser(x, sigma, labels)
                        bar.update()
        for measure in measures:
            _add_ranks(measure)
    meta = network_meta(model, measures[0].layers) | inputs.describe()
    meta["nonfinite"] = [b for m in measures for b in m.nonfinite()]
    meta["settings"] = {"dtype": precision(dtype)}
    result = ProbeResult.of(measures[0].layers, sigmas, _stacked(measures), meta)
    if bad := meta["nonfinite"]:
        places = ", ".join(f"{b['layer']} ({b['side']}) at sigma {b['sigma']:g}" for b in bad[:3])
        warnings.warn(f"activations are not finite in {len(bad)} places: {places}", RuntimeWarning, stacklevel=2)
    return result


def _add_ranks(measure: Probe) -> None:
    """Gives every process the sums of all."""
    ranks = present_ranks()
    if ranks.size > 1:
        states = ranks.gather_objects(measure.state())
        measure.reset()
        for state in states:  # in the order of ranks on every rank, so that all get the same digits
            measure.add(state)


def _stacked(measures: Sequence[Probe]) -> dict[str, dict[str, Statistic]]:
    """Statistics over all noise levels from probes of a part of them each."""
    first = measures[0].statistics
    if len(measures) == 1:
        return first
    return {
        layer: {name: type(stat).stack([m.statistics[layer][name] for m in measures]) for name, stat in by.items()}
        for layer, by in first.items()
    }


def _listed(layers: Iterable[str]) -> list[str]:
    """A generator is gone through once, the selection several times."""
    if not isinstance(layers, Iterable):
        raise GddlabError(
            f"layers={layers!r}: give a name, a glob, 're:...', a list, a function, or one of {', '.join(PRESETS)}"
        )
    return list(layers)
