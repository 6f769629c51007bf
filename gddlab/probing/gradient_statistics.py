"""Statistics of gradients over batches: what is kept of each batch, and the numbers of a layer that come of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from gddlab.probing.reductions import double
from gddlab.probing.statistics import Statistic

__all__ = ["KINDS", "Filters", "GradientStatistic", "Level", "filters_of"]

Filters = Sequence[Sequence[nn.Parameter]]
"""Parameters of a layer; those with the same output channels, a weight and its bias, lie together."""


class GradientStatistic(Statistic):
    """Values of all batches together: no means over images, so that they do not merge."""

    def __init__(self, found: Sequence[tuple[float, float]] = (), n: int = 0) -> None:
        super().__init__()
        self.found, self.samples = found, n

    def result(self) -> tuple[Tensor, Tensor]:
        value, sem = torch.tensor(self.found, dtype=torch.float64).reshape(-1, 2).unbind(1)
        return value, sem


class GradientNormRatio(GradientStatistic):
    name = "grad_norm_ratio"
    definition = (
        "|mean of g| / |w|, g the gradient of a batch's loss with respect to the layer's parameters w, weight and bias together; sem is "
        "sqrt(trace of Cov g / batches) / |w|, the root mean square length of the mean gradient's error, which bounds the error of its norm"
    )
    axes = "mean over batches; Euclidean norms over parameters"
    unit = "loss / parameter^2"


class GradientSignalToNoise(GradientStatistic):
    name = "grad_snr"
    definition = (
        "|E g|^2 / trace of Cov g, g the gradient of a batch's loss; numerator, |mean of g|^2 - trace / batches, and denominator are unbiased, "
        "so that a layer without signal scatters around 0; proportional to the images of a batch; without a standard error"
    )
    axes = "moments over batches; norm and trace over parameters"
    unit = "ratio"


class Fisher(GradientStatistic):
    name = "fisher"
    definition = (
        "mean of |g|^2 / number of the layer's parameters, g the gradient of a batch's loss: the trace of the empirical Fisher information, a "
        "parameter, where a batch is one image and the loss a negative log-likelihood; sem over batches"
    )
    axes = "mean over batches, parameters"
    unit = "(loss / parameter)^2"


class Taylor(GradientStatistic):
    name = "taylor"
    definition = (
        "mean of (sum of g w over an output channel's weights and bias)^2, g the gradient of a batch's loss: the first-order change of the loss, "
        "squared, when the channel is removed (Molchanov et al. 2019, filters as groups); sem over batches"
    )
    axes = "sum over a channel's parameters; mean over channels, batches"
    unit = "loss^2"


KINDS = (GradientNormRatio, GradientSignalToNoise, Fisher, Taylor)


def filters_of(layer: nn.Module) -> Filters:
    """All parameters of a layer, its children's too, by module and number of output channels, their first dimension."""
    groups: dict[tuple[nn.Module, int], list[nn.Parameter]] = {}
    for module in layer.modules():
        for p in module.parameters(recurse=False):
            groups.setdefault((module, p.shape[0] if p.ndim else 1), []).append(p)
    return list(groups.values())


class Level:
    """One noise level: the sum of each layer's gradients, float64, and two numbers of each batch, until it is closed.

    Attributes:
        images: Images of each batch.
        values: By layer, value and standard error of each of `KINDS`, once closed.
        nonfinite: By layer, images of batches whose gradient is not finite, where there are such, once closed.
    """

    def __init__(self, layers: Mapping[str, Filters]):
        self.layers = layers
        self.images: list[int] = []
        self.values: dict[str, list[tuple[float, float]]] = {}
        self.nonfinite: dict[str, int] = {}
        self._sums = {p: double(torch.zeros_like(p)) for f in layers.values() for group in f for p in group}
        self._squares: dict[str, list[Tensor]] = {name: [] for name in layers}
        self._effects: dict[str, list[Tensor]] = {name: [] for name in layers}

    def add(self, gradients: Mapping[Tensor, Tensor], n: int) -> None:
        """Adds a batch of `n` images by its gradient, of each parameter."""
        self.images.append(n)
        for p, total in self._sums.items():
            total += gradients[p]
        for name, filters in self.layers.items():
            square, effects = [], []
            for group in filters:
                rows = [(double(gradients[p]).reshape(len(p) if p.ndim else 1, -1), p.detach()) for p in group]
                square += [g.square().sum() for g, _ in rows]
                effects.append(torch.stack([(g * w.reshape(g.shape)).sum(1) for g, w in rows]).sum(0))
            self._squares[name].append(torch.stack(square).sum())
            self._effects[name].append(torch.cat(effects).square().mean())

    def close(self) -> None:
        """Computes the values and lets go of the sums."""
        for name, filters in self.layers.items():
            params = [p for group in filters for p in group]
            squares, effects = (torch.stack(x[name]).cpu().double() for x in (self._squares, self._effects))
            b = len(squares)
            mean = _square([self._sums[p] / b for p in params])  # |mean g|^2
            norm = _square([double(p.detach()) for p in params]).sqrt()
            spread = (squares.sum() - b * mean).clamp(min=0) / (b - 1)  # trace of Cov g; NaN for one batch
            found = [
                (mean.sqrt() / norm, (spread / b).sqrt() / norm),
                ((mean - spread / b) / spread, mean.new_tensor(torch.nan)),
                _mean(squares / sum(p.numel() for p in params)),
                _mean(effects),
            ]
            bad = ~(squares.isfinite() & effects.isfinite())
            if bad.any():
                self.nonfinite[name] = int((bad * torch.tensor(self.images)).sum())
                self.values[name] = [(torch.nan, torch.nan)] * len(KINDS)
            else:
                self.values[name] = [(value.item(), sem.item()) for value, sem in found]
        self._sums, self._squares, self._effects = {}, {}, {}


def _square(vectors: Sequence[Tensor]) -> Tensor:
    """Squared length of tensors taken together.  -> (), float64, on the CPU"""
    return torch.stack([v.square().sum() for v in vectors]).sum().cpu().double()


def _mean(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard error over batches, NaN for one.  (B,) -> (), ()"""
    error = x.std() / len(x) ** 0.5 if len(x) > 1 else torch.tensor(torch.nan)
    return x.mean(), error
