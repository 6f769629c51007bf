"""`ablate`: what a network's denoising loses when one layer at a time is removed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from gddlab.errors import GddlabError, validated
from gddlab.probing.effects import Change, Effects, change_statistics, denoised, tapped, weighted_error
from gddlab.probing.guard import as_it_was, eager
from gddlab.probing.hooks import Probe
from gddlab.probing.inputs import Data, Inputs, Labels, Precision, Rows, States, Timesteps
from gddlab.probing.layers import Layer, LayerSelection, anatomy, named_layers, select_layers
from gddlab.probing.result import ProbeResult
from gddlab.probing.statistics import ChannelMoments, PerImage, RatioOfMeans, declare
from gddlab.progress import progress_bar
from gddlab.runtime import beside_runs

Mode = Literal["mean", "zero", "resample"]

MODES: Mapping[str, str] = {
    "mean": "its mean over images and pixels, of each channel, at the same sigma",
    "zero": "zeros",
    "resample": "its output for another image at the same sigma",
}
"""What replaces an output."""


def _statistics(mode: str) -> tuple[type[PerImage], ...]:
    """Change of the output; increase of the loss; the losses with and without the layer, as a ratio."""
    replaced = f"the layer's output (of a block: its branch's and its attention's) is replaced by {MODES[mode]}"
    ratio = declare(
        RatioOfMeans,
        f"ablation_loss_ratio_{mode}",
        "mean denoising loss with the layer ablated over the intact network's; see "
        f"ablation_loss_{mode}; sem by the delta method",
        axes="channels, pixels, images; ratio of means",
        unit="ratio",
    )
    return *change_statistics("ablation", mode, replaced), ratio


STATISTICS = {mode: _statistics(mode) for mode in MODES}


@beside_runs()
@validated
def ablate(
    model: Any,
    timesteps: Timesteps = 18,
    layers: LayerSelection = "conv",
    mode: Mode = "mean",
    *,
    data: Data = None,
    states: States = "noised",
    n: PositiveInt = 16,
    batch_size: PositiveInt = 64,
    class_labels: Labels = None,
    seed: int = 0,
    start: NonNegativeInt = 0,
    device: str | torch.device | None = None,
    dtype: Precision = None,
    progress: bool = True,
) -> ProbeResult:
    """Measures what each layer is needed for: removes one at a time and runs the network again on the same inputs.

    A layer's output is replaced; of a residual block, what its branch and its attention add, so that with "zero" its
    skip path remains. Numbers do not depend on `batch_size` beyond rounding, memory does not grow with images, noise
    levels or layers, and the network is left as it was. It takes one forward pass over all rows per layer, and one or
    two more.

    Args:
        model: A denoiser called as `model(x, sigma, class_labels)`, as for `probe`.
        timesteps, data, states, n, class_labels, seed, start, device, dtype, progress: As in `probe`.
        layers: What is ablated, each on its own; presets, names, globs and so on, as in `probe`; "block" for residual
            blocks.
        mode: "mean" replaces an output by its mean over all `n` images and all pixels, of each channel, at the same
            sigma (a first pass measures it); "zero" by zeros; "resample" by its output for another image at the same
            sigma, where images are swapped in pairs.
        batch_size: Rows of one forward pass, images times noise levels; with "resample" at least two.

    Returns:
        One row per layer, noise level and statistic, with standard errors over images: `ablation_output_MODE`, how much
        the denoised image changes; with "noised" states also `ablation_loss_MODE` and `ablation_loss_ratio_MODE`, how
        much the denoising loss grows, as a difference and as a factor. Exact definitions are in `meta["stats"]`.
        Results `join` with a probe of the same network. Those of other images `merge`, except for "mean", whose
        replacements are these images' own. `meta["nonfinite"]` lists layers and noise levels without a finite value.

    Raises:
        GddlabError: An unknown mode; an odd `n` with "resample"; a layer that does not run exactly once, or returns no
            tensor with one row per image and noise level; a network whose answer is no image; and whatever `probe`
            refuses.
    """
    inputs = Inputs(model, timesteps, data=data, states=states, n=n, start=start, seed=seed, class_labels=class_labels)
    group = 2 if mode == "resample" else 1
    if n % group:
        raise GddlabError(f'n={n}: mode="resample" swaps the images of each pair, give an even n')
    net, selected, modules = inputs.denoiser, select_layers(model, layers, run=True), named_layers(model)
    outputs = {layer.name: outputs_of(layer, modules) for layer in selected}
    every = {part: None for parts in outputs.values() for part in parts}
    effects = Effects(model, inputs, selected, STATISTICS[mode] if states == "noised" else STATISTICS[mode][:1])
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
                shown = inputs.noised(i, j, device=target, sigmas=sigmas)
                rows, clean = shown[:3], shown.clean
                with tapped(model, every, len(rows[0])) as shapes:  # every layer, to refuse early
                    intact = denoised(net, rows)
                before = None if clean is None else weighted_error(intact, clean, sigmas)
                for layer in selected:
                    changes = _changes(model, net, rows, outputs[layer.name], mode, means, j - i)
                    with tapped(model, changes, len(rows[0])):
                        ablated = denoised(net, rows)
                    found = [weighted_error(ablated, intact, sigmas).sqrt()]
                    if clean is not None and before is not None:
                        after = weighted_error(ablated, clean, sigmas)
                        found += [after - before, torch.stack([after, before], -1)]
                    effects.add(layer.name, sigmas, *found)
                    bar.update()
    effects.layers = [sized(layer, shapes[outputs[layer.name][0]]) for layer in selected]
    settings: dict[str, Any] = {"tier": "ablation", "mode": mode}
    settings["dtype"] = None if dtype is None else str(dtype).removeprefix("torch.")
    result = effects.result(side="ablated", settings=settings)
    # the means are of these images: to add others would mix two measurements, and merge refuses a result without sums
    return result.copy(statistics={}) if mode == "mean" else result


def outputs_of(layer: Layer, modules: Mapping[str, nn.Module]) -> list[str]:
    """Whose outputs are replaced: the layer itself; of a block, the last layers of its branch and of its attention."""
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
    kept: dict[str, Tensor] = {}  # of an intact pass: an output after an ablated one is no longer its own
    with tapped(model, {part: functools.partial(_keep, kept, part) for part in parts}):
        net(*rows)
    return {part: swapped(n, output) for part, output in kept.items()}


def _keep(kept: dict[str, Tensor], part: str, output: Tensor) -> None:
    kept[part] = output.clone()


def sized(layer: Layer, shape: torch.Size) -> Layer:
    """With the resolution of its output, where its name does not say one."""
    known = layer.resolution is not None or len(shape) != 4
    return layer if known else dataclasses.replace(layer, resolution=shape[-2])


def spread(mean: Float[Tensor, "rows c"], output: Float[Tensor, "rows ..."]) -> Float[Tensor, "rows ..."]:
    """Means of channels in the shape that expands over the pixels of `output`, or over the tokens of (B, T, C)."""
    return mean[:, None] if output.ndim == 3 else mean.reshape(*mean.shape, *[1] * (output.ndim - 2))


def swapped(n: int, output: Float[Tensor, "rows ..."]) -> Float[Tensor, "rows ..."]:
    """Exchanges the rows of images 2k and 2k + 1; `n` images."""
    return output.unflatten(0, (n // 2, 2, -1)).flip(1).flatten(0, 2)
