"""What a statistic is: numbers of each image, kept as sums, and a value with its error from their means.

Everything that a statistic keeps is a sum over images, so that batches, processes and runs add up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from gddlab.errors import GddlabError
from gddlab.probing.layers import Layer
from gddlab.probing.reductions import Tap, per_row

__all__ = ["PerImage", "Statistic"]


class Statistic:
    """A number a layer and noise level, from images that come in batches, with its standard error over images.

    The shortest statistic of your own is a name, what it means, and a function of rows:

        class Kurtosis(Statistic):
            name = "kurtosis"
            definition = "mean over images of the fourth standardised moment of a layer's output"
            axes = "moment over channels, pixels; mean over images"
            unit = "1"

            @staticmethod
            def reduce(x):  # (rows, C, H, W) -> (rows,)
                x = x.flatten(1) - x.flatten(1).mean(1, keepdim=True)
                return x.pow(4).mean(1) / x.square().mean(1).square()

        gddlab.probe(net, stats=("rms", Kurtosis))

    `reduce` runs inside the hook, on one batch. For more, override `taps` (what is read where), `quantities` (numbers an image, whose means are kept) and `value`
    (a function of these means; its error follows by the delta method).
    """

    name: ClassVar[str]
    definition: ClassVar[str]
    axes: ClassVar[str]
    unit: ClassVar[str]
    target: ClassVar[Literal["layer", "block"]] = "layer"
    """ "block" for a statistic of every residual block that holds a selected layer."""
    parts: ClassVar[tuple[str, ...]] = ()
    """Where a value is several numbers: what each is called after the name."""
    across: ClassVar[bool] = False
    """Whether it compares noise levels, so that all of them must lie in one pass."""
    group: ClassVar[int] = 1
    """Images that make one sample, and must lie in one pass; batches hold whole groups."""
    in_frame: ClassVar[bool] = True
    side: ClassVar[Literal["input", "output"]] = "output"
    """What `reduce` sees: a layer's output or its first input."""
    reduce: ClassVar[Callable[[Tensor], Tensor]]
    reduction: ClassVar[Any] = None
    """One of `gddlab.probing.reductions` in place of `reduce`; equal ones of several statistics are computed once."""
    kinds: ClassVar[dict[str, type[Statistic]]] = {}
    """Every statistic by module and class, so that saved sums find their meaning again."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        Statistic.kinds[cls.identity()] = cls

    @classmethod
    def identity(cls) -> str:
        return f"{cls.__module__}.{cls.__qualname__}"

    def __init__(self) -> None:
        self.samples = 0
        """How many the sums are over: images, or groups of them."""
        self.sums: dict[str, Tensor] = {}

    @property
    def n_images(self) -> int:
        return self.samples * self.group

    @classmethod
    def applies(cls, layer: Layer) -> bool:
        """Whether the statistic has a meaning for a layer."""
        return True

    @classmethod
    def taps(cls, layer: Layer, modules: Mapping[str, Any]) -> dict[str, Tap] | None:
        """What to read for `layer`, by role; None where the statistic has no meaning."""
        return {"x": Tap(layer.name, cls.side, cls.reduction or per_row(cls.reduce))} if cls.applies(layer) else None

    def update(self, **reduced: Tensor) -> None:
        """Adds a batch: float64 reductions by role."""
        q = self.quantities(**reduced)
        if q.ndim == 2:
            q = q[..., None]
        if type(self).value is Statistic.value and q.shape[2] != max(1, len(self.parts)):
            raise GddlabError(
                f"statistic {self.name!r} gives {q.shape[2]} numbers a row and names {len(self.parts)} parts: name as many, or override value"
            )
        self.samples += len(q)
        self.add(first=q.sum(0), second=torch.einsum("nsi,nsj->sij", q, q))

    def add(self, **sums: Tensor) -> None:
        for name, x in sums.items():
            self.sums[name] = self.sums[name] + x if name in self.sums else x

    def quantities(self, x: Tensor) -> Tensor:
        """Numbers of each image, (n, S) or (n, S, K)."""
        return x

    def value(self, means: Tensor) -> Tensor:
        """The statistic from the means of the quantities over images.  (S, K) -> (S,), or (S, P) with P `parts`"""
        return means if self.parts else means[:, 0]

    def merge(self, other: Statistic) -> None:
        """Adds what another instance has seen of other images at the same noise levels."""
        if type(other) is not type(self):
            raise GddlabError(f"{type(other).__name__} does not add to {type(self).__name__}: merge equal statistics")
        self.samples += other.samples
        self.add(**other.sums)

    def result(self) -> tuple[Tensor, Tensor]:
        """Value and standard error over images, (S,) each, or (S, P); the error of one image is NaN."""
        n = self.samples
        if not n:
            raise GddlabError(f"{self.name} has seen no image: measure a pass first")
        first, second = self.sums["first"], self.sums["second"]
        with torch.inference_mode(False), torch.enable_grad():
            means = (first.clone() / n).requires_grad_(True)  # a copy: sums made in inference mode take no gradient
            value = self.value(means)
            columns = value if value.ndim == 2 else value[:, None]
            # value is a function of its own noise level's means alone, so that one backward pass gives every row's slope
            slopes = [torch.autograd.grad(c.sum(), means, retain_graph=True)[0] for c in columns.unbind(1)]
        slope, mean = torch.stack(slopes, 1), means.detach()  # (S, P, K), (S, K)
        slope = torch.where(slope.isfinite(), slope, 0.0)  # the root's slope at 0, where nothing spreads
        if n > 1:
            covariance = (second / n - mean[:, :, None] * mean[:, None]) / (n - 1)
            sem = torch.einsum("spi,sij,spj->sp", slope, covariance, slope).clamp(min=0).sqrt()
        else:
            sem = torch.full_like(columns, torch.nan).detach()
        return value.detach(), sem if value.ndim == 2 else sem[:, 0]

    def matrix(self) -> Tensor | None:
        """Noise levels against each other, (S, S), where the statistic compares them."""
        return None

    def channels(self) -> dict[str, Tensor]:
        """Numbers of each channel, (S, C), by name."""
        return {}

    @classmethod
    def stack(cls, levels: Sequence[Self]) -> Self:
        """One instance of those that saw the same images at different noise levels."""
        out = cls.__new__(cls)
        out.__dict__.update(levels[0].__dict__)
        out.sums = {k: torch.cat([x.sums[k] for x in levels]) for k in levels[0].sums}
        return out

    @classmethod
    def describe(cls) -> dict[str, str]:
        return {
            "definition": cls.definition,
            "axes": cls.axes,
            "unit": cls.unit,
            "target": cls.target,
            "class": cls.identity(),
        }


class PerImage(Statistic):
    """Means over images of numbers that are computed elsewhere: `update(x=...)` takes them, (n, S)."""
