"""`ablate`: what a network's denoising loses when one layer at a time is taken away."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gddlab.datasets import ImageDataset
from gddlab.errors import GddlabError, unknown
from gddlab.probing.edits import Change, spread, swapped, tapped
from gddlab.probing.hooks import Probe
from gddlab.probing.inputs import Inputs, Rows, as_it_was
from gddlab.probing.layers import Layer, LayerSelection, anatomy, named_layers, select_layers
from gddlab.probing.losses import WEIGHT, Effect, Effects, denoised, warn_of, weighted_error
from gddlab.probing.result import ProbeResult, network_meta
from gddlab.probing.statistics import ChannelMoments
from gddlab.probing.wrap import eager
from gddlab.progress import progress_bar
from gddlab.sampling.samplers import positive

__all__ = ["MODES", "ablate"]

MODES: Mapping[str, str] = {
    "mean": "its mean over images and pixels, of each channel, at the same sigma",
    "zero": "zeros",
    "resample": "its output for another image at the same sigma",
}
"""What an ablated output is replaced by."""


class AblationLoss(Effect):
    """Loss with the layer ablated minus the intact network's, for the same image and noise."""

    stem = "ablation_loss"
    template = (
        "increase of the denoising loss lambda(sigma) |D(x; sigma) - y|^2, mean over pixels, when the layer's output (of a block: its branch's "
        f"and its attention's) is replaced by {{how}}; {WEIGHT}; mean over images, paired"
    )
    axes = "channels, pixels; mean over images"
    unit = "EDM loss"


class AblationLossRatio(Effect):
    """From the losses with the layer ablated and of the intact network, (n, S, 2)."""

    stem = "ablation_loss_ratio"
    template = "mean denoising loss with the layer ablated over the intact network's; see ablation_loss_{way}; sem by the delta method"
    axes = "channels, pixels, images; ratio of means"
    unit = "ratio"

    def value(self, means: Tensor) -> Tensor:
        return means[:, 0] / means[:, 1]


class AblationOutput(Effect):
    """On the scale of what an EDM network adds at this sigma, c_out: small changes count at small sigma, as they do in the loss."""

    stem = "ablation_output"
    template = (
        "root of lambda(sigma) |D'(x; sigma) - D(x; sigma)|^2, mean over pixels, where in D' the layer's output (of a block: its branch's and "
        f"its attention's) is replaced by {{how}}; {WEIGHT}; mean over images"
    )
    axes = "root mean square over channels, pixels; mean over images"
    unit = "c_out"


class AblationLossMean(AblationLoss, way="mean", how=MODES["mean"]): ...


class AblationLossZero(AblationLoss, way="zero", how=MODES["zero"]): ...


class AblationLossResample(AblationLoss, way="resample", how=MODES["resample"]): ...


class AblationLossRatioMean(AblationLossRatio, way="mean"): ...


class AblationLossRatioZero(AblationLossRatio, way="zero"): ...


class AblationLossRatioResample(AblationLossRatio, way="resample"): ...


class AblationOutputMean(AblationOutput, way="mean", how=MODES["mean"]): ...


class AblationOutputZero(AblationOutput, way="zero", how=MODES["zero"]): ...


class AblationOutputResample(AblationOutput, way="resample", how=MODES["resample"]): ...


KINDS: Mapping[str, tuple[type[Effect], ...]] = {
    "mean": (AblationOutputMean, AblationLossMean, AblationLossRatioMean),
    "zero": (AblationOutputZero, AblationLossZero, AblationLossRatioZero),
    "resample": (AblationOutputResample, AblationLossResample, AblationLossRatioResample),
}


def ablate(
    model: nn.Module,
    timesteps: int | Sequence[float] | None = 18,
    layers: LayerSelection = "conv",
    mode: str = "mean",
    *,
    data: str | ImageDataset | None = None,
    states: str = "noised",
    n: int = 16,
    batch_size: int = 64,
    class_labels: Tensor | Sequence[int] | int | None = None,
    seed: int = 0,
    start: int = 0,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    progress: bool = True,
) -> ProbeResult:
    """Measures what each layer is needed for: takes one at a time away and runs the network again on the same images, noise and noise levels.

    A layer's output is replaced; of a residual block what its branch and its attention add, so that with "zero" its skip path remains. Numbers do not
    depend on `batch_size` beyond rounding, memory does not grow with images, noise levels or layers, and the network is left as it was.
    It takes as many forward passes over all rows as there are layers, and one or two more.

    Args:
        model: A denoiser called as `model(x, sigma, class_labels)`, as for `probe`.
        timesteps, data, states, n, class_labels, seed, start, device, dtype, progress: As in `probe`.
        layers: What is ablated, each on its own; presets, names, globs and so on, as in `probe`; "block" for residual blocks.
        mode: "mean" replaces an output by its mean over all `n` images and all pixels, of each channel, at the same sigma (a first pass measures
            it); "zero" by zeros; "resample" by its output for another image at the same sigma, images being swapped in pairs.
        batch_size: Rows of one forward pass, images times noise levels; with "resample" at least two.

    Returns:
        A row a layer, noise level and statistic, with standard errors over images: `ablation_output_MODE`, how much the denoised image
        changes; with "noised" states also `ablation_loss_MODE` and `ablation_loss_ratio_MODE`, how much the denoising loss grows,
        as a difference and as a factor. Exact definitions are in `meta["stats"]`. Results `join` with a probe of the same network.
        Those of other images `merge`, but for "mean", whose replacements are these images' own. `meta["nonfinite"]`
        lists layers and noise levels without a finite value.

    Raises:
        GddlabError: An unknown mode; an odd `n` with "resample"; a layer that does not run exactly once, or gives no tensor with a row an image and noise
            level; a network whose answer is no image; and whatever `probe` refuses.
    """
    if mode not in MODES:
        raise unknown("mode", mode, MODES)
    inputs = Inputs(model, timesteps, data=data, states=states, n=n, start=start, seed=seed, class_labels=class_labels)
    positive("batch_size", batch_size)
    group = 2 if mode == "resample" else 1
    if n % group:
        raise GddlabError(f'n={n}: mode="resample" swaps the images of each pair, give an even n')
    net, selected, modules = inputs.denoiser, select_layers(model, layers), named_layers(model)
    outputs = {layer.name: _outputs(layer, modules) for layer in selected}
    every = {part: None for parts in outputs.values() for part in parts}
    effects = Effects(selected, KINDS[mode] if states == "noised" else KINDS[mode][:1])
    levels, passes = inputs.split(batch_size, group)
    total = len(levels) * len(passes) * (len(selected) + (mode == "mean"))
    shapes: dict[str, torch.Size] = {}
    with (
        as_it_was(net, device=device, dtype=dtype) as target,
        torch.no_grad(),
        eager(model),
        progress_bar(total=total, desc="ablating", unit="pass", enabled=progress) as bar,
    ):
        for sigmas in levels:
            means: dict[str, Tensor] = {}
            if mode == "mean":
                with Probe(model, sigmas, layers=lambda name, _: name in every, stats=ChannelMoments) as measure:
                    for i, j in passes:
                        rows = inputs.rows(i, j, device=target, sigmas=sigmas)
                        with measure.images(j - i):
                            net(*rows)
                        bar.update()
                means = {k: by["channel_moments"].channels()["mean"] for k, by in measure.statistics.items()}
            for i, j in passes:
                rows = inputs.rows(i, j, device=target, sigmas=sigmas)
                clean = inputs.clean(i, j).to(target).repeat_interleave(len(sigmas), 0)
                with tapped(model, every, len(rows[0])) as shapes:  # every layer, to refuse early
                    intact = denoised(net, rows)
                before = weighted_error(intact, clean, sigmas)
                for layer in selected:
                    changes = _changes(model, net, rows, outputs[layer.name], mode, means, j - i)
                    with tapped(model, changes, len(rows[0])):
                        ablated = denoised(net, rows)
                    found = [weighted_error(ablated, intact, sigmas).sqrt()]
                    if states == "noised":
                        after = weighted_error(ablated, clean, sigmas)
                        found += [after - before, torch.stack([after, before], -1)]
                    effects.add(layer.name, sigmas, *found)
                    bar.update()
    sized = [_sized(layer, shapes[outputs[layer.name][0]]) for layer in selected]
    about: dict[str, Any] = {"tier": "ablation", "mode": mode}
    about["dtype"] = None if dtype is None else str(dtype).removeprefix("torch.")
    meta = network_meta(model, sized) | inputs.describe()
    meta |= {"settings": about, "nonfinite": effects.nonfinite("ablated")}
    warn_of(meta["nonfinite"])
    result = ProbeResult.of(sized, inputs.sigmas, effects.statistics, meta)
    # the means are of these images: adding others would mix two measurements, and merge refuses a result without sums
    return result.copy(statistics={}) if mode == "mean" else result


def _outputs(layer: Layer, modules: Mapping[str, nn.Module]) -> list[str]:
    """Whose outputs are replaced: the layer's; a block's are those of the last layers of its branch and of its attention."""
    parts = anatomy(modules[layer.name])
    if parts is None:
        return [layer.name]
    names = [f"{layer.name}.{part}" for part in (parts.branch, parts.attention) if part]
    return [name for name in names if name in modules]


def _changes(
    model: nn.Module, net: nn.Module, rows: Rows, parts: Sequence[str], mode: str, means: Mapping[str, Tensor], n: int
) -> dict[str, Change]:
    if mode == "zero":
        return dict.fromkeys(parts, torch.zeros_like)
    if mode == "mean":
        return {part: functools.partial(spread, means[part].repeat(n, 1)) for part in parts}
    if len(parts) == 1:
        return {parts[0]: functools.partial(swapped, n)}
    kept: dict[str, Tensor] = {}  # intact ones: an output that comes after an ablated one is no longer its own
    with tapped(model, {part: functools.partial(_keep, kept, part) for part in parts}):
        net(*rows)
    return {part: functools.partial(_instead, swapped(n, kept[part])) for part in parts}


def _keep(kept: dict[str, Tensor], part: str, output: Tensor) -> None:
    kept[part] = output.clone()


def _instead(value: Tensor, output: Tensor) -> Tensor:
    return value


def _sized(layer: Layer, shape: torch.Size) -> Layer:
    """With the resolution of its output, where its name does not say one."""
    known = layer.resolution is not None or len(shape) != 4
    return layer if known else dataclasses.replace(layer, resolution=shape[-2])
