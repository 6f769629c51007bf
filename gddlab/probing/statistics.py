"""The statistics that come with gddlab: arithmetic on the small tensors that reductions give."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from gddlab.errors import GddlabError, unknown
from gddlab.probing.layers import Layer, anatomy
from gddlab.probing.reductions import (
    BANDS,
    GROUP,
    Tap,
    band_share,
    channel_mean,
    channel_square,
    channel_variance,
    gram,
    hsic,
    mean,
    mean_magnitude,
    mean_square,
    moments,
    positive_share,
)
from gddlab.probing.statistic import PerImage, Statistic

__all__ = [
    "DEFAULT",
    "STATISTICS",
    "ChannelMoments",
    "PerImage",
    "Statistic",
    "StatisticSelection",
    "statistic_classes",
]


class RootMeanSquare(Statistic):
    name = "rms"
    definition = "square root of the mean over images of the mean square of the layer's output; sem by the delta method"
    axes = "images, channels, pixels"
    unit = "activation"
    reduction = staticmethod(mean_square)

    def value(self, means: Tensor) -> Tensor:
        return means[:, 0].sqrt()


class MeanAbsolute(Statistic):
    name = "mean_abs"
    definition = "mean absolute value of the layer's output"
    axes = "images, channels, pixels"
    unit = "activation"
    reduction = staticmethod(mean_magnitude)


class Mean(Statistic):
    name = "mean"
    definition = "mean of the layer's output"
    axes = "images, channels, pixels"
    unit = "activation"
    reduction = staticmethod(mean)


class StandardDeviation(Statistic):
    name = "std"
    definition = (
        "standard deviation of the layer's output, over all of images, channels and pixels; sem by the delta method"
    )
    axes = "images, channels, pixels"
    unit = "activation"
    reduction = staticmethod(moments)

    def quantities(self, x: Tensor) -> Tensor:
        mean, within, _ = x.unbind(-1)
        return torch.stack([mean, mean.square() + within], -1)

    def update(self, **reduced: Tensor) -> None:
        super().update(**reduced)
        self.add(within=reduced["x"][..., 1].sum(0))

    def value(self, means: Tensor) -> Tensor:
        return (means[:, 1] - means[:, 0].square()).clamp(min=0).sqrt()

    def result(self) -> tuple[Tensor, Tensor]:
        """Variance within images and between their means, added: the difference of squares serves for the error alone."""
        _, sem = super().result()
        n = self.samples
        first, square = self.sums["first"][:, 0], self.sums["second"][:, 0, 0]
        between = (square / n - (first / n).square()).clamp(min=0)
        return (self.sums["within"] / n + between).sqrt(), sem


class ActiveFraction(Statistic):
    """Reported only where the input is known to follow an activation: see `Layer.activated_input`."""

    name = "active_fraction"
    definition = "share of the layer's input above 0, for layers whose input is the output of SiLU"
    axes = "images, channels, pixels"
    unit = "share"
    reduction = staticmethod(positive_share)
    side = "input"

    @classmethod
    def applies(cls, layer: Layer) -> bool:
        return layer.activated_input


class DeadChannels(Statistic):
    """Reported where `ActiveFraction` is."""

    name = "dead_channels"
    definition = (
        "share of the channels of the layer's input that stay near 0: root mean square over an image's pixels below 0.01 of that over "
        "all channels; mean over images; for layers whose input is the output of SiLU"
    )
    axes = "root mean square over pixels; share over channels; mean over images"
    unit = "share"
    threshold: ClassVar[float] = 0.01
    reduction = staticmethod(channel_square)
    side = "input"

    @classmethod
    def applies(cls, layer: Layer) -> bool:
        return layer.activated_input

    def quantities(self, x: Tensor) -> Tensor:
        near = x < self.threshold**2 * x.mean(-1, keepdim=True)
        share = near.to(x.dtype).mean(-1)
        return torch.where(x.isfinite().all(-1), share, torch.nan)


class RelativeUpdate(Statistic):
    name = "rel_update"
    definition = (
        "mean over images of |branch| / |skip path|, Euclidean norms of one image's activations; the branch is the output of the block's last "
        "convolution (conv1; conv2 in diffusers), the skip path is the skip module's output, or the block's input where there is none"
    )
    axes = "norm over channels, pixels; mean over images"
    unit = "ratio"
    target = "block"

    @classmethod
    def taps(cls, layer: Layer, modules: Mapping[str, Any]) -> dict[str, Tap] | None:
        parts = anatomy(modules[layer.name])
        if parts is None or parts.skip is None:
            return None
        skip = modules.get(f"{layer.name}.{parts.skip}")
        base = (
            Tap(layer.name, "input", mean_square)
            if skip is None
            else Tap(f"{layer.name}.{parts.skip}", "output", mean_square)
        )
        return {"update": Tap(f"{layer.name}.{parts.branch}", "output", mean_square), "base": base}

    def quantities(self, update: Tensor, base: Tensor) -> Tensor:  # type: ignore[override]
        return (update / base).sqrt()  # equal shapes: the counts cancel


class RelativeAttentionUpdate(RelativeUpdate):
    name = "rel_update_attn"
    definition = (
        "mean over images of |proj(...)| / |x|, Euclidean norms of one image's activations; "
        "x is what the attention's output is added to, the input of norm2"
    )

    @classmethod
    def taps(cls, layer: Layer, modules: Mapping[str, Any]) -> dict[str, Tap] | None:
        parts = anatomy(modules[layer.name])
        if parts is None or f"{layer.name}.{parts.attention}" not in modules:
            return None
        return {
            "update": Tap(f"{layer.name}.{parts.attention}", "output", mean_square),
            "base": Tap(f"{layer.name}.{parts.attention_base}", "input", mean_square),
        }


class _Likeness(Statistic):
    """m(s, t) / sqrt(m(s, s) m(t, t)) for a matrix m that is summed over images; t is the largest sigma in `result`."""

    unit = "similarity"
    across = True

    def update(self, **reduced: Tensor) -> None:
        super().update(**reduced)
        self.add(matrix=reduced["x"].sum(0))

    def quantities(self, x: Tensor) -> Tensor:
        """m(s, 0), m(s, s), m(0, 0): noise levels descend, so that 0 is the largest.  (n, S, S) -> (n, S, 3)"""
        diagonal = x.diagonal(dim1=-2, dim2=-1)
        return torch.stack([x[..., 0], diagonal, diagonal[..., :1].expand_as(diagonal)], -1)

    def value(self, means: Tensor) -> Tensor:
        cross, ss, tt = means.unbind(1)
        return cross / (ss * tt).sqrt()

    def result(self) -> tuple[Tensor, Tensor]:
        value, sem = super().result()
        sem = sem.clone()
        if self.samples > 1:
            sem[0] = torch.where(value[0].isfinite(), 0.0, sem[0])  # with itself: rounding is no spread
        return value, sem

    def matrix(self) -> Tensor:
        """Likeness between all noise levels, (S, S)."""
        m = self.sums["matrix"]
        norm = m.diagonal().sqrt()
        return m / norm[:, None] / norm


class Cosine(_Likeness):
    name = "cosine"
    definition = (
        "cosine between the layer's outputs at this sigma and at the largest one, for the same images and noise: "
        "G[s, t] / sqrt(G[s, s] G[t, t]), G[s, t] = sum over images of <a_s, a_t>; sem by the delta method"
    )
    axes = "images, channels, pixels"
    reduction = staticmethod(gram)


class CenteredKernelAlignment(_Likeness):
    name = "cka"
    definition = (
        "linear centred kernel alignment of the layer's outputs at this sigma and at the largest one: HSIC[s, t] / sqrt(HSIC[s, s] HSIC[t, t]), "
        f"unbiased HSIC within groups of {GROUP} images, averaged over whole groups (Nguyen et al. 2021, equation 3); sem over groups by the delta method; "
        "can be misled (arXiv:2210.16156)"
    )
    axes = "images, channels, pixels"
    group = GROUP
    reduction = staticmethod(hsic)


class SpectralShare(Statistic):
    name = "spectral_share"
    definition = (
        "share of the power of the layer's output in a band of radial frequency, 0 at the constant and 1 at the Nyquist frequency of an axis: "
        + ", ".join(f"{i} from {a:g} to {b:g}" for i, (a, b) in enumerate(itertools.pairwise(BANDS)))
        + "; share of one image over all channels, mean over images"
    )
    axes = "power over channels, frequencies; mean over images"
    unit = "share"
    parts = ("0", "1", "2", "3")
    reduction = staticmethod(band_share)

    @classmethod
    def applies(cls, layer: Layer) -> bool:
        return layer.type in ("conv", "block")


class ChannelMoments(Statistic):
    """Mean and variance of each channel, for `ProbeResult.channels`."""

    name = "channel_moments"
    definition = "mean and variance of each channel of the layer's output"
    axes = "images, pixels"
    unit = "activation"
    in_frame = False

    @classmethod
    def taps(cls, layer: Layer, modules: Mapping[str, Any]) -> dict[str, Tap] | None:
        return {"x": Tap(layer.name, "output", channel_mean), "within": Tap(layer.name, "output", channel_variance)}

    def update(self, **reduced: Tensor) -> None:
        x = reduced["x"]
        self.samples += len(x)
        self.add(mean=x.sum(0), square=x.square().sum(0), within=reduced["within"].sum(0))

    def channels(self) -> dict[str, Tensor]:
        """Variance within images and between their means, added: no difference of large numbers but for the means, which are float64."""
        mean = self.sums["mean"] / self.samples
        between = (self.sums["square"] / self.samples - mean.square()).clamp(min=0)
        return {"mean": mean, "var": self.sums["within"] / self.samples + between}


STATISTICS: Mapping[str, type[Statistic]] = {
    s.name: s
    for s in (
        RootMeanSquare,
        MeanAbsolute,
        Mean,
        StandardDeviation,
        ActiveFraction,
        DeadChannels,
        RelativeUpdate,
        RelativeAttentionUpdate,
        Cosine,
        CenteredKernelAlignment,
        SpectralShare,
    )
}
"""All statistics by name."""

DEFAULT = tuple(name for name in STATISTICS if name not in ("cka", "spectral_share"))
"""What `probe` measures unless told otherwise: one forward pass gives all of it."""

StatisticSelection = str | type[Statistic] | Iterable[str | type[Statistic]]
"""Names of `STATISTICS`, subclasses of `Statistic`, or a list of both."""


def statistic_classes(stats: StatisticSelection) -> list[type[Statistic]]:
    """What `stats` names, each once.

    Raises:
        GddlabError: An unknown name; a class that is no statistic, or leaves out what it means; nothing.
    """
    if not isinstance(stats, str | type | Iterable):
        raise GddlabError(f"stats={stats!r}: give names ({', '.join(STATISTICS)}), subclasses of Statistic, or a list")
    listed = [stats] if isinstance(stats, str | type) else list(stats)
    out: list[type[Statistic]] = []
    for item in listed:
        if isinstance(item, str):
            if item not in STATISTICS:
                raise unknown("statistic", item, STATISTICS)
            found = STATISTICS[item]
        elif isinstance(item, type) and issubclass(item, Statistic):
            found = item
        else:
            raise GddlabError(f"statistic {item!r}: give names ({', '.join(STATISTICS)}) or subclasses of Statistic")
        missing = [a for a in ("name", "definition", "axes", "unit") if not isinstance(getattr(found, a, None), str)]
        if missing:
            raise GddlabError(f"statistic {found.__name__} does not say its {missing[0]}: set it as a class attribute")
        if "/" in found.name or not found.name:
            raise GddlabError(f"a statistic is called {found.name!r}: give a name without a slash")
        if found.target not in ("layer", "block") or found.side not in ("input", "output"):
            raise GddlabError(
                f"statistic {found.name!r} has target {found.target!r} and side {found.side!r}: accepted are layer or block, input or output"
            )
        if found.taps.__func__ is Statistic.taps.__func__ and not (found.reduction or hasattr(found, "reduce")):  # type: ignore[attr-defined]
            raise GddlabError(f"statistic {found.name!r} reads nothing: define reduce(x), or taps")
        if found not in out:
            if clash := [c for c in out if c.name == found.name]:
                raise GddlabError(f"two statistics are called {found.name!r}: {clash[0].__name__} and {found.__name__}")
            out.append(found)
    if not out:
        raise GddlabError(f"stats is empty: accepted are {', '.join(STATISTICS)}")
    return out
