"""The denoising loss to differentiate: the states it is taken at, its value for each image, and what it is differentiated by."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gddlab.nets.precond import edm_loss
from gddlab.probing.effects import denoised
from gddlab.probing.inputs import Inputs

__all__ = ["Noised", "denoising_loss", "differentiable", "noised"]


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
