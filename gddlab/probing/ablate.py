"""`ablate`: what a network's denoising loses when one layer at a time is removed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from gddlab.errors import GddlabError, validated
from gddlab.probing.effects import (
    AtSite,
    Change,
    Effects,
    change_statistics,
    denoised,
    keep,
    tapped,
    that_run,
    weighted_error,
)
from gddlab.probing.guard import as_it_was, eager
from gddlab.probing.hooks import Probe
from gddlab.probing.inputs import Data, Inputs, Labels, Precision, Rows, States, Timesteps, Unit
from gddlab.probing.layers import Layer, LayerSelection, anatomy, branches_in, inventory, named_layers, select_layers
from gddlab.probing.result import ProbeResult
from gddlab.probing.sites import again, channel_axis, layer_of, spread
from gddlab.probing.statistics import ChannelMoments, PerImage, RatioOfMeans, declare
from gddlab.progress import progress_bar
from gddlab.runtime import beside_runs
from gddlab.sampling.samplers import precision

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
    unit: Unit = "sigma",
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
        timesteps, unit, data, states, n, class_labels, seed, start, device, dtype, progress: As in `probe`.
        layers: What is ablated, each on its own; presets, names, globs and so on, as in `probe`; "block" for residual
            blocks. A layer is ablated wherever it gives something: in each of its runs, each stream of tokens and each
            guidance branch; "name@2" means its second run, "name:context" a stream, "name:uncond" a branch alone.
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
        GddlabError: An unknown mode; an odd `n` with "resample"; a named layer that does not run, one that returns no
            tensor with one row per image and noise level; a network whose answer is no image; and whatever `probe`
            refuses.
    """
    images: Any = {"n": n, "start": start, "seed": seed, "class_labels": class_labels}
    inputs = Inputs(model, timesteps, unit=unit, data=data, states=states, **images)
    group = 2 if mode == "resample" else 1
    if n % group:
        raise GddlabError(f'n={n}: mode="resample" swaps the images of each pair, give an even n')
    layers = again(layers)
    net, selected, modules = inputs.denoiser, select_sites(model, layers), named_layers(model)
    outputs = {layer.name: outputs_of(layer, modules) for layer in selected}
    not_run: dict[str, str] = {}
    levels, passes = inputs.split(batch_size, group)
    error = functools.partial(weighted_error, sigma_data=inputs.sigma_data)
    shapes: dict[str, torch.Size] = {}
    with (
        as_it_was(net, device=device, dtype=dtype) as target,
        torch.no_grad(),
        eager(model),
        progress_bar(desc="ablating", unit="pass", enabled=progress) as bar,
    ):
        one = inputs.rows(0, 1, device=target, sigmas=levels[0])
        selected, not_run = that_run(model, one, selected, layers, outputs)
        every = {part: None for layer in selected for part in outputs[layer.name]}
        effects = Effects(model, inputs, selected, STATISTICS[mode] if states == "noised" else STATISTICS[mode][:1])
        bar.reset(total=len(levels) * len(passes) * (len(selected) + (mode == "mean")))
        for sigmas in levels:
            means: dict[str, Tensor] = {}
            if mode == "mean":
                with all_sites(model, sigmas, every) as measure:
                    for i, j in passes:
                        rows = inputs.rows(i, j, device=target, sigmas=sigmas)
                        with measure.images(j - i):
                            net(*rows)
                        bar.update()
                means = means_of(measure)
            for i, j in passes:
                shown = inputs.noised(i, j, device=target, sigmas=sigmas)
                rows, clean = shown[:3], shown.clean
                with tapped(model, every, len(rows[0])) as ran:  # every layer, to refuse early
                    intact = denoised(net, rows)
                shapes |= ran
                before = None if clean is None else error(intact, clean, sigmas)
                for layer in selected:
                    changes = changes_of(model, net, rows, ran.sites, outputs[layer.name], mode, means, j - i)
                    with tapped(model, changes, len(rows[0])):
                        ablated = denoised(net, rows)
                    found = [error(ablated, intact, sigmas).sqrt()]
                    if clean is not None and before is not None:
                        after = error(ablated, clean, sigmas)
                        found += [after - before, torch.stack([after, before], -1)]
                    effects.add(layer.name, sigmas, *found)
                    bar.update()
    effects.layers = [sized(layer, shapes[outputs[layer.name][0]]) for layer in selected]
    settings: dict[str, Any] = {"tier": "ablation", "mode": mode}
    settings["dtype"] = precision(dtype)
    result = effects.result(side="ablated", settings=settings, not_run=not_run)
    # the means are of these images: to add others would mix two measurements, and merge refuses a result without sums
    return result.copy(statistics={}) if mode == "mean" else result


def select_sites(model: nn.Module, layers: LayerSelection) -> list[Layer]:
    """The layers that `layers` names, and parts of what a layer gives, by what `Sites` describes.

    Raises:
        GddlabError: Nothing matches, as for `select_layers`.
    """
    if callable(layers):
        return select_layers(model, layers, run=True)
    known, modules = inventory(model), named_layers(model)
    listed = [layers] if isinstance(layers, str) else layers
    if not isinstance(listed, Iterable):
        return select_layers(model, layers, run=True)
    items = list(listed)
    keys = [x for x in items if isinstance(x, str) and x not in known and layer_of(x, modules) in known]
    rest = [x for x in items if x not in keys]
    found = select_layers(model, rest if not isinstance(layers, str) else layers, run=True) if rest or not keys else []
    single = [dataclasses.replace(known[layer_of(key, modules)], name=key) for key in dict.fromkeys(keys)]
    order = {name: i for i, name in enumerate(known)}
    return sorted([*found, *single], key=lambda layer: order[layer_of(layer.name, modules)])


def outputs_of(layer: Layer, modules: Mapping[str, nn.Module]) -> list[str]:
    """Whose outputs are replaced: the layer itself; of a block, the last layers of its branch and of its attention.

    Of a transformer block, its attentions and its MLP, of both streams.
    """
    name = layer_of(layer.name, modules)
    parts, module = anatomy(modules[name]), modules[name]
    if inside := branches_in(module):
        names = [f"{name}.{child}" for child in inside]
    elif parts is None:
        return [layer.name]
    else:
        names = [f"{name}.{part}" for part in (parts.branch, parts.attention) if part]
    return [part + layer.name.removeprefix(name) for part in names if part in modules]


def changes_of(
    model: nn.Module,
    net: nn.Module,
    rows: Rows,
    sites: Mapping[str, Sequence[str]],
    parts: Sequence[str],
    mode: str,
    means: Mapping[str, Tensor],
    n: int,
) -> dict[str, Change]:
    """What `tapped` puts in the place of `parts`, the outputs of one layer, in a pass over `rows` of `n` images.

    Args:
        sites: Keys of their sites, as `tapped` saw them in an intact pass.
        means: By key of the site, of each channel at each noise level of a row, (S, C); for mode "mean".
    """
    if mode == "zero":
        return dict.fromkeys(parts, torch.zeros_like)
    if mode == "mean":
        modules = named_layers(model)
        axes = {part: channel_axis(modules[layer_of(part, modules)]) for part in parts}

        def mean_at(axis: int | None, output: Tensor, key: str) -> Tensor:
            return spread(means[key].repeat(n, 1), output, axis)

        return {part: AtSite(functools.partial(mean_at, axis)) for part, axis in axes.items()}
    if len({key for part in parts for key in sites.get(part, [part])}) == 1:
        return {parts[0]: functools.partial(swapped, n)}
    kept: dict[str, Tensor] = {}  # of an intact pass: an output after an ablated one is no longer its own
    with tapped(model, dict.fromkeys(parts, keep(kept))):
        net(*rows)
    return dict.fromkeys(parts, AtSite(lambda output, key: swapped(n, kept[key])))


def all_sites(model: nn.Module, sigmas: Sequence[float], parts: Collection[str]) -> Probe:
    """Measures the channel means of every site of layers; `parts` are names or keys."""
    modules = named_layers(model)
    names = {layer_of(part, modules) for part in parts}
    where: Any = {"branch": "all", "stream": "all", "calls": "each"}
    return Probe(model, sigmas, layers=lambda name, _: name in names, stats=ChannelMoments, **where)


def means_of(probe: Probe) -> dict[str, Float[Tensor, "s c"]]:
    """Means of channels by site, of what `all_sites` has measured."""
    return {key: by["channel_moments"].channels()["mean"] for key, by in probe.statistics.items()}


def sized(layer: Layer, shape: torch.Size) -> Layer:
    """With the resolution of its output, where its name does not say one."""
    known = layer.resolution is not None or len(shape) != 4
    return layer if known else dataclasses.replace(layer, resolution=shape[-2])


def swapped(n: int, output: Float[Tensor, "rows ..."]) -> Float[Tensor, "rows ..."]:
    """Exchanges the rows of images 2k and 2k + 1; `n` images."""
    return output.unflatten(0, (n // 2, 2, -1)).flip(1).flatten(0, 2)
