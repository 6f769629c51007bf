"""The embedded dataset: scikit-learn's handwritten digits (UCI, Alpaydin & Kaynak 1998), 1,797 images, 10 classes."""

from __future__ import annotations

import functools

import numpy as np
import torch

from gddlab.datasets.base import ImageDataset

__all__ = ["digits"]


@functools.cache
def digits() -> ImageDataset:
    """Digits at 16x16, grey: 8x8 counts 0..16 scaled to 0..255, enlarged bilinearly, rounded to uint8; scikit-learn's order."""
    from sklearn.datasets import load_digits

    source = load_digits()
    x = torch.from_numpy(source.images)[:, None] * (255 / 16)  # (1797, 1, 8, 8)
    x = torch.nn.functional.interpolate(x, size=16, mode="bilinear", align_corners=False)
    images = x.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return ImageDataset(
        images,
        np.asarray(source.target),
        classes=10,
        name="digits",
        source="scikit-learn load_digits (UCI optical recognition of handwritten digits, test part)",
        filter="bilinear",
    )
