"""`attribute`: captum's layer attributions over noise levels, in the same table as everything else."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from gddlab.errors import GddlabError, shown, validated, warn
from gddlab.probing.effects import WEIGHT, Effects, denoised, denoising_loss
from gddlab.probing.guard import as_it_was, differentiable, eager
from gddlab.probing.hooks import Probe
from gddlab.probing.inputs import Data, Inputs, Labels, Noised, States, Timesteps, Unit
from gddlab.probing.layers import Layer, LayerSelection, named_layers
from gddlab.probing.reductions import mean, mean_magnitude
from gddlab.probing.result import ProbeResult
from gddlab.probing.sites import Window, again, left_out, named_in
from gddlab.probing.statistics import PerImage, RatioOfMeans, declare
from gddlab.progress import progress_bar
from gddlab.runtime import beside_runs

Method = Literal["LayerConductance", "LayerIntegratedGradients", "LayerActivation"]

_LOSS = (
    f"f: the image's denoising loss lambda |D(x; sigma) - y|^2, mean over pixels, {WEIGHT}, or without images y the "
    "mean square of D(x; sigma); path: the line to the state x from its noise alone, sigma * noise, or without images "
    "from 0"
)

METHODS: Mapping[str, tuple[type[PerImage], ...]] = {
    "LayerConductance": (
        declare(
            PerImage,
            "conductance",
            "mean over the layer's units of |c|, c the part of f's change along the path that goes through the unit "
            "(Dhamdhere et al. 2018; captum's LayerConductance), mean of the way there and, negated, of the way back, "
            f"so that captum's one-sided differences cancel; {_LOSS}",
            axes="mean over channels, pixels, images",
            unit="EDM loss",
        ),
        declare(
            PerImage,
            "conductance_sum",
            "sum over the layer's units of c, see conductance",
            axes="sum over channels, pixels; mean over images",
            unit="EDM loss",
        ),
        declare(
            RatioOfMeans,
            "conductance_share",
            "conductance_sum over the change of f along the path, means over images of each, see conductance; 1, up to "
            "the error of a finite number of steps, for a layer through which everything passes; sem by the delta "
            "method",
            axes="sum over channels, pixels; ratio of means over images",
            unit="share",
        ),
    ),
    "LayerIntegratedGradients": (
        declare(
            PerImage,
            "integrated_gradients",
            "mean over the layer's units of |a|, a the integrated gradient of f by the unit, while the layer's output "
            "goes straight from its value at the path's start to that at x and all else sees x (Sundararajan et al. "
            f"2017; captum's LayerIntegratedGradients); {_LOSS}",
            axes="mean over channels, pixels, images",
            unit="EDM loss",
        ),
        declare(
            PerImage,
            "integrated_gradients_sum",
            "sum over the layer's units of a, see integrated_gradients: f minus the value of f when the layer's output "
            "at the path's start is put in",
            axes="sum over channels, pixels; mean over images",
            unit="EDM loss",
        ),
    ),
    "LayerActivation": (
        declare(
            PerImage,
            "captum_activation",
            "mean absolute value of the layer's output, as captum's LayerActivation gives it",
            axes="images, channels, pixels",
            unit="activation",
        ),
    ),
}
"""captum's classes, and the statistics made of their attributions."""


@beside_runs()
@validated
def attribute(
    model: Any,
    timesteps: Timesteps,
    layers: LayerSelection,
    *,
    method: Method = "LayerConductance",
    unit: Unit = "sigma",
    data: Data = None,
    states: States = "noised",
    n: PositiveInt = 8,
    batch_size: PositiveInt = 64,
    steps: PositiveInt = 16,
    class_labels: Labels = None,
    seed: int = 0,
    start: NonNegativeInt = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> ProbeResult:
    """Attributes an image's denoising loss to the units of each layer, with captum.

    The loss is EDM's weighted one (Karras et al. 2022, equations 2 and 108), the baseline the same noise without the
    image; without images it is the mean square of the output, and the baseline is 0. Each layer takes `steps` forward
    and backward passes, conductance twice as many: choose few layers. The network runs in eval mode and its own
    precision and is left as it was; captum's hooks are removed, whatever is raised.

    Args:
        model: A denoiser, as for `probe`.
        timesteps, layers, unit, data, states, n, class_labels, seed, start, device, progress: As for `probe`.
        method: "LayerConductance", "LayerIntegratedGradients" or "LayerActivation", captum's names.
        batch_size: Rows of one pass: images times noise levels times points of the path.
        steps: Steps of the path.

    Returns:
        By method: `conductance`, `conductance_sum`, `conductance_share`; `integrated_gradients`,
        `integrated_gradients_sum`; or `captum_activation`, with standard errors over images, defined in
        `meta["stats"]`. Results join with a probe of the same network, and those of other images merge.

    Raises:
        GddlabError: An unknown method; a named layer that does not run exactly once, or returns no tensor; several
            guidance branches; whatever `probe` refuses.
    """
    images: Any = {"n": n, "start": start, "seed": seed, "class_labels": class_labels}
    inputs = Inputs(model, timesteps, unit=unit, data=data, states=states, **images)
    points = {"LayerConductance": steps + 1, "LayerIntegratedGradients": steps}.get(method, 1)
    levels, passes = inputs.split(max(1, batch_size // points))
    piece = None if points <= batch_size else max(2, batch_size)  # conductance takes differences of two points
    net, modules = inputs.denoiser, named_layers(model)
    loss = functools.partial(denoising_loss, net)
    with as_it_was(net, device=device) as target, eager(model), differentiable(net):
        layers = again(layers)
        check = Probe(model, levels[0], layers=layers, stats="mean_abs", branch="all", stream="all")
        first = inputs.rows(0, 1, sigmas=levels[0], device=target)
        with check, check.images(1), torch.no_grad():  # refuses layers that captum would misread
            denoised(net, first)
        selected, not_run = _single(model, check, layers)
        effects = Effects(model, inputs, selected, METHODS[method])
        total = len(levels) * len(passes) * len(selected)
        with progress_bar(total=total, desc="attributing", unit="layer", enabled=progress) as bar:
            for sigmas in levels:
                for i, j in passes:
                    rows = inputs.noised(i, j, sigmas=sigmas, device=target)
                    rest = (rows.sigma, rows.labels, rows.clean)
                    with torch.no_grad():
                        change = (loss(rows.x, *rest) - loss(rows.origin, *rest)).cpu().double().reshape(j - i, -1)
                    for layer in selected:
                        found = _attributions(method, loss, modules[layer.name], rows, steps, piece)
                        found = found if found.dtype == torch.float64 else found.float()
                        whole = mean(found, j - i).cpu().double() * found[0].numel()
                        numbers = [mean_magnitude(found, j - i).cpu().double(), whole]
                        numbers.append(torch.stack([whole, change], -1))
                        effects.add(layer.name, sigmas, *numbers[: len(METHODS[method])])
                        bar.update()
    settings = {"tier": "attribution", "method": method, "steps": steps}
    return effects.result(side="attribution", settings=settings, not_run=not_run)


def _single(model: nn.Module, seen: Probe, layers: LayerSelection) -> tuple[list[Layer], dict[str, str]]:
    """Layers that run once and give one tensor, which captum reads right, and why others are left out."""
    branches = Window(model).names
    if len(branches) > 1:
        raise GddlabError(
            f"attributions are of one guidance branch, this denoiser has {', '.join(branches)}: wrap it without "
            "guidance="
        )
    why = dict(seen.not_run)
    for key, site in seen.sites.items():
        if key != site.layer or site.stream:
            why[site.layer] = "gives several streams" if site.stream else "ran twice in one pass"
    named = named_in(layers)
    for name in filter(named, why):
        raise GddlabError(f"layer {name!r} {why[name]}: leave it out of layers=")
    found = [layer for layer in seen.layers if layer.name in seen.sites and seen.sites[layer.name].layer not in why]
    if not found:
        raise GddlabError(f"layers={shown(layers)}: none of these runs once and gives one tensor, give others")
    if why:
        warn(left_out(why))
    return found, why


def _attributions(
    method: str, loss: Callable[..., Tensor], layer: nn.Module, rows: Noised, steps: int, piece: int | None
) -> Tensor:
    """What captum attributes to each unit of the layer's output, (B, ...)."""
    captum = getattr(importlib.import_module("captum.attr"), method)(loss, layer)
    extra = (rows.sigma, rows.labels, rows.clean)
    path = {"additional_forward_args": extra, "n_steps": steps, "internal_batch_size": piece}
    if method == "LayerActivation":
        found = captum.attribute(rows.x, additional_forward_args=extra)
    elif method == "LayerIntegratedGradients":
        found = captum.attribute(rows.x, rows.origin, method="gausslegendre", **path)
    else:
        there = captum.attribute(rows.x, rows.origin, method="riemann_trapezoid", **path).detach()
        found = (there - captum.attribute(rows.origin, rows.x, method="riemann_trapezoid", **path)) / 2
    return (found[0] if isinstance(found, tuple) else found).detach()
