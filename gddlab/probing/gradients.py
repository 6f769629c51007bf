"""`grad_probe`: how a loss pulls at the parameters of each layer, over noise levels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, NamedTuple

import torch
from pydantic import NonNegativeInt, PositiveInt, SkipValidation
from torch import Tensor, nn

from gddlab.errors import GddlabError, shown, unknown, validated, warn
from gddlab.nets.bare import denoiser_of
from gddlab.probing.effects import denoising_loss
from gddlab.probing.guard import as_it_was, differentiable, eager, warn_nonfinite
from gddlab.probing.inputs import Data, Inputs, Labels, Noised, Timesteps, Unit
from gddlab.probing.layers import PRESETS, Layer, LayerSelection, named_layers, select_layers
from gddlab.probing.reductions import double
from gddlab.probing.result import ProbeResult, network_meta
from gddlab.probing.sites import again, left_out, named_in
from gddlab.probing.statistics import Given, Statistic, declare
from gddlab.progress import progress_bar
from gddlab.runtime import beside_runs

STATISTICS = (
    declare(
        Given,
        "grad_norm_ratio",
        "|mean of g| / |w|, g the gradient of a batch's loss with respect to the layer's parameters w, weight and bias "
        "together; sem is sqrt(trace of Cov g / batches) / |w|, the root mean square length of the mean gradient's "
        "error, which bounds the error of its norm",
        axes="mean over batches; Euclidean norms over parameters",
        unit="loss / parameter^2",
    ),
    declare(
        Given,
        "grad_snr",
        "|E g|^2 / trace of Cov g, g the gradient of a batch's loss; numerator, |mean of g|^2 - trace / batches, and "
        "denominator are unbiased, so that a layer without signal scatters around 0; proportional to the images of a "
        "batch; without a standard error",
        axes="moments over batches; norm and trace over parameters",
        unit="ratio",
    ),
    declare(
        Given,
        "fisher",
        "mean of |g|^2 / number of the layer's parameters, g the gradient of a batch's loss: the trace of the "
        "empirical Fisher information per parameter, where a batch is one image and the loss a negative "
        "log-likelihood; sem over batches",
        axes="mean over batches, parameters",
        unit="(loss / parameter)^2",
    ),
    declare(
        Given,
        "taylor",
        "mean of (sum of g w over an output channel's weights and bias)^2, g the gradient of a batch's loss: the "
        "first-order change of the loss, squared, when the channel is removed (Molchanov et al. 2019, filters as "
        "groups); sem over batches",
        axes="sum over a channel's parameters; mean over channels, batches",
        unit="loss^2",
    ),
)

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


@beside_runs()
@validated
def grad_probe(
    model: Any,
    loss: SkipValidation[Loss | str] = "denoising",
    batches: SkipValidation[Iterable[Batch] | None] = None,
    *,
    layers: LayerSelection = "conv",
    timesteps: Timesteps = None,
    unit: Unit = "sigma",
    data: Data = None,
    n: PositiveInt = 256,
    batch_size: PositiveInt = 16,
    class_labels: Labels = None,
    seed: int = 0,
    start: NonNegativeInt = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> ProbeResult:
    """Measures how a loss pulls at the parameters of each layer, noise level by noise level.

        grad_probe(teacher, timesteps=6)  # the denoising loss at six noise levels
        grad_probe(net, lambda net, z: net(80 * z, 80.0).square().mean(), [Batch(80.0, z, len(z)) for z in noise])

    Gradients are of a layer's parameters, its children's too, frozen or not. Memory is that of one backward pass and a
    float64 copy of these parameters, whatever the number of batches and noise levels. The network runs in eval mode and
    its own precision; modes, `requires_grad` and `.grad` are afterwards as before.

    Args:
        model: A denoiser, as for `probe`; with a loss of your own, whatever that takes.
        loss: "denoising", EDM's weighted loss (Karras et al. 2022, equations 2 and 108), or a function, see `Loss`.
        batches: With a function, what it is taken of; batches of one noise level in succession.
        layers: As for `probe`.
        timesteps, unit, data, n, class_labels, seed, start: With "denoising", as for `probe`: the same images with the
            same noise at every noise level; `n` is a multiple of `batch_size`.
        batch_size: With "denoising", images of a batch.
        device: Where to run; None means where the network is. Batches of your own must be there.
        progress: Shows a bar at a terminal.

    Returns:
        `grad_norm_ratio`, `grad_snr`, `fisher` and `taylor`, defined in `meta["stats"]`; `n_images` counts the images
        of all batches. Where a gradient is not finite, values are NaN, and a warning and `meta["nonfinite"]` say where.
        Such results join, but do not merge.

    Raises:
        GddlabError: What `probe` refuses; a layer without parameters, or that the loss does not depend on; a loss that
            is no scalar; batches of one sigma that do not follow each other.
    """
    layers = again(layers)
    layers_of = _parameters(model, layers)
    inputs: Inputs | None = None
    if not callable(loss):
        if not (isinstance(loss, str) and loss == "denoising"):
            raise unknown("loss", loss, ("denoising",))
        if batches is not None:
            raise GddlabError('loss="denoising" makes its own batches: give n= and batch_size=, or a function as loss')
        if n % batch_size:
            raise GddlabError(f"n={n} images in batches of {batch_size}: give a multiple of batch_size")
        images: Any = {"n": n, "start": start, "seed": seed, "class_labels": class_labels}
        inputs = Inputs(model, timesteps, unit=unit, data=data, **images)
    elif batches is None:
        raise GddlabError("loss is a function, but batches=None: give a list of Batch(sigma, inputs, n)")
    else:
        ours = {
            "timesteps": timesteps,
            "unit": None if unit == "sigma" else unit,
            "data": data,
            "class_labels": class_labels,
        }
        if given := [name for name, value in ours.items() if value is not None]:
            raise GddlabError(f"{given[0]}= has no use with a loss of your own: omit it")

    net, name = denoiser_of(model), getattr(loss, "__qualname__", type(loss).__name__)
    wanted = {p: layer.name for layer, filters in layers_of.items() for group in filters for p in group}
    levels: dict[float, _Level] = {}
    named = named_in(layers)
    may_lack = {layer.name for layer in layers_of if not named(layer.name)}  # as the first batch shows
    not_run: dict[str, str] = {}
    with as_it_was(net, device=device) as target, eager(model), differentiable(net, wanted):
        if inputs is not None:
            loss, batches, name = _mean_loss, _noised(inputs, batch_size, target), "denoising"
            total = n // batch_size * len(inputs.sigmas)
        else:
            total = len(batches) if isinstance(batches, Sized) else 0
        assert callable(loss) and batches is not None
        with progress_bar(total=total, desc="gradients", unit="batch", enabled=progress) as bar:
            for sigma, level in itertools.groupby(map(_batch, batches), lambda b: b.sigma):
                if sigma in levels:
                    raise GddlabError(
                        f"the batches of sigma {sigma:g} are not in succession: give those of one sigma together"
                    )
                moments = _Moments(layers_of)
                for batch in level:
                    found, idle = _gradients(loss(net, batch.inputs), layers_of, may_lack)
                    may_lack = set()
                    if idle:
                        not_run = dict.fromkeys(idle, "has parameters that the loss does not depend on")
                        layers_of = {layer: filters for layer, filters in layers_of.items() if layer.name not in idle}
                        moments = _Moments(layers_of)
                    moments.add(found, batch.n)
                    bar.update()
                levels[sigma] = moments.result()
    if not levels:
        raise GddlabError("batches is empty: give at least one Batch(sigma, inputs, n)")
    about = {"data": None, "states": "given", "seed": None, "images": []} if inputs is None else inputs.describe()
    if not_run:
        about["not_run"] = not_run
        warn(left_out(not_run))
    about["settings"] = {"loss": name, "batches": [len(levels[s].images) for s in sorted(levels, reverse=True)]}
    return _table(model, list(layers_of), levels, about)


class _Level(NamedTuple):
    """Images of each batch of one noise level; by layer, value and standard error of each of `STATISTICS`, (4, 2), and
    images of batches whose gradient is not finite."""

    images: list[int]
    values: dict[str, Tensor]
    nonfinite: dict[str, int]


def _table(
    model: nn.Module, layers: Sequence[Layer], levels: Mapping[float, _Level], about: dict[str, Any]
) -> ProbeResult:
    sigmas = sorted(levels, reverse=True)
    images = {s: sum(levels[s].images) for s in sigmas}
    most = max(images.values())
    statistics: dict[str, dict[str, Statistic]] = {}
    for layer in layers:
        values = torch.stack([levels[s].values[layer.name] for s in sigmas])  # (S, 4, 2)
        statistics[layer.name] = {
            kind.name: kind(x[:, 0], x[:, 1], most) for kind, x in zip(STATISTICS, values.unbind(1), strict=True)
        }
    meta = network_meta(model, layers) | about | {"n_images": most}
    meta["nonfinite"] = [
        {"layer": layer, "side": "gradient", "sigma": s, "images": count}
        for s in sigmas
        for layer, count in levels[s].nonfinite.items()
        if count
    ]
    warn_nonfinite(meta["nonfinite"])
    result = ProbeResult.of(layers, sigmas, statistics, meta)
    result.frame["n_images"] = result.frame["sigma"].map(images)
    return result


Filters = Sequence[Sequence[nn.Parameter]]
"""Parameters of a layer; those with the same output channels, a weight and its bias, are one group."""


def _parameters(model: nn.Module, layers: LayerSelection) -> dict[Layer, Filters]:
    """The selected layers with their parameters; a preset omits layers without any."""
    modules = named_layers(model)
    out: dict[Layer, Filters] = {}
    for layer in select_layers(model, layers):
        if filters := _filters(modules[layer.name]):
            out[layer] = filters
        elif layers not in PRESETS:
            raise GddlabError(f"layer {layer.name!r} has no parameters: leave it out of layers=")
    if not out:
        raise GddlabError(f"layers={shown(layers)}: none of these has parameters, give others")
    return out


def _filters(layer: nn.Module) -> Filters:
    """All parameters of a layer, its children's too, by module and number of output channels, their first dimension."""
    groups: dict[tuple[nn.Module, int], list[nn.Parameter]] = {}
    for module in layer.modules():
        for p in module.parameters(recurse=False):
            groups.setdefault((module, p.shape[0] if p.ndim else 1), []).append(p)
    return list(groups.values())


class _Moments:
    """One noise level: the sum of each layer's gradients, float64, and two numbers of each batch."""

    def __init__(self, layers: Mapping[Layer, Filters]):
        self._layers = {layer.name: filters for layer, filters in layers.items()}
        self._images: list[int] = []
        self._sums = {p: double(torch.zeros_like(p)) for f in layers.values() for group in f for p in group}
        self._squares: dict[str, list[Tensor]] = {name: [] for name in self._layers}
        self._effects: dict[str, list[Tensor]] = {name: [] for name in self._layers}

    def add(self, gradients: Mapping[Tensor, Tensor], n: int) -> None:
        """Adds a batch of `n` images, given the gradient of each parameter."""
        self._images.append(n)
        for p, total in self._sums.items():
            total += gradients[p]
        for name, filters in self._layers.items():
            square, effects = [], []
            for group in filters:
                rows = [(double(gradients[p]).reshape(len(p) if p.ndim else 1, -1), p.detach()) for p in group]
                square += [g.square().sum() for g, _ in rows]
                effects.append(torch.stack([(g * w.reshape(g.shape)).sum(1) for g, w in rows]).sum(0))
            self._squares[name].append(torch.stack(square).sum())
            self._effects[name].append(torch.cat(effects).square().mean())

    def result(self) -> _Level:
        values, nonfinite = {}, {}
        for name, filters in self._layers.items():
            params = [p for group in filters for p in group]
            squares, effects = (torch.stack(x[name]).cpu().double() for x in (self._squares, self._effects))
            b = len(squares)
            mean = _square([self._sums[p] / b for p in params])  # |mean g|^2
            norm = _square([double(p.detach()) for p in params]).sqrt()
            spread = (squares.sum() - b * mean).clamp(min=0) / (b - 1) if b > 1 else mean * torch.nan  # trace of Cov g
            found = [
                *(mean.sqrt() / norm, (spread / b).sqrt() / norm),
                *((mean - spread / b) / spread, mean.new_tensor(torch.nan)),
                *_mean(squares / sum(p.numel() for p in params)),
                *_mean(effects),
            ]
            bad = ~(squares.isfinite() & effects.isfinite())
            nonfinite[name] = int((bad * torch.tensor(self._images)).sum())
            values[name] = torch.where(bad.any(), torch.nan, torch.stack(found)).reshape(-1, 2)
        return _Level(self._images, values, nonfinite)


def _square(vectors: Sequence[Tensor]) -> Tensor:
    """Squared length of tensors taken together.  -> (), float64, on the CPU"""
    return torch.stack([v.square().sum() for v in vectors]).sum().cpu().double()


def _mean(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard error over batches, NaN for one.  (B,) -> (), ()"""
    error = x.std() / len(x) ** 0.5 if len(x) > 1 else x.new_tensor(torch.nan)
    return x.mean(), error


def _batch(item: Any) -> Batch:
    try:
        batch = Batch(*item)
        sigma = float(batch.sigma)
    except (TypeError, ValueError):
        raise GddlabError(f"a batch is a {type(item).__name__}: give Batch(sigma, inputs, n)") from None
    if not (math.isfinite(sigma) and sigma > 0):
        raise GddlabError(f"a batch has sigma {sigma:g}: give a number above 0")
    return batch._replace(sigma=sigma)


def _gradients(
    loss: Any, layers: Mapping[Layer, Filters], may_lack: Collection[str] = ()
) -> tuple[dict[Tensor, Tensor], list[str]]:
    """Gradient of a batch's loss by parameter, and those of `may_lack` with parameters that it does not depend on."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = str(tuple(loss.shape)) if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise GddlabError(f"loss gave {what}: return a scalar tensor, the mean over the batch's images")
    if not loss.requires_grad:
        raise GddlabError("the loss depends on none of the layers: compute it from the network that it is given")
    wanted = {p: layer.name for layer, filters in layers.items() for group in filters for p in group}
    found = dict(zip(wanted, torch.autograd.grad(loss.reshape(()), list(wanted), allow_unused=True), strict=True))
    idle = []
    for layer, filters in layers.items():
        if any(found[p] is None for group in filters for p in group):
            if layer.name not in may_lack:
                raise GddlabError(
                    f"the loss does not depend on all parameters of layer {layer.name!r}: leave it out of layers="
                )
            idle.append(layer.name)
    if len(idle) == len(layers):
        raise GddlabError(f"the loss does not depend on all parameters of layer {idle[0]!r}: leave it out of layers=")
    return {p: g for p, g in found.items() if g is not None}, idle


def _noised(inputs: Inputs, size: int, device: torch.device) -> Iterator[Batch]:
    """The same batches at every noise level, level by level."""
    for sigma in inputs.sigmas:
        for i in range(0, inputs.n, size):
            yield Batch(sigma, inputs.noised(i, i + size, sigmas=[sigma], device=device), size)


def _mean_loss(net: nn.Module, batch: Noised) -> Tensor:
    assert batch.clean is not None
    return denoising_loss(net, batch.x, batch.sigma, batch.labels, batch.clean).mean()
