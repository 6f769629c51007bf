"""Statistics of layers: what is read, how images are added up, and what comes out; `STATISTICS` by name."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self, TypeVar

import torch
from jaxtyping import Float
from pydantic import SkipValidation
from torch import Tensor

from gddlab.errors import GddlabError, shown, unknown
from gddlab.probing.layers import Layer, anatomy, points_of, streams_of
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
    pair_gram,
    per_head,
    per_row,
    positive_share,
)
from gddlab.probing.sites import is_attention


class Statistic:
    """A number per layer and noise level, from images that come in batches, with its standard error over images.

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

    `reduce` runs inside the hook, on one batch. For more, override `taps` (what is read where), `quantities` (numbers
    per image, whose means are kept) and `value` (a function of these means; its error follows by the delta method).
    """

    name: ClassVar[str]
    definition: ClassVar[str]
    axes: ClassVar[str]
    unit: ClassVar[str]
    target: ClassVar[Literal["layer", "block", "attention"]] = "layer"
    """ "block" for a statistic of every residual or transformer block that holds a selected layer, "attention" for one
    of every attention that holds, or is held by, a selected layer."""
    parts: ClassVar[tuple[str, ...]] = ()
    """Where a value is several numbers: the suffix of each one's name."""
    across: ClassVar[bool] = False
    """Whether it compares noise levels, so that one pass must hold all of them."""
    group: ClassVar[int] = 1
    """Images that make one sample; one pass must hold all of a group."""
    in_frame: ClassVar[bool] = True
    side: ClassVar[Literal["input", "output"]] = "output"
    """What `reduce` sees: a layer's output or its first input."""
    reduce: ClassVar[Callable[[Tensor], Tensor]]
    reduction: ClassVar[Any] = None
    """One of `gddlab.probing.reductions` in place of `reduce`; it is computed once for all statistics that use it."""
    registry: ClassVar[dict[str, type[Statistic]]] = {}
    """Every statistic by its identity: saved sums find their statistic by it."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if isinstance(getattr(cls, "name", None), str):
            Statistic.registry[cls.identity()] = cls

    @classmethod
    def identity(cls) -> str:
        """The name of a statistic of gddlab's; module and class of a user's."""
        return cls.name if cls.__module__.startswith("gddlab.") else f"{cls.__module__}.{cls.__qualname__}"

    def __init__(self) -> None:
        self.samples = 0
        """Images, or groups of them, in the sums."""
        self.sums: dict[str, Tensor] = {}

    @property
    def n_images(self) -> int:
        return self.samples * self.group

    @classmethod
    def applies(cls, layer: Layer) -> bool:
        """Whether the statistic has a meaning for a layer."""
        return True

    @classmethod
    def taps(cls, layer: Layer, modules: Mapping[str, Any]) -> dict[str, Tap] | list[dict[str, Tap]] | None:
        """What to read for `layer`, by role, or a list of that by stream; None where the statistic has no meaning."""
        return {"x": Tap(layer.name, cls.side, cls.reduction or per_row(cls.reduce))} if cls.applies(layer) else None

    def update(self, **reduced: Float[Tensor, "n s ..."]) -> None:
        """Adds a batch: float64 reductions by role."""
        samples, sums = self.totals(1, **reduced)
        self.add(samples, **{name: x[0] for name, x in sums.items()})

    def totals(self, layers: int, **reduced: Float[Tensor, "rows s ..."]) -> tuple[int, dict[str, Tensor]]:
        """Samples of each of some layers, whose images follow each other, and their sums, layers first.

        Of many layers at once, since most of the time of so few numbers is that of the calls.
        """
        q = self.quantities(**reduced)
        if q.ndim == 2:
            q = q[..., None]
        if type(self).value is Statistic.value and q.shape[2] != max(1, len(self.parts)):
            raise GddlabError(
                f"statistic {self.name!r} gives {q.shape[2]} numbers per row and names {len(self.parts)} parts: "
                "name as many, or override value"
            )
        q = _by_layer(q, layers)
        return q.shape[1], {"first": q.sum(1), "second": torch.einsum("lnsi,lnsj->lsij", q, q)}

    def add(self, samples: int, **sums: Tensor) -> None:
        self.samples += samples
        for name, x in sums.items():
            self.sums[name] = self.sums[name] + x if name in self.sums else x

    def merge(self, other: Statistic) -> None:
        """Adds what another instance has seen of other images at the same noise levels."""
        if type(other) is not type(self):
            raise GddlabError(f"{type(other).__name__} does not add to {type(self).__name__}: merge equal statistics")
        self.add(other.samples, **other.sums)

    def at(self, levels: Sequence[int]) -> Self:
        """What was measured at some of the noise levels, by their positions in the order wanted."""
        out = copy.copy(self)
        out.sums = {name: x[list(levels)] for name, x in self.sums.items()}
        return out

    def without(self, other: Self) -> Self:
        """What is left without the images that `other` has seen, which this has seen too."""
        out = copy.copy(self)
        out.samples = self.samples - other.samples
        out.sums = {name: x - other.sums[name] for name, x in self.sums.items()}
        return out

    def quantities(self, x: Float[Tensor, "n s ..."]) -> Float[Tensor, "n s ..."]:
        """Numbers of each image, (n, S) or (n, S, K)."""
        return x

    def value(self, means: Float[Tensor, "s k"]) -> Float[Tensor, "s ..."]:
        """The statistic from the means of the quantities over images.  (S, K) -> (S,), or (S, P) with P `parts`"""
        return means if self.parts else means[:, 0]

    def result(self) -> tuple[Float[Tensor, "s ..."], Float[Tensor, "s ..."]]:
        """Value and standard error over images, (S,) each, or (S, P).

        The error of one sample is NaN; where images were fewer than make one sample, so is the value.
        """
        n = self.samples
        if not self.sums:
            raise GddlabError(f"{self.name} has seen no image: measure a pass first")
        first, second = self.sums["first"], self.sums["second"]
        with torch.inference_mode(False), torch.enable_grad():
            means = (first.clone() / n).requires_grad_(True)  # a copy: sums made in inference mode take no gradient
            value = self.value(means)
            columns = value if value.ndim == 2 else value[:, None]
            # value depends on its own noise level's means alone, so one backward pass gives every row's slope
            slopes = [torch.autograd.grad(c.sum(), means, retain_graph=True)[0] for c in columns.unbind(1)]
        slope, mean = torch.stack(slopes, 1), means.detach()  # (S, P, K), (S, K)
        slope = torch.where(slope.isfinite(), slope, 0.0)  # the root's slope at 0, where nothing spreads
        if n > 1:
            covariance = (second / n - mean[:, :, None] * mean[:, None]) / (n - 1)
            sem = torch.einsum("spi,sij,spj->sp", slope, covariance, slope).clamp(min=0).sqrt()
        else:
            sem = torch.full_like(columns, torch.nan).detach()
        return value.detach(), sem if value.ndim == 2 else sem[:, 0]

    def matrix(self) -> Float[Tensor, "s s"] | None:
        """Noise levels against each other, where the statistic compares them."""
        return None

    def channels(self) -> dict[str, Tensor]:
        """Numbers of each channel, (S, C), by name."""
        return {}

    @classmethod
    def describe(cls) -> dict[str, str]:
        return {
            "definition": cls.definition,
            "axes": cls.axes,
            "unit": cls.unit,
            "target": cls.target,
            "class": cls.identity(),
        }


def _by_layer(x: Tensor, layers: int) -> Tensor:
    """(layers * n, ...) -> (layers, n, ...)"""
    return x.unflatten(0, (layers, len(x) // layers))


S = TypeVar("S", bound=Statistic)


def stacked(levels: Sequence[dict[str, dict[str, Statistic]]]) -> dict[str, dict[str, Statistic]]:
    """Statistics by layer and name from those that saw the same images at a part of the noise levels each."""
    if len(levels) == 1:  # matrices between noise levels do not stack
        return levels[0]
    out = {layer: {name: copy.copy(stat) for name, stat in by.items()} for layer, by in levels[0].items()}
    for layer, by in out.items():
        for name, stat in by.items():
            stat.sums = {k: torch.cat([part[layer][name].sums[k] for part in levels]) for k in stat.sums}
    return out


# Statistics of numbers that are not read by hooks; `ablate`, `patch` and the like declare theirs from these.


class PerImage(Statistic):
    """Means over images of numbers computed elsewhere: `update(x=...)` takes them, (n, S)."""


class RatioOfMeans(PerImage):
    """Takes numerator and denominator of each image, (n, S, 2)."""

    def value(self, means: Tensor) -> Tensor:
        return means[:, 0] / means[:, 1]


class Given(Statistic):
    """Values computed elsewhere that are no means over images: such results join, but do not merge."""

    def __init__(self, values: Any = (), sems: Any = None, n: int = 0) -> None:
        super().__init__()
        self.samples = n
        self.values = torch.as_tensor(values, dtype=torch.float64)
        self.sems = torch.full_like(self.values, torch.nan) if sems is None else sems

    def result(self) -> tuple[Tensor, Tensor]:
        return self.values, self.sems


def declare(base: type[S], name: str, definition: str, *, axes: str, unit: str) -> type[S]:
    """A statistic that differs from its base in what it is called and what it means."""
    about = {"name": name, "definition": definition, "axes": axes, "unit": unit}
    return type(name, (base,), {"__module__": __name__, **about})


# Statistics that hooks read.


class _Activation(Statistic):
    axes = "images, channels, pixels"
    unit = "activation"


class RootMeanSquare(_Activation):
    name = "rms"
    definition = "square root of the mean over images of the mean square of the layer's output; sem by the delta method"
    reduction = mean_square

    def value(self, means: Tensor) -> Tensor:
        return means[:, 0].sqrt()


class MeanAbsolute(_Activation):
    name = "mean_abs"
    definition = "mean absolute value of the layer's output"
    reduction = mean_magnitude


class Mean(_Activation):
    name = "mean"
    definition = "mean of the layer's output"
    reduction = mean


class StandardDeviation(_Activation):
    name = "std"
    definition = "standard deviation of the layer's output over images, channels and pixels; sem by the delta method"
    reduction = moments

    def quantities(self, x: Tensor) -> Tensor:
        mean, within, _ = x.unbind(-1)
        return torch.stack([mean, mean.square() + within], -1)

    def totals(self, layers: int, **reduced: Tensor) -> tuple[int, dict[str, Tensor]]:
        samples, sums = super().totals(layers, **reduced)
        return samples, sums | {"within": _by_layer(reduced["x"][..., 1], layers).sum(1)}

    def value(self, means: Tensor) -> Tensor:
        return (means[:, 1] - means[:, 0].square()).clamp(min=0).sqrt()

    def result(self) -> tuple[Tensor, Tensor]:
        """Adds the variance within images and that between their means: the difference of squares is too inexact."""
        _, sem = super().result()
        n = self.samples
        first, square = self.sums["first"][:, 0], self.sums["second"][:, 0, 0]
        between = (square / n - (first / n).square()).clamp(min=0)
        return (self.sums["within"] / n + between).sqrt(), sem


class _Activated(Statistic):
    """Of layers whose input is known to follow an activation, see `Layer.activated_input`."""

    unit = "share"
    side = "input"

    @classmethod
    def applies(cls, layer: Layer) -> bool:
        return layer.activated_input


class ActiveFraction(_Activated):
    name = "active_fraction"
    definition = "share of the layer's input above 0, for layers whose input is the output of SiLU"
    axes = "images, channels, pixels"
    reduction = positive_share


class DeadChannels(_Activated):
    name = "dead_channels"
    definition = (
        "share of the channels of the layer's input that stay near 0: root mean square over an image's pixels below "
        "0.01 of that over all channels; mean over images; for layers whose input is the output of SiLU"
    )
    axes = "root mean square over pixels; share over channels; mean over images"
    reduction = channel_square
    threshold: ClassVar[float] = 0.01

    def quantities(self, x: Tensor) -> Tensor:
        near = x < self.threshold**2 * x.mean(-1, keepdim=True)
        share = near.to(x.dtype).mean(-1)
        return torch.where(x.isfinite().all(-1), share, torch.nan)


def _between(layer: Layer, modules: Mapping[str, Any], part: str = "") -> list[dict[str, Tap]]:
    """How far the stream of a transformer block moves where `part` is added to it, or in all, by stream."""
    points = points_of(modules[layer.name])
    streams, joint = dict.fromkeys(p.stream for p in points), bool(streams_of(modules[layer.name]))
    out = []
    for stream in streams:
        line = [p for p in points if p.stream == stream]
        steps = [(a, b) for a, b in itertools.pairwise(line) if b.part == part] if part else [(line[0], line[-1])]
        for a, b in steps:
            first, last = (f"{layer.name}.{p.module}".rstrip(".") for p in (a, b))
            label = stream if joint else ""
            update = Tap(last, b.side, mean_square, (first, a.side), label)
            out.append({"update": update, "base": Tap(first, a.side, mean_square, stream=label)})
    return out


_MOVES = "how far it moves the stream of tokens: |stream after - stream before| / |stream before|"


class RelativeUpdate(Statistic):
    name = "rel_update"
    definition = (
        "mean over images of |branch| / |skip path|, Euclidean norms of one image's activations; the branch is the "
        "output of the block's last convolution (conv1; conv2 in diffusers), the skip path is the skip module's "
        f"output, or the block's input where there is none; of a transformer block {_MOVES}"
    )
    axes = "norm over channels, pixels; mean over images"
    unit = "ratio"
    target = "block"

    @classmethod
    def taps(cls, layer: Layer, modules: Mapping[str, Any]) -> dict[str, Tap] | list[dict[str, Tap]] | None:
        if lines := _between(layer, modules):
            return lines
        parts = anatomy(modules[layer.name])
        if parts is None or parts.skip is None:
            return None
        base = Tap(layer.name, "input", mean_square)
        if (skip := f"{layer.name}.{parts.skip}") in modules:
            base = Tap(skip, "output", mean_square)
        return {"update": Tap(f"{layer.name}.{parts.branch}", "output", mean_square), "base": base}

    def quantities(self, update: Tensor, base: Tensor) -> Tensor:  # type: ignore[override]
        return (update / base).sqrt()  # equal shapes: the counts cancel


class RelativeAttentionUpdate(RelativeUpdate):
    name = "rel_update_attn"
    definition = (
        "mean over images of |proj(...)| / |x|, Euclidean norms of one image's activations; "
        "x is what the attention's output is added to, the input of norm2; of a transformer block's self-attention or "
        f"joint attention {_MOVES}"
    )

    @classmethod
    def taps(cls, layer: Layer, modules: Mapping[str, Any]) -> dict[str, Tap] | list[dict[str, Tap]] | None:
        if lines := _between(layer, modules, "attn"):
            return lines
        parts = anatomy(modules[layer.name])
        if parts is None or f"{layer.name}.{parts.attention}" not in modules:
            return None
        return {
            "update": Tap(f"{layer.name}.{parts.attention}", "output", mean_square),
            "base": Tap(f"{layer.name}.{parts.attention_base}", "input", mean_square),
        }


class RelativeCrossUpdate(RelativeUpdate):
    name = "rel_update_cross"
    definition = f"mean over images; of a transformer block's cross-attention {_MOVES}"
    axes = "norm over channels, tokens; mean over images"
    part: ClassVar[str] = "cross"

    @classmethod
    def taps(cls, layer: Layer, modules: Mapping[str, Any]) -> dict[str, Tap] | list[dict[str, Tap]] | None:
        return _between(layer, modules, cls.part) or None


class RelativeMlpUpdate(RelativeCrossUpdate):
    name = "rel_update_mlp"
    definition = f"mean over images; of a transformer block's MLP {_MOVES}"
    part = "mlp"


class AttentionEntropy(Statistic):
    name = "attention_entropy"
    definition = (
        "entropy -sum over keys of p ln p of the softmax attention p of a query, mean over queries, heads and images; "
        "its exponential is the number of keys that a query attends to evenly; of each head in "
        "`ProbeResult.channels`, with its standard error"
    )
    axes = "sum over keys; mean over queries, heads, images"
    unit = "nat"
    target = "attention"

    @classmethod
    def taps(cls, layer: Layer, modules: Mapping[str, Any]) -> dict[str, Tap] | None:
        return {"x": Tap(layer.name, "attention", per_head)} if is_attention(modules[layer.name]) else None

    def value(self, means: Tensor) -> Tensor:
        return means.mean(1)

    def channels(self) -> dict[str, Tensor]:
        """Of each head, (S, heads)."""
        n = self.samples
        mean, square = self.sums["first"] / n, self.sums["second"].diagonal(dim1=-2, dim2=-1) / n
        sem = ((square - mean.square()).clamp(min=0) / (n - 1)).sqrt() if n > 1 else torch.full_like(mean, torch.nan)
        return {self.name: mean, f"{self.name}_sem": sem}


class _Likeness(Statistic):
    """m(s, t) / sqrt(m(s, s) m(t, t)) for a matrix m summed over images; in `result` t is the largest sigma."""

    axes = "images, channels, pixels"
    unit = "similarity"
    across = True

    def totals(self, layers: int, **reduced: Tensor) -> tuple[int, dict[str, Tensor]]:
        samples, sums = super().totals(layers, **reduced)
        return samples, sums | {"matrix": _by_layer(reduced["x"], layers).sum(1)}

    def quantities(self, x: Tensor) -> Tensor:
        """m(s, 0), m(s, s), m(0, 0), where 0 is the largest noise level.  (n, S, S) -> (n, S, 3)"""
        diagonal = x.diagonal(dim1=-2, dim2=-1)
        return torch.stack([x[..., 0], diagonal, diagonal[..., :1].expand_as(diagonal)], -1)

    def value(self, means: Tensor) -> Tensor:
        cross, ss, tt = means.unbind(1)
        return cross / (ss * tt).sqrt()

    def result(self) -> tuple[Tensor, Tensor]:
        value, sem = super().result()
        sem = torch.where(value.isfinite(), sem, torch.nan)
        if self.samples > 1:
            sem[0] = torch.where(value[0].isfinite(), 0.0, sem[0])  # likeness to itself: rounding is no spread
        return value, sem

    def at(self, levels: Sequence[int]) -> Self:
        """As of any statistic, likeness to the first of them; its error is NaN, since squares are of the former first.

        The inner products themselves are kept for all pairs, so the values are exact.
        """
        chosen = list(levels)
        out = copy.copy(self)
        m = self.sums["matrix"][chosen][:, chosen]
        first = self.quantities(m[None])[0]
        out.sums = {"matrix": m, "first": first, "second": first.new_full((*first.shape, first.shape[1]), torch.nan)}
        return out

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
    reduction = gram


class Correlation(_Likeness):
    name = "correlation"
    definition = (
        "correlation over images between the layer's outputs at this sigma and at the largest one: "
        "C[s, t] / sqrt(C[s, s] C[t, t]), C[s, t] = trace of the covariance over images between both, with the same "
        "images and noise; unbiased, as the mean over pairs of images of <a_s - b_s, a_t - b_t> / 2; sem over pairs by "
        "the delta method; no value where the output does not depend on the image"
    )
    group = 2
    least: ClassVar[float] = 1e-6
    """Images differ by rounding alone where the difference of a pair is less than this times its root mean square."""

    @classmethod
    def taps(cls, layer: Layer, modules: Mapping[str, Any]) -> dict[str, Tap] | None:
        return {"x": Tap(layer.name, "output", pair_gram), "level": Tap(layer.name, "output", mean_square)}

    def totals(  # type: ignore[override]
        self, layers: int, x: Tensor, level: Tensor
    ) -> tuple[int, dict[str, Tensor]]:
        pairs = len(x) // layers
        of_pairs = _by_layer(level, layers)[:, : 2 * pairs].unflatten(1, (pairs, 2)).mean(2).flatten(0, 1)  # (pairs, S)
        spread = x.diagonal(dim1=-2, dim2=-1)
        differ, finite = spread > self.least**2 * of_pairs, (of_pairs + spread).isfinite()
        x = torch.where(differ[:, :, None] & differ[:, None], x, 0)
        return super().totals(layers, x=torch.where(finite[:, :, None] & finite[:, None], x, torch.nan))


class CenteredKernelAlignment(_Likeness):
    name = "cka"
    definition = (
        "linear centred kernel alignment of the layer's outputs at this sigma and at the largest one: "
        "HSIC[s, t] / sqrt(HSIC[s, s] HSIC[t, t]), "
        f"unbiased HSIC within groups of {GROUP} images, averaged over whole groups (Nguyen et al. 2021, equation 3); "
        "sem over groups by the delta method; can be misled (arXiv:2210.16156)"
    )
    group = GROUP
    reduction = hsic


class SpectralShare(Statistic):
    name = "spectral_share"
    definition = (
        "share of the power of the layer's output in a band of radial frequency, 0 at the constant and 1 at the "
        "Nyquist frequency of an axis: "
        + ", ".join(f"{i} from {a:g} to {b:g}" for i, (a, b) in enumerate(itertools.pairwise(BANDS)))
        + "; share of one image over all channels, mean over images; of tokens in their places in the image"
    )
    axes = "power over channels, frequencies; mean over images"
    unit = "share"
    parts = ("0", "1", "2", "3")
    reduction = band_share

    @classmethod
    def taps(cls, layer: Layer, modules: Mapping[str, Any]) -> dict[str, Tap] | None:
        tokens = bool(layer.block) and bool(points_of(modules[layer.block]))
        applies = layer.type in ("conv", "block") or tokens
        return {"x": Tap(layer.name, "output", band_share)} if applies else None


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

    def totals(self, layers: int, **reduced: Tensor) -> tuple[int, dict[str, Tensor]]:
        x = _by_layer(reduced["x"], layers)
        within = _by_layer(reduced["within"], layers).sum(1)
        return x.shape[1], {"mean": x.sum(1), "square": x.square().sum(1), "within": within}

    def channels(self) -> dict[str, Tensor]:
        """Adds the variance within images and that between their means: only float64 means are subtracted."""
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
        RelativeCrossUpdate,
        RelativeMlpUpdate,
        Correlation,
        Cosine,
        CenteredKernelAlignment,
        SpectralShare,
        AttentionEntropy,
    )
}
"""All statistics that `probe` measures, by name."""

_ON_REQUEST = ("cosine", "cka", "spectral_share", "attention_entropy")
DEFAULT = tuple(name for name in STATISTICS if name not in _ON_REQUEST)
"""What `probe` measures by default."""

StatisticSelection = SkipValidation[str | type[Statistic] | Iterable[str | type[Statistic]]]
"""Names of `STATISTICS`, subclasses of `Statistic`, or a list of both."""


def statistic_classes(stats: StatisticSelection) -> list[type[Statistic]]:
    """What `stats` names, each once."""
    several = not isinstance(stats, str | type) and isinstance(stats, Iterable)
    listed: list[Any] = list(stats) if several else [stats]  # type: ignore[arg-type]
    out: dict[str, type[Statistic]] = {}
    for item in listed:
        if isinstance(item, str) and item not in STATISTICS:
            raise unknown("statistic", item, STATISTICS)
        found = STATISTICS[item] if isinstance(item, str) else item
        if not (isinstance(found, type) and issubclass(found, Statistic)):
            raise GddlabError(
                f"statistic {shown(item)}: give names ({', '.join(STATISTICS)}) or subclasses of Statistic"
            )
        _check_declaration(found)
        if out.setdefault(found.name, found) is not found:
            other = out[found.name].__name__
            raise GddlabError(f"two statistics are called {found.name!r}: {other} and {found.__name__}")
    if not out:
        raise GddlabError(f"stats is empty: accepted are {', '.join(STATISTICS)}")
    return [*out.values()]


def _check_declaration(found: type[Statistic]) -> None:
    """Refuses a class that does not say what it means, or reads nothing."""
    for attribute in ("name", "definition", "axes", "unit"):
        if not isinstance(getattr(found, attribute, None), str):
            raise GddlabError(f"statistic {found.__name__} does not say its {attribute}: set it as a class attribute")
    if "/" in found.name or not found.name:
        raise GddlabError(f"a statistic is called {found.name!r}: give a name without a slash")
    if found.target not in ("layer", "block", "attention") or found.side not in ("input", "output"):
        raise GddlabError(
            f"statistic {found.name!r} has target {found.target!r} and side {found.side!r}: accepted are layer, "
            "block or attention, and input or output"
        )
    own_taps = found.taps.__func__ is not Statistic.taps.__func__  # type: ignore[attr-defined]
    if not (own_taps or found.reduction or hasattr(found, "reduce")):
        raise GddlabError(f"statistic {found.name!r} reads nothing: define reduce(x), or taps")
