"""What a change to one layer does to a network's output, as statistics over images."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gddlab.errors import GddlabError
from gddlab.nets.precond import edm_weight
from gddlab.probing.inputs import Rows
from gddlab.probing.layers import Layer
from gddlab.probing.reductions import double, mean_square
from gddlab.probing.statistics import PerImage, Statistic

__all__ = ["WEIGHT", "Effect", "Effects", "denoised", "warn_of", "weighted_error"]

WEIGHT = "lambda = (sigma^2 + 0.5^2) / (0.5 sigma)^2 (Karras et al. 2022, table 1)"


class Effect(PerImage):
    """Of a change that can be made in several ways: each way is a subclass with a name of its own, so that results of two can be joined."""

    stem: ClassVar[str]
    template: ClassVar[str]
    """The definition, with `{way}` and `{how}` in it."""

    def __init_subclass__(cls, *, way: str = "", how: str = "") -> None:
        super().__init_subclass__()
        if way:
            cls.name, cls.definition = f"{cls.stem}_{way}", cls.template.format(way=way, how=how)


def denoised(model: nn.Module, rows: Rows) -> Tensor:
    """The network's answer, (B, C, H, W).

    Raises:
        GddlabError: It has another shape than the states.
    """
    out = model(*rows)
    if not isinstance(out, Tensor) or out.shape != rows[0].shape:
        found = tuple(out.shape) if isinstance(out, Tensor) else f"a {type(out).__name__}"
        raise GddlabError(
            f"the network gave {found} for states {tuple(rows[0].shape)}: give a denoiser, which gddlab.wrap makes of any network"
        )
    return out


def weighted_error(a: Tensor, b: Tensor, sigmas: Sequence[float]) -> Tensor:
    """lambda(sigma) |a - b|^2, mean over channels and pixels (Karras et al. 2022, table 1; sigma_data 0.5).

    Args:
        a, b: (n * S, C, H, W), row i * S + s being image i at `sigmas[s]`.
        sigmas: Noise levels, standard deviations on the scale of images in [-1, 1].

    Returns:
        (n, S), float64, on the CPU.
    """
    sigma = torch.tensor(sigmas, dtype=torch.float64)
    return edm_weight(sigma) * mean_square(double(a) - double(b), len(a) // len(sigmas)).cpu().double()


class Effects:
    """Statistics by layer, from passes over some images at some noise levels each; all images of one part of the noise levels come in a row.

    What is not finite makes the value of its layer and noise level NaN, and is counted in `nonfinite`.
    """

    def __init__(self, layers: Sequence[Layer], kinds: Sequence[type[PerImage]]):
        self.kinds = kinds
        self._parts: dict[str, list[dict[str, PerImage]]] = {layer.name: [] for layer in layers}
        self._levels: dict[str, tuple[float, ...]] = {}
        self._bad: dict[tuple[str, float], int] = {}

    def add(self, layer: str, sigmas: Sequence[float], *numbers: Tensor) -> None:
        """Numbers of each image for each of `kinds`, (n, S) or (n, S, K)."""
        if self._levels.get(layer) != tuple(sigmas):
            self._levels[layer] = tuple(sigmas)
            self._parts[layer].append({kind.name: kind() for kind in self.kinds})
        bad = torch.zeros(numbers[0].shape[:2], dtype=torch.bool)
        for stat, x in zip(self._parts[layer][-1].values(), numbers, strict=True):
            finite = x.isfinite()
            bad |= ~(finite.all(-1) if x.ndim == 3 else finite)
            stat.update(x=torch.where(finite, x, torch.nan))
        for sigma, count in zip(sigmas, bad.sum(0).tolist(), strict=True):
            if count:
                self._bad[layer, sigma] = self._bad.get((layer, sigma), 0) + count

    @property
    def statistics(self) -> dict[str, dict[str, Statistic]]:
        """Over all noise levels, by layer and statistic."""
        return {
            layer: {kind.name: kind.stack([p[kind.name] for p in parts]) for kind in self.kinds}
            for layer, parts in self._parts.items()
        }

    def nonfinite(self, side: str) -> list[dict[str, Any]]:
        """For the meta data of a result: layer, side, sigma, number of images.

        Args:
            side: What was not finite: the network's output with a layer "ablated" or "patched".
        """
        return [{"layer": n, "side": side, "sigma": s, "images": c} for (n, s), c in self._bad.items()]


def warn_of(nonfinite: Sequence[dict[str, Any]]) -> None:
    """Warns the caller's caller of values that became NaN."""
    if nonfinite:
        places = ", ".join(f"{b['layer']} ({b['side']}) at sigma {b['sigma']:g}" for b in nonfinite[:3])
        warnings.warn(f"values are not finite in {len(nonfinite)} places: {places}", RuntimeWarning, stacklevel=3)
