"""`attribute`: captum's layer attributions over noise levels, in the same table as everything else."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from gddlab.datasets import ImageDataset
from gddlab.errors import unknown
from gddlab.probing.hooks import Probe
from gddlab.probing.inputs import Inputs, as_it_was
from gddlab.probing.layers import LayerSelection, named_layers
from gddlab.probing.losses import WEIGHT, Effects, Noised, denoised, denoising_loss, differentiable, noised, warn_of
from gddlab.probing.reductions import mean, mean_magnitude
from gddlab.probing.result import ProbeResult, network_meta
from gddlab.probing.statistics import PerImage
from gddlab.probing.wrap import eager
from gddlab.progress import progress_bar
from gddlab.sampling.samplers import positive

__all__ = ["METHODS", "attribute"]

_LOSS = (
    f"f: the image's denoising loss lambda |D(x; sigma) - y|^2, mean over pixels, {WEIGHT}, or without images y the mean square of D(x; sigma); "
    "path: the line to the state x from its noise alone, sigma * noise, or without images from 0"
)


class Conductance(PerImage):
    name = "conductance"
    definition = (
        "mean over the layer's units of |c|, c the part of f's change along the path that goes through the unit (Dhamdhere et al. 2018; captum's "
        f"LayerConductance), mean of the way there and, negated, of the way back, so that captum's one-sided differences cancel; {_LOSS}"
    )
    axes = "mean over channels, pixels, images"
    unit = "EDM loss"


class ConductanceSum(PerImage):
    name = "conductance_sum"
    definition = "sum over the layer's units of c, see conductance"
    axes = "sum over channels, pixels; mean over images"
    unit = "EDM loss"


class ConductanceShare(PerImage):
    """From the sum over the layer and the change of the loss, (n, S, 2)."""

    name = "conductance_share"
    definition = (
        "conductance_sum over the change of f along the path, means over images of each, see conductance; 1, up to the error of a finite "
        "number of steps, for a layer through which everything passes; sem by the delta method"
    )
    axes = "sum over channels, pixels; ratio of means over images"
    unit = "share"

    def value(self, means: Tensor) -> Tensor:
        return means[:, 0] / means[:, 1]


class IntegratedGradients(PerImage):
    name = "integrated_gradients"
    definition = (
        "mean over the layer's units of |a|, a the integrated gradient of f by the unit, while the layer's output goes straight from its value at the "
        f"path's start to that at x and all else sees x (Sundararajan et al. 2017; captum's LayerIntegratedGradients); {_LOSS}"
    )
    axes = "mean over channels, pixels, images"
    unit = "EDM loss"


class IntegratedGradientsSum(PerImage):
    name = "integrated_gradients_sum"
    definition = "sum over the layer's units of a, see integrated_gradients: f less what f is when the layer's output at the path's start is put in"
    axes = "sum over channels, pixels; mean over images"
    unit = "EDM loss"


class CaptumActivation(PerImage):
    name = "captum_activation"
    definition = "mean absolute value of the layer's output, as captum's LayerActivation gives it"
    axes = "images, channels, pixels"
    unit = "activation"


METHODS: Mapping[str, tuple[type[PerImage], ...]] = {
    "LayerConductance": (Conductance, ConductanceSum, ConductanceShare),
    "LayerIntegratedGradients": (IntegratedGradients, IntegratedGradientsSum),
    "LayerActivation": (CaptumActivation,),
}
"""captum's classes, and the statistics made of their attributions."""


def attribute(
    model: nn.Module,
    timesteps: int | Sequence[float] | None,
    layers: LayerSelection,
    *,
    method: str = "LayerConductance",
    data: str | ImageDataset | None = None,
    states: str = "noised",
    n: int = 8,
    batch_size: int = 64,
    steps: int = 16,
    class_labels: Tensor | Sequence[int] | int | None = None,
    seed: int = 0,
    start: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> ProbeResult:
    """Attributes an image's denoising loss to the units of each layer, with captum.

    The loss is EDM's weighted one (Karras et al. 2022, equations 2 and 108), the baseline the same noise without the image; without images it is the mean square
    of the output, and the baseline is 0. Each layer takes `steps` forward and backward passes, conductance twice as many: choose few layers. The
    network runs in eval mode and its own precision and is left as it was; captum's hooks go, whatever is raised.

    Args:
        model: A denoiser, as for `probe`.
        timesteps, layers, data, states, n, class_labels, seed, start, device, progress: As for `probe`.
        method: "LayerConductance", "LayerIntegratedGradients" or "LayerActivation", captum's names.
        batch_size: Rows of one pass: images times noise levels times points of the path.
        steps: Steps of the path.

    Returns:
        By method: `conductance`, `conductance_sum`, `conductance_share`; `integrated_gradients`, `integrated_gradients_sum`; or `captum_activation`,
        with standard errors over images, defined in `meta["stats"]`. Results join with a probe of the same network, and those of other images merge.

    Raises:
        GddlabError: An unknown method; a layer that does not run exactly once, or gives no tensor; whatever `probe` refuses.
    """
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    inputs = Inputs(model, timesteps, data=data, states=states, n=n, start=start, seed=seed, class_labels=class_labels)
    points = {"LayerConductance": positive("steps", steps) + 1, "LayerIntegratedGradients": steps}.get(method, 1)
    levels, passes = inputs.split(max(1, positive("batch_size", batch_size) // points))
    piece = None if points <= batch_size else max(2, batch_size)  # conductance takes differences of two points
    net, modules = inputs.denoiser, named_layers(model)

    def loss(x: Tensor, sigma: Tensor, labels: Tensor | None, clean: Tensor | None) -> Tensor:
        if clean is None:
            return denoised(net, (x, sigma, labels)).square().mean((1, 2, 3))
        return denoising_loss(net, x, sigma, labels, clean)

    with as_it_was(net, device=device) as target, eager(model), differentiable(net):
        check = Probe(model, levels[0], layers=layers, stats="mean_abs")
        first = noised(inputs, 0, 1, sigmas=levels[0], device=target)
        with check, check.images(1), torch.no_grad():  # refuses layers that captum would misread
            denoised(net, first[:3])
        effects = Effects(check.layers, METHODS[method])
        total = len(levels) * len(passes) * len(check.layers)
        with progress_bar(total=total, desc="attributing", unit="layer", enabled=progress) as bar:
            for sigmas in levels:
                for i, j in passes:
                    rows = noised(inputs, i, j, sigmas=sigmas, device=target)
                    change = _change(loss, rows).reshape(j - i, -1)
                    for layer in check.layers:
                        found = _attributions(method, loss, modules[layer.name], rows, steps, piece)
                        found = found if found.dtype == torch.float64 else found.float()
                        numbers = [mean_magnitude(found, j - i).cpu().double()]
                        whole = mean(found, j - i).cpu().double() * found[0].numel()
                        numbers += [whole, torch.stack([whole, change], -1)]
                        effects.add(layer.name, sigmas, *numbers[: len(METHODS[method])])
                        bar.update()
    meta = network_meta(model, check.layers) | inputs.describe()
    meta |= {"settings": {"tier": "attribution", "method": method, "steps": steps}}
    meta["nonfinite"] = effects.nonfinite("attribution")
    warn_of(meta["nonfinite"])
    return ProbeResult.of(check.layers, inputs.sigmas, effects.statistics, meta)


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
    return found.detach()


@torch.no_grad()
def _change(loss: Callable[..., Tensor], rows: Noised) -> Tensor:
    """How the loss of each row changes along the path, (B,), float64, on the CPU."""
    rest = (rows.sigma, rows.labels, rows.clean)
    return (loss(rows.x, *rest) - loss(rows.origin, *rest)).cpu().double()
