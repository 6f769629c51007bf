"""What must change: how a loss pulls at the parameters of each layer, over noise levels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gddlab.datasets import ImageDataset
from gddlab.errors import GddlabError, unknown
from gddlab.probing.denoising import Noised, denoising_loss, differentiable, noised
from gddlab.probing.effects import warn_of
from gddlab.probing.gradient_statistics import KINDS, Filters, Level, filters_of
from gddlab.probing.inputs import Inputs, as_it_was
from gddlab.probing.layers import PRESETS, Layer, LayerSelection, denoiser_of, named_layers, select_layers
from gddlab.probing.result import ProbeResult, network_meta
from gddlab.probing.wrapping import eager
from gddlab.progress import progress_bar
from gddlab.sampling.samplers import positive

__all__ = ["Batch", "Loss", "grad_probe"]

Loss = Callable[[nn.Module, Any], Tensor]
"""(network, what a `Batch` holds) -> (), the mean over the batch's images."""


class Batch(NamedTuple):
    """Images at one noise level, of which one gradient is taken.

    Attributes:
        sigma: Their noise level.
        inputs: Whatever the loss takes.
        n: How many images.
    """

    sigma: float
    inputs: Any
    n: int = 1


def grad_probe(
    model: nn.Module,
    loss: Loss | str = "denoising",
    batches: Iterable[Batch] | None = None,
    *,
    layers: LayerSelection = "conv",
    timesteps: int | Sequence[float] | None = None,
    data: str | ImageDataset | None = None,
    n: int = 256,
    batch_size: int = 16,
    class_labels: Tensor | Sequence[int] | int | None = None,
    seed: int = 0,
    start: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> ProbeResult:
    """Measures how a loss pulls at the parameters of each layer, noise level by noise level.

        grad_probe(teacher, timesteps=6)  # the denoising loss at six noise levels
        grad_probe(net, lambda net, z: net(80 * z, 80.0).square().mean(), [Batch(80.0, z, len(z)) for z in noise])

    Gradients are of a layer's parameters, its children's too, frozen or not. Memory is that of one backward pass and a float64 copy of
    these parameters, whatever the number of batches and noise levels. The network runs in eval mode and its own precision; modes,
    `requires_grad` and `.grad` are afterwards as before.

    Args:
        model: A denoiser, as for `probe`; with a loss of your own, whatever that takes.
        loss: "denoising", EDM's weighted loss (Karras et al. 2022, equations 2 and 108), or a function, see `Loss`.
        batches: With a function, what it is taken of; batches of one noise level in a row.
        layers: As for `probe`.
        timesteps, data, n, class_labels, seed, start: With "denoising", as for `probe`: the same images with the same noise at every noise
            level; `n` is a multiple of `batch_size`.
        batch_size: With "denoising", images of a batch.
        device: Where to run; None means where the network is. Batches of your own must lie there.
        progress: Shows a bar at a terminal.

    Returns:
        `grad_norm_ratio`, `grad_snr`, `fisher` and `taylor`, defined in `meta["stats"]`; `n_images` counts the images of all batches. Where a
        gradient is not finite values are NaN, and a warning and `meta["nonfinite"]` say where. Such results join, but do not merge.

    Raises:
        GddlabError: What `probe` refuses; a layer without parameters, or that the loss does not depend on; a loss that is no scalar;
            batches of one sigma that come apart.
    """
    layers_of = _parameters(model, layers)
    inputs: Inputs | None = None
    if not callable(loss):
        if loss != "denoising":
            raise unknown("loss", loss, ("denoising",))
        if batches is not None:
            raise GddlabError('loss="denoising" makes its own batches: give n= and batch_size=, or a function as loss')
        if positive("n", n) % positive("batch_size", batch_size):
            raise GddlabError(f"n={n} images in batches of {batch_size}: give a multiple of batch_size")
        inputs = Inputs(model, timesteps, data=data, n=n, start=start, seed=seed, class_labels=class_labels)
    elif batches is None:
        raise GddlabError("loss is a function, but batches=None: give a list of Batch(sigma, inputs, n)")
    else:
        ours = {"timesteps": timesteps, "data": data, "class_labels": class_labels}
        if given := [name for name, value in ours.items() if value is not None]:
            raise GddlabError(f"{given[0]}= has no use with a loss of your own: leave it away")

    net, chosen = denoiser_of(model), {layer.name: filters for layer, filters in layers_of.items()}
    wanted = {p: name for name, filters in chosen.items() for group in filters for p in group}
    levels: dict[float, Level] = {}
    with as_it_was(net, device=device) as target, eager(model), differentiable(net, wanted):
        if inputs is not None:
            loss, batches, total = _mean_loss, _noised(inputs, batch_size, target), n // batch_size * len(inputs.sigmas)
        else:
            total = len(batches) if isinstance(batches, Sized) else 0
        assert callable(loss) and batches is not None
        with progress_bar(total=total, desc="gradients", unit="batch", enabled=progress) as bar:
            for sigma, level in itertools.groupby(map(_batch, batches), lambda b: b.sigma):
                if sigma in levels:
                    raise GddlabError(f"the batches of sigma {sigma:g} come apart: give those of one sigma in a row")
                levels[sigma] = Level(chosen)
                for batch in level:
                    levels[sigma].add(_gradients(loss(net, batch.inputs), wanted), batch.n)
                    bar.update()
                levels[sigma].close()
    if not levels:
        raise GddlabError("batches is empty: give at least one Batch(sigma, inputs, n)")

    sigmas = sorted(levels, reverse=True)
    images = {s: sum(levels[s].images) for s in sigmas}
    most = max(images.values())
    statistics = {
        name: {kind.name: kind([levels[s].values[name][k] for s in sigmas], most) for k, kind in enumerate(KINDS)}
        for name in chosen
    }
    about = {"data": None, "states": "given", "seed": None, "images": []} if inputs is None else inputs.describe()
    meta = network_meta(model, layers_of) | about | {"n_images": most}
    name = "denoising" if inputs is not None else getattr(loss, "__qualname__", type(loss).__name__)
    meta["settings"] = {"loss": name, "batches": [len(levels[s].images) for s in sigmas]}
    meta["nonfinite"] = [
        {"layer": layer, "side": "gradient", "sigma": s, "images": count}
        for s in sigmas
        for layer, count in levels[s].nonfinite.items()
    ]
    warn_of(meta["nonfinite"])
    result = ProbeResult.of(layers_of, sigmas, statistics, meta).copy(statistics={})
    result.frame["n_images"] = result.frame["sigma"].map(images)
    return result


def _parameters(model: nn.Module, layers: LayerSelection) -> dict[Layer, Filters]:
    """The selected layers with their parameters; a preset leaves out layers without any."""
    modules = named_layers(model)
    out: dict[Layer, Filters] = {}
    for layer in select_layers(model, layers):
        if filters := filters_of(modules[layer.name]):
            out[layer] = filters
        elif layers not in PRESETS:
            raise GddlabError(f"layer {layer.name!r} has no parameters: leave it out of layers=")
    if not out:
        raise GddlabError(f"layers={layers!r}: none of these has parameters, give others")
    return out


def _batch(item: Any) -> Batch:
    try:
        batch = Batch(*item)
        sigma = float(batch.sigma)
    except (TypeError, ValueError):
        raise GddlabError(f"a batch is a {type(item).__name__}: give Batch(sigma, inputs, n)") from None
    if not (math.isfinite(sigma) and sigma > 0):
        raise GddlabError(f"a batch has sigma {sigma:g}: give a number above 0")
    return batch._replace(sigma=sigma)


def _gradients(loss: Any, wanted: Mapping[nn.Parameter, str]) -> dict[Tensor, Tensor]:
    """Gradient of a batch's loss by parameter; `wanted` names the layer of each."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = str(tuple(loss.shape)) if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise GddlabError(f"loss gave {what}: return a scalar tensor, the mean over the batch's images")
    if not loss.requires_grad:
        raise GddlabError("the loss depends on none of the layers: compute it from the network that it is given")
    found = torch.autograd.grad(loss.reshape(()), list(wanted), allow_unused=True)
    for g, layer in zip(found, wanted.values(), strict=True):
        if g is None:
            raise GddlabError(f"the loss does not depend on all parameters of layer {layer!r}: leave it out of layers=")
    return dict(zip(wanted, found, strict=True))


def _noised(inputs: Inputs, size: int, device: torch.device) -> Iterator[Batch]:
    """The same batches at every noise level, one level after the other."""
    for sigma in inputs.sigmas:
        for i in range(0, inputs.n, size):
            yield Batch(sigma, noised(inputs, i, i + size, sigmas=[sigma], device=device), size)


def _mean_loss(net: nn.Module, batch: Noised) -> Tensor:
    assert batch.clean is not None
    return denoising_loss(net, batch.x, batch.sigma, batch.labels, batch.clean).mean()
