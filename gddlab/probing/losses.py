"""What a change to one layer does to a network's output, as statistics over images."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Collection, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from gddlab.errors import GddlabError
from gddlab.nets.precond import edm_loss, edm_weight
from gddlab.probing.inputs import Inputs, Rows
from gddlab.probing.layers import Layer
from gddlab.probing.reductions import double, mean_square
from gddlab.probing.statistics import PerImage, Statistic

__all__ = [
    "WEIGHT",
    "Effect",
    "Effects",
    "Noised",
    "denoised",
    "denoising_loss",
    "differentiable",
    "noised",
    "warn_of",
    "weighted_error",
]

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


class Noised(NamedTuple):
    """Rows of a batch, row i * S + s being image i at noise level s, on the scale of images in [-1, 1].

    Attributes:
        x: States, (B, C, H, W).
        sigma: (B,).
        labels: One-hot, (B, label_dim), or None.
        clean: Images, (B, C, H, W); None where states are made without any.
        origin: The states without the image, (B, C, H, W): sigma * noise, or zeros where there is no image.
    """

    x: Tensor
    sigma: Tensor
    labels: Tensor | None
    clean: Tensor | None
    origin: Tensor


def noised(inputs: Inputs, i: int, j: int, *, sigmas: Sequence[float], device: torch.device) -> Noised:
    """Images i to j at some noise levels, as `inputs.rows` gives them, in float64 where the network is."""
    dtype = torch.float64 if inputs.float64 else torch.float32
    labels = None if inputs.labels is None else inputs.labels[i:j].to(device).repeat_interleave(len(sigmas), 0)
    levels = torch.tensor(sigmas, dtype=dtype, device=device)
    sigma = levels.repeat(j - i)
    if inputs.states == "trajectory":
        x = inputs.rows(i, j, device=device, sigmas=sigmas)[0].to(dtype)
        return Noised(x, sigma, labels, None, torch.zeros_like(x))
    noise = inputs.noise(i, j).to(device, dtype)
    noise = (levels[:, None, None, None] * noise[:, None]).flatten(0, 1)  # (b, S, C, H, W) -> (B, C, H, W)
    if inputs.dataset is None:
        return Noised(noise, sigma, labels, None, torch.zeros_like(noise))
    clean = inputs.clean(i, j).to(device, dtype).repeat_interleave(len(sigmas), 0)
    return Noised(clean + noise, sigma, labels, clean, noise)


def denoising_loss(model: nn.Module, x: Tensor, sigma: Tensor, labels: Tensor | None, clean: Tensor) -> Tensor:
    """EDM's weighted denoising loss of each image (Karras et al. 2022, equations 2 and 108; sigma_data 0.5).

    (B, C, H, W), (B,), (B, label_dim) or None, (B, C, H, W) -> (B,), the mean over channels and pixels of
    (sigma^2 + 0.5^2) / (0.5 sigma)^2 (D(x; sigma) - clean)^2.
    """
    return edm_loss(denoised(model, (x, sigma, labels)), clean, sigma)


@contextlib.contextmanager
def differentiable(model: nn.Module, wanted: Collection[Tensor] = ()) -> Iterator[None]:
    """Gradients inside, whatever the caller has switched off: of the parameters `wanted` and no others; flags come back."""
    flags = {p: p.requires_grad for p in model.parameters()}
    chosen = set(wanted)
    with torch.inference_mode(False), torch.enable_grad():
        try:
            for p in flags:
                p.requires_grad_(p in chosen)
            yield
        finally:
            for p, flag in flags.items():
                p.requires_grad_(flag)
