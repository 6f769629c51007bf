"""Noise with one generator an image, so that an image depends on its seed alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

__all__ = ["ImageNoise", "latents"]


class ImageNoise:
    """Standard normal noise for a batch; image i's comes from its own CPU generator, seeded with seeds[i].

    Each call continues every image's sequence, so that neither batch size nor number of processes changes an image.
    """

    def __init__(self, seeds: Iterable[int], shape: Sequence[int]):
        self.shape = tuple(shape)
        self.generators = [torch.Generator().manual_seed(int(s)) for s in seeds]

    def __call__(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """(n, *shape), on the CPU."""
        return torch.stack([torch.randn(self.shape, generator=g, dtype=dtype) for g in self.generators])


def latents(seeds: Iterable[int], shape: Sequence[int]) -> Tensor:
    """The noise that images begin with: the first that `ImageNoise` gives.  -> (n, *shape), float32"""
    return ImageNoise(seeds, shape)(torch.float32)
