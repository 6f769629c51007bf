"""Radial power spectra of images and activations."""

from __future__ import annotations

import torch
from torch import Tensor

from gddlab.errors import GddlabError

__all__ = ["radial_power"]


def radial_power(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean power at each radial frequency, one image at a time.

    The transform is orthonormal, so that white noise of standard deviation s has power s^2 at every frequency. A coefficient
    belongs to the whole number of cycles nearest to its radius; those beyond Nyquist, in the corners, are left out.

    Args:
        x: (N, C, H, H), square.

    Returns:
        Frequencies, cycles an image, 0 to H // 2, (F,); power, float64, mean over coefficients and channels, (N, F).

    Raises:
        GddlabError: Not square images.
    """
    if x.ndim != 4 or x.shape[2] != x.shape[3]:
        raise GddlabError(f"radial_power of {tuple(x.shape)}: give square images, (N, C, H, H)")
    h = x.shape[-1]
    f = torch.fft.fftfreq(h, 1 / h)
    ring = (f[:, None] ** 2 + f[None] ** 2).sqrt().round().long().to(x.device)  # (H, H)
    rings = h // 2 + 1
    inside = ring < rings
    power = torch.fft.fft2(x.double(), norm="ortho").abs().square().mean(1)  # (N, H, H)
    total = power.new_zeros(len(x), rings).index_add_(1, ring[inside], power[:, inside])
    return torch.arange(rings), total / ring[inside].bincount(minlength=rings)
