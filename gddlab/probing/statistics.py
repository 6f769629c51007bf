"""Statistics of activations over images and noise levels: arithmetic on the small tensors that reductions give."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from gddlab.probing.layers import Layer
from gddlab.probing.reductions import Tap

__all__ = ["DEFAULT", "STATISTICS", "Statistic"]


class Mean:
    """Mean over images and its standard error, from running sums, float64, (S,)."""

    def __init__(self) -> None:
        self.n = 0
        self.total: Tensor | float = 0.0
        self.square: Tensor | float = 0.0

    def update(self, x: Tensor) -> None:
        """x: (n, S), a value an image and noise level."""
        self.n += len(x)
        self.total = self.total + x.sum(0)
        self.square = self.square + x.square().sum(0)

    def merge(self, other: Mean) -> None:
        self.n += other.n
        self.total = self.total + other.total
        self.square = self.square + other.square

    def result(self) -> tuple[Tensor, Tensor]:
        """Mean, (S,), and its standard error, (S,); the latter is NaN for one image."""
        mean = torch.as_tensor(self.total) / self.n
        spread = (torch.as_tensor(self.square) / self.n - mean.square()).clamp(min=0)
        return mean, (spread / (self.n - 1)).sqrt() if self.n > 1 else torch.full_like(mean, torch.nan)


class Statistic(ABC):
    """One number a layer and noise level, from images that come in batches.

    A subclass says what it measures, where it reads (`taps`), and how batches are added up. `target` is "layer" for a
    statistic of every selected layer, "block" for one of every U-Net block that holds a selected layer.
    """

    name: ClassVar[str]
    definition: ClassVar[str]
    axes: ClassVar[str]
    unit: ClassVar[str]
    target: ClassVar[Literal["layer", "block"]] = "layer"

    @staticmethod
    @abstractmethod
    def taps(layer: Layer, modules: Mapping[str, Any]) -> dict[str, Tap] | None:
        """What to read for `layer`, by role; None where the statistic has no meaning."""

    def __init__(self) -> None:
        self.mean = Mean()

    @property
    def n_images(self) -> int:
        return self.mean.n

    @abstractmethod
    def update(self, **reduced: Tensor) -> None:
        """Adds a batch: float64 reductions by role, (n, S) or (n, S, S)."""

    def merge(self, other: Statistic) -> None:
        """Adds what another instance has seen of other images at the same noise levels."""
        self.mean.merge(other.mean)

    def result(self) -> tuple[Tensor, Tensor]:
        """Value and standard error over images, (S,) each."""
        return self.mean.result()

    @classmethod
    def describe(cls) -> dict[str, str]:
        return {"definition": cls.definition, "axes": cls.axes, "unit": cls.unit, "target": cls.target}


class RootMeanSquare(Statistic):
    name = "rms"
    definition = "square root of the mean over images of the mean square of the layer's output; sem by the delta method"
    axes = "images, channels, pixels"
    unit = "activation"

    @staticmethod
    def taps(layer: Layer, modules: Mapping[str, Any]) -> dict[str, Tap]:
        return {"x": Tap(layer.name, "output", "mean_square")}

    def update(self, **reduced: Tensor) -> None:
        self.mean.update(reduced["x"])

    def result(self) -> tuple[Tensor, Tensor]:
        mean, sem = self.mean.result()
        rms = mean.sqrt()
        return rms, torch.where(rms > 0, sem / (2 * rms), sem)


class MeanAbsolute(Statistic):
    name = "mean_abs"
    definition = "mean absolute value of the layer's output"
    axes = "images, channels, pixels"
    unit = "activation"

    @staticmethod
    def taps(layer: Layer, modules: Mapping[str, Any]) -> dict[str, Tap]:
        return {"x": Tap(layer.name, "output", "mean_magnitude")}

    def update(self, **reduced: Tensor) -> None:
        self.mean.update(reduced["x"])


class ActiveFraction(Statistic):
    """Reported only where the input is known to follow an activation: see `Layer.activated_input`."""

    name = "active_fraction"
    definition = "share of the layer's input above 0, for layers whose input is the output of SiLU"
    axes = "images, channels, pixels"
    unit = "share"

    @staticmethod
    def taps(layer: Layer, modules: Mapping[str, Any]) -> dict[str, Tap] | None:
        return {"x": Tap(layer.name, "input", "positive_share")} if layer.activated_input else None

    def update(self, **reduced: Tensor) -> None:
        self.mean.update(reduced["x"])


class RelativeUpdate(Statistic):
    name = "rel_update"
    definition = (
        "mean over images of |conv1(...)| / |skip path|, Euclidean norms of one image's activations; "
        "the skip path is the skip module's output, or the block's input where there is none"
    )
    axes = "norm over channels, pixels; mean over images"
    unit = "ratio"
    target = "block"

    @staticmethod
    def taps(layer: Layer, modules: Mapping[str, Any]) -> dict[str, Tap] | None:
        skip = modules[layer.name].skip is not None
        base = Tap(f"{layer.name}.skip", "output", "mean_square") if skip else Tap(layer.name, "input", "mean_square")
        return {"update": Tap(f"{layer.name}.conv1", "output", "mean_square"), "base": base}

    def update(self, **reduced: Tensor) -> None:
        self.mean.update((reduced["update"] / reduced["base"]).sqrt())  # equal shapes: the counts cancel


class RelativeAttentionUpdate(RelativeUpdate):
    name = "rel_update_attn"
    definition = (
        "mean over images of |proj(...)| / |x|, Euclidean norms of one image's activations; "
        "x is what the attention's output is added to, the input of norm2"
    )

    @staticmethod
    def taps(layer: Layer, modules: Mapping[str, Any]) -> dict[str, Tap] | None:
        if not modules[layer.name].num_heads:
            return None
        return {
            "update": Tap(f"{layer.name}.proj", "output", "mean_square"),
            "base": Tap(f"{layer.name}.norm2", "input", "mean_square"),
        }


class Cosine(Statistic):
    """Keeps the Gram matrix summed over images, and second moments of the three entries of the cosine for its error."""

    name = "cosine"
    definition = (
        "cosine between the layer's outputs at this sigma and at the largest one, for the same images and noise: "
        "G[s, t] / sqrt(G[s, s] G[t, t]), G[s, t] = sum over images of <a_s, a_t>; sem by the delta method"
    )
    axes = "images, channels, pixels"
    unit = "cosine"

    def __init__(self) -> None:
        super().__init__()
        self.gram: Tensor | float = 0.0
        self.moments: Tensor | float = 0.0

    @staticmethod
    def taps(layer: Layer, modules: Mapping[str, Any]) -> dict[str, Tap]:
        return {"g": Tap(layer.name, "output", "gram")}

    @staticmethod
    def _entries(g: Tensor) -> Tensor:
        """<a_s, a_0>, <a_s, a_s>, <a_0, a_0>: noise levels descend, so that 0 is the largest.  (..., S, S) -> (..., S, 3)"""
        diagonal = g.diagonal(dim1=-2, dim2=-1)
        return torch.stack([g[..., 0], diagonal, diagonal[..., :1].expand_as(diagonal)], -1)

    def update(self, **reduced: Tensor) -> None:
        g = reduced["g"]
        self.mean.n += len(g)
        self.gram = self.gram + g.sum(0)
        e = self._entries(g)
        self.moments = self.moments + torch.einsum("nsi,nsj->sij", e, e)

    def merge(self, other: Statistic) -> None:
        assert isinstance(other, Cosine)
        self.mean.n += other.mean.n
        self.gram = self.gram + other.gram
        self.moments = self.moments + other.moments

    def matrix(self) -> Tensor:
        """Cosines between all noise levels, (S, S)."""
        g = torch.as_tensor(self.gram)
        norm = g.diagonal().sqrt()
        return g / norm[:, None] / norm

    def result(self) -> tuple[Tensor, Tensor]:
        n = self.n_images
        cosine = self.matrix()[:, 0]
        if n < 2:
            return cosine, torch.full_like(cosine, torch.nan)
        mean = self._entries(torch.as_tensor(self.gram)) / n  # (S, 3)
        covariance = (torch.as_tensor(self.moments) / n - mean[:, :, None] * mean[:, None]) / (n - 1)
        yy, xx = mean[:, 1], mean[:, 2]
        slope = torch.stack([1 / (yy * xx).sqrt(), -cosine / (2 * yy), -cosine / (2 * xx)], -1)
        variance = torch.einsum("si,sij,sj->s", slope, covariance, slope)
        variance[0] = 0.0  # with itself
        return cosine, variance.clamp(min=0).sqrt()


STATISTICS: Mapping[str, type[Statistic]] = {
    s.name: s for s in (RootMeanSquare, MeanAbsolute, ActiveFraction, RelativeUpdate, RelativeAttentionUpdate, Cosine)
}
"""All statistics by name."""

DEFAULT = tuple(STATISTICS)
"""What `probe` measures unless told otherwise: one forward pass gives all of it."""
