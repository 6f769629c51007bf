"""What a change to one layer does to a network's output: errors of images, summed by layer and noise level."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gddlab.errors import GddlabError
from gddlab.nets.precond import edm_loss, edm_weight
from gddlab.probing.guard import warn_nonfinite
from gddlab.probing.inputs import Inputs, Rows
from gddlab.probing.layers import Layer
from gddlab.probing.reductions import double, mean_square
from gddlab.probing.result import ProbeResult, network_meta
from gddlab.probing.statistics import Given, PerImage, stacked

WEIGHT = "lambda = (sigma^2 + 0.5^2) / (0.5 sigma)^2 (Karras et al. 2022, table 1)"
"""For definitions of statistics."""


def denoised(model: Callable[..., Any], rows: Rows) -> Float[Tensor, "b c h w"]:
    """The network's answer.

    Raises:
        GddlabError: It has another shape than the states.
    """
    out = model(*rows)
    if not isinstance(out, Tensor) or out.shape != rows[0].shape:
        found = tuple(out.shape) if isinstance(out, Tensor) else f"a {type(out).__name__}"
        raise GddlabError(
            f"the network gave {found} for states {tuple(rows[0].shape)}: give a denoiser, which gddlab.wrap makes of "
            "any network"
        )
    return out


def denoising_loss(
    model: Callable[..., Any],
    x: Float[Tensor, "b c h w"],
    sigma: Float[Tensor, " b"],
    labels: Float[Tensor, "b classes"] | None,
    clean: Float[Tensor, "b c h w"],
) -> Float[Tensor, " b"]:
    """EDM's weighted denoising loss of each image (Karras et al. 2022, equations 2 and 108; sigma_data 0.5).

    The mean over channels and pixels of (sigma^2 + 0.5^2) / (0.5 sigma)^2 (D(x; sigma) - clean)^2.
    """
    return edm_loss(denoised(model, (x, sigma, labels)), clean, sigma)


def weighted_error(
    a: Float[Tensor, "rows c h w"], b: Float[Tensor, "rows c h w"], sigmas: Sequence[float]
) -> Float[Tensor, "n s"]:
    """lambda(sigma) |a - b|^2, mean over channels and pixels (Karras et al. 2022, table 1; sigma_data 0.5).

    Args:
        a, b: Row i * S + s is image i at `sigmas[s]`.
        sigmas: Noise levels, standard deviations on the scale of images in [-1, 1].

    Returns:
        float64, on the CPU.
    """
    sigma = torch.tensor(sigmas, dtype=torch.float64)
    return edm_weight(sigma) * mean_square(double(a) - double(b), len(a) // len(sigmas)).cpu().double()


class Effects:
    """Statistics by layer, from passes over some images at some noise levels each.

    The noise levels come in parts; all images of one part come in succession. A number that is not finite makes the
    value of its layer and noise level NaN, and is reported.
    """

    def __init__(self, layers: Sequence[Layer], kinds: Sequence[type[PerImage]]):
        self.kinds = kinds
        self._parts: dict[str, list[dict[str, PerImage]]] = {layer.name: [] for layer in layers}
        self._levels: dict[str, tuple[float, ...]] = {}
        self._bad: dict[tuple[str, float], int] = {}

    def add(self, layer: str, sigmas: Sequence[float], *numbers: Float[Tensor, "n s ..."]) -> None:
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

    def result(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        inputs: Inputs,
        *,
        side: str,
        settings: dict[str, Any],
        given: Mapping[str, Given] | None = None,
        nonfinite: Sequence[dict[str, Any]] = (),
    ) -> ProbeResult:
        """The table over all noise levels; warns of what is not finite.

        Args:
            model: The network that was changed.
            layers: In its order.
            inputs: What it was shown.
            side: What was not finite: the network's output with a layer "ablated" or "patched", or an "attribution".
            settings: For the meta data.
            given: One more statistic by layer. `merge` refuses such a result, which lacks the sums of this statistic.
            nonfinite: What else was not finite.
        """
        sums = {
            layer: {kind.name: stacked([p[kind.name] for p in parts]) for kind in self.kinds}
            for layer, parts in self._parts.items()
        }
        bad = [{"layer": n, "side": side, "sigma": s, "images": c} for (n, s), c in self._bad.items()]
        meta = network_meta(model, layers) | inputs.describe()
        meta |= {"settings": settings, "nonfinite": [*bad, *nonfinite]}
        warn_nonfinite(meta["nonfinite"])
        if given is None:
            return ProbeResult.of(layers, inputs.sigmas, sums, meta)
        both = {name: {**by, given[name].name: given[name]} for name, by in sums.items()}
        return ProbeResult.of(layers, inputs.sigmas, both, meta).copy(statistics=sums)
