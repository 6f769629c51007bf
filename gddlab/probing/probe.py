"""`probe`: statistics of a network's layers over noise levels; `estimate`: what that would cost."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import psutil
import torch
from pydantic import NonNegativeInt, PositiveInt, SkipValidation
from torch import nn

from gddlab.errors import GddlabError, unknown, validated, warn
from gddlab.probing.crossing import BLOCKS
from gddlab.probing.guard import as_it_was, warn_nonfinite
from gddlab.probing.hooks import Probe
from gddlab.probing.inputs import Data, Inputs, Labels, Precision, States, Timesteps, Told, Unit
from gddlab.probing.layers import LayerSelection
from gddlab.probing.null import Kind, null
from gddlab.probing.result import ProbeResult, network_meta, sites_meta
from gddlab.probing.sites import Calls, again, left_out
from gddlab.probing.statistics import DEFAULT, Statistic, StatisticSelection, stacked, statistic_classes
from gddlab.progress import progress_bar
from gddlab.ranks import present_ranks, share
from gddlab.runtime import beside_runs
from gddlab.sampling.samplers import precision

SIZES = (16, 32, 64, 128)
"""Rows of a pass that are tried where no number is given."""
Nulls = SkipValidation[Kind | Sequence[Kind] | None]


@beside_runs()
@validated
def probe(
    model: Any,
    timesteps: Timesteps = None,
    *,
    unit: Unit = "sigma",
    told: Told = None,
    data: Data = None,
    states: States = "noised",
    layers: LayerSelection = "conv",
    stats: StatisticSelection = DEFAULT,
    per_channel: bool = False,
    branch: str = "cond",
    stream: str = "image",
    calls: Calls = "each",
    nulls: Nulls = (),
    null_draws: PositiveInt = 3,
    n: PositiveInt = 256,
    batch_size: PositiveInt | None = 64,
    class_labels: Labels = None,
    seed: int = 0,
    start: NonNegativeInt = 0,
    device: str | torch.device | None = None,
    dtype: Precision = None,
    compile: bool = False,
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
            network's range. In Python also the levels themselves, standard deviations on the scale of [-1, 1], or None
            for 18 levels, 6 where each is told each.
        unit: Of the noise levels that are given: "sigma", or "t", the network's own time, of one that has a `path`:
            steps 0 to 999, or shares of noise. A number of noise levels is then equally spaced in time.
        told: What noise level the network is told. None means the input's own; "cross" tells it each level for each
            input, so that `effects` can say what a layer responds to. In Python also a level, or a list of levels, told
            for every input. The input is scaled as its own level asks.
        data: Dataset or its name, for "noised" states; by default the one on the teacher's card.
        states: What the network sees: "noised", image + sigma * noise; "prior", sigma * noise; "trajectory", the states
            of Heun's sampler on its way from noise to image; "student", the one-step generator's input, 80 * noise at
            sigma 80 and nothing else.
        layers: "conv" (4-d weights), "block" (residual and transformer blocks), "attention", "mlp", "modulation",
            "norm", "linear", "all", a glob, or "re:...". In Python also a list, or a function of name and module.
        stats: Names of statistics. In Python also your own; see `gddlab.probing.STATISTICS` and `Statistic`. Of the
            default ones, "correlation" is NaN for n=1: one image has no covariance.
        per_channel: Keeps mean and variance of each channel too. In Python: `ProbeResult.channels`.
        branch: Guidance branch that is measured, by the denoiser's own names, "cond" or "uncond"; "all" measures each.
        stream: Tokens that are measured where a layer holds several streams: "image", "context", or "all", each.
        calls: What is measured of a layer that runs several times in one call of the network: "each" run, the "mean"
            over them, the "first" or the "last" one.
        nulls: Kinds of null models that are measured on the same inputs, "init", "shuffled", "spectrum", see `null`;
            pictures show them, and `above_null` tests against them.
        null_draws: Null models of each kind; each costs as much as the network itself.
        n: Images; image i is at position `start` + i of the dataset's order under `seed`, its noise has seed
            `seed` + `start` + i.
        batch_size: Rows of one forward pass, images times noise levels. Statistics that compare noise levels need all
            levels of their images in one pass, even where that is more rows: of one image for "cosine", of 2 for
            "correlation", of 8 for "cka". An image without a partner counts for the other statistics alone.
            In Python also None: a few sizes are timed first, which costs up to a tenth, and the fastest is taken; its
            numbers then differ from call to call by float32 rounding.
        class_labels: For a conditional network: class ids, (n,), one id for all, or one-hot, (n, label_dim). None takes
            the images' labels, or the classes in turn where there are no images.
        seed: Of the images' order and the noise.
        start: Position of the first image; results of other images of the same seed add up with `ProbeResult.merge`.
        device: Where to run, such as cuda; by default where the network is, to which it returns.
        dtype: "bfloat16" or "float16" run the network under autocast; statistics are float32 and float64 all the same.
        compile: Reads activations by code that torch.compile makes, in one pass over memory; the network is not
            compiled. Numbers are the same but for rounding. Needs a C++ compiler on a CPU, Triton on a GPU. Compiling
            takes some 20 s once per machine and a few in later processes, so it is for long probes.
        progress: Shows a bar at a terminal.

    Returns:
        The table of values with standard errors over images, and sigma x sigma correlations; with `told` a column of
        that name beside `sigma`. A row is of a layer, or of one of its sites: `layer` is then the layer's name with
        "@2" for its second run in a call of the network, ":context" for another stream than the image's, ":uncond" for
        another branch than "cond", and `call`, `stream` and `branch` say the same. Layers that a preset or a glob
        brought and that do not run, or give no tensor, are left out with a warning; `meta["not_run"]` lists them.

    Raises:
        GddlabError: Unknown dataset, states, layers or statistics; noise levels outside of the network's range; more
            images than there are; labels or images that do not fit the network; a layer that cannot be measured;
            `compile` without a compiler.
    """
    asked: dict[str, Any] = {
        "timesteps": _again(timesteps),
        "unit": unit,
        "told": _again(told),
        "data": data,
        "states": states,
    }
    asked |= {"n": n, "start": start, "seed": seed, "class_labels": class_labels}
    inputs, kinds = Inputs(model, **asked), _null_kinds(nulls)
    blocks = BLOCKS if kinds or told is not None else 1
    where = _Where(branch, stream, calls)
    how = _How(again(layers), _again(stats), per_channel, batch_size, device, dtype, compile, where, blocks)
    how = _with_rows(model, inputs, how)
    networks = [(kind, draw) for kind in kinds for draw in range(null_draws)]
    with progress_bar(desc="probing", unit="pass", enabled=progress) as bar:
        result = _measured(model, inputs, how, bar, times=1 + len(networks))
        drawn: dict[str, tuple[ProbeResult, ...]] = {}
        for kind, draw in networks:
            other = null(model, kind, seed=draw)
            drawn[kind] = *drawn.get(kind, ()), _measured(other, Inputs(other, **asked), how, bar)
    return result.copy(nulls=drawn)


def _null_kinds(nulls: Nulls) -> list[Kind]:
    """Kinds of null models, each once."""
    listed: list[Any] = list(nulls or ()) if nulls is None or isinstance(nulls, Iterable) else [nulls]
    kinds = [nulls] if isinstance(nulls, str) else listed
    for kind in kinds:
        if kind not in get_args(Kind):
            raise unknown("kind of null model", kind, get_args(Kind))
    return list(dict.fromkeys(kinds))


def _again(argument: Any) -> Any:
    """An argument that can be read more than once, for several networks and parts of the noise levels."""
    return list(argument) if isinstance(argument, Iterator) else argument


class _Where(NamedTuple):
    """Which sites of layers are measured: see `probe`."""

    branch: str
    stream: str
    calls: Calls


class _How(NamedTuple):
    """How a network is measured: see `probe`. `blocks`: parts of the images whose sums are kept apart, if possible."""

    layers: LayerSelection
    stats: StatisticSelection
    per_channel: bool
    batch_size: int | None
    device: str | torch.device | None
    dtype: Precision
    compile: bool
    where: _Where
    blocks: int = 1


def _measured(model: nn.Module, inputs: Inputs, how: _How, bar: Any, *, times: int = 0) -> ProbeResult:
    """One network; `times` is how often as many passes will follow, for the bar, whose first user says so."""
    measures, passes = _plan(model, inputs, how)
    if times:
        bar.reset(total=times * len(measures) * sum(map(len, passes)))
    blocks: list[list[dict[str, dict[str, Statistic]]]] = []
    with as_it_was(inputs.denoiser, device=how.device, dtype=how.dtype) as target, torch.no_grad():
        states: list[list[dict[str, Any]]] = []
        for measure in measures:
            states.append([])
            with measure:
                for block in passes:
                    measure.reset()
                    for i, j in block:
                        rows, keyword = inputs.told_rows(i, j, device=target, sigmas=measure.sigmas)
                        with measure.images(j - i):
                            inputs.denoiser(*rows, **keyword)
                        bar.update()
                    states[-1].append(measure.state())
        for measure, found in zip(measures, states, strict=True):
            blocks.append(_add_ranks(measure, found))
    meta = network_meta(model, measures[0].planned) | inputs.describe() | sites_meta(measures[0].sites)
    if not_run := measures[0].not_run:
        meta["not_run"] = not_run
        if times:  # null models leave out the same
            warn(left_out(not_run))
    meta["nonfinite"] = [b for m in measures for b in m.nonfinite()]
    meta["settings"] = {"dtype": precision(how.dtype)}
    warn_nonfinite(meta["nonfinite"], "activations")
    whole = stacked([m.statistics for m in measures])
    parts = [stacked(list(part)) for part in zip(*blocks, strict=True)] if len(passes) > 1 else []
    return ProbeResult.of(measures[0].layers, inputs.sigmas, whole, meta, parts)


def _with_rows(model: nn.Module, inputs: Inputs, how: _How) -> _How:
    """With a number of rows where none is given: that of `SIZES` at which the bare network takes least time per row."""
    if how.batch_size is not None:
        return how
    pace: dict[int, float] = {}
    tried = [s for s in SIZES if s * 40 <= inputs.n * len(inputs.sigmas) * inputs.rows_per_level] or [64]
    with as_it_was(inputs.denoiser, device=how.device, dtype=how.dtype) as target, torch.no_grad():
        for size in tried if len(tried) > 1 else ():
            measures, blocks = _plan(model, inputs, how._replace(batch_size=size))
            first = next((span for block in blocks for span in block), None)
            if first is None:
                break  # no image is this process's: another one chooses
            rows, keyword = inputs.told_rows(*first, device=target, sigmas=measures[0].sigmas)
            for _ in range(2):  # the first also chooses kernels
                _wait(target)
                began = time.perf_counter()
                inputs.denoiser(*rows, **keyword)
                _wait(target)
                pace[size] = (time.perf_counter() - began) / len(rows[0])
    best = min(tried, key=lambda size: pace.get(size, 0.0))
    return how._replace(batch_size=present_ranks().gather_objects(best)[0])  # one plan for all processes


def _plan(model: nn.Module, inputs: Inputs, how: _How) -> tuple[list[Probe], list[list[tuple[int, int]]]]:
    """A probe for each part of the noise levels, and of each block first and last image of this process's passes."""
    chosen = statistic_classes(how.stats)
    group = max(s.group for s in chosen)
    if inputs.n < group and how.stats != DEFAULT:
        name = next(s.name for s in chosen if s.group == group)
        raise GddlabError(f"n={inputs.n} images: {name!r} compares {group} with each other, give n={group} or more")
    ranks = present_ranks()
    across = any(s.across for s in chosen)
    mine = share(inputs.n, group, ranks.rank, ranks.size)
    count = max(1, min(how.blocks, inputs.n // group))
    blocks = []
    for k in range(count):  # whatever the rows of a pass, and the number of processes
        first, last = share(inputs.n, group, k, count)
        images = max(first, mine[0]), min(last, mine[1])
        levels, passes = inputs.split(how.batch_size or 64, group, together=across, images=images)
        blocks.append(passes)
    wanted: StatisticSelection = DEFAULT if how.stats == DEFAULT else chosen
    same: dict[str, Any] = {"rows_per_level": inputs.rows_per_level, "layers": how.layers, "compile": how.compile}
    same |= how.where._asdict()
    probes = [Probe(model, s, stats=wanted, per_channel=how.per_channel, **same) for s in levels]
    return probes, blocks


def _add_ranks(measure: Probe, states: list[dict[str, Any]]) -> list[dict[str, dict[str, Statistic]]]:
    """Gives the probe of every process the sums of all blocks of all processes; returns those of each block."""
    every = list(zip(*present_ranks().gather_objects(states), strict=True))
    blocks = []
    for block in [*([b] for b in every), every]:
        measure.reset()
        for state in (s for part in block for s in part):  # in one order on every rank: all get the same digits
            measure.add(state)
        blocks.append(measure.statistics)
    return blocks[:-1]


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
    timesteps: Timesteps = None,
    *,
    unit: Unit = "sigma",
    told: Told = None,
    data: Data = None,
    states: States = "noised",
    layers: LayerSelection = "conv",
    stats: StatisticSelection = DEFAULT,
    per_channel: bool = False,
    branch: str = "cond",
    stream: str = "image",
    calls: Calls = "each",
    nulls: Nulls = (),
    null_draws: PositiveInt = 3,
    n: PositiveInt = 256,
    batch_size: PositiveInt | None = 64,
    class_labels: Labels = None,
    seed: int = 0,
    start: NonNegativeInt = 0,
    device: str | torch.device | None = None,
    dtype: Precision = None,
    compile: bool = False,
) -> Estimate:
    """Estimates time and memory of `probe` with the same arguments, by measuring one pass.

    Raises:
        GddlabError: Whatever `probe` refuses.
    """
    inputs = Inputs(
        model,
        timesteps,
        unit=unit,
        told=told,
        data=data,
        states=states,
        n=n,
        start=start,
        seed=seed,
        class_labels=class_labels,
    )
    kinds = _null_kinds(nulls)
    where = _Where(branch, stream, calls)
    how = _How(again(layers), _again(stats), per_channel, batch_size, device, dtype, compile, where)
    how = _with_rows(model, inputs, how)
    measures, (passes,) = _plan(model, inputs, how)
    measure, (i, j) = measures[0], passes[0] if passes else (0, 1)
    with as_it_was(inputs.denoiser, device=device, dtype=dtype) as target, torch.no_grad():
        began = time.perf_counter()
        rows, keyword = inputs.told_rows(i, j, device=target, sigmas=measure.sigmas)
        made = time.perf_counter() - began

        def bare() -> float:
            _wait(target)
            began = time.perf_counter()
            inputs.denoiser(*rows, **keyword)
            _wait(target)
            return time.perf_counter() - began

        def hooked() -> float:
            with measure, measure.images(j - i):
                return bare()

        with peak_memory(target) as peak:
            hooked()  # also fills caches and chooses kernels, so that the next passes can be timed
        seconds_bare, seconds = bare(), hooked()
    total = len(passes) * len(measures) * (1 + len(kinds) * null_draws)
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
