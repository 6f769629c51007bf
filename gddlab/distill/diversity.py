"""How many different images a grid shows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gddlab.errors import GddlabError

__all__ = ["SIDE", "distinct_images", "neighbor_distance"]

SIDE = 16
"""Images are averaged down to this side before they are compared: noise of pixels would make copies look different."""


def _distances(images: Tensor) -> Tensor:
    """Root mean square differences of pixels between all pairs, float64.  (N, C, H, W) -> (N, N)"""
    if images.ndim != 4 or len(images) < 2:
        raise GddlabError(f"images are {tuple(images.shape)}: give at least 2, (N, C, H, W)")
    x = images.detach().double().cpu()
    if max(x.shape[2:]) > SIDE:
        x = torch.nn.functional.adaptive_avg_pool2d(x, SIDE)
    x = x.flatten(1)
    # Through a matrix product, distances of near copies would drown in rounding.
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / math.sqrt(x.shape[1])


def neighbor_distance(images: Tensor) -> float:
    """Mean distance of an image to the nearest other one: root mean square of pixels, at a side of 16 at most.

    Args:
        images: [-1, 1], (N, C, H, W), N at least 2.

    Raises:
        GddlabError: Fewer than two images.
    """
    d = _distances(images)
    return d.fill_diagonal_(math.inf).min(1).values.mean().item()


def distinct_images(images: Tensor, scale: float) -> float:
    """Effective number of distinct images: diversity of order 2 with similarity exp(-(d / scale)^2).

    Copies of m images, equally many, count as m, however far the m are apart; the mean distance between images, 30 % lower for four digits than
    for 64, would hardly see it. Images closer than about `scale` count as one, so that noise does not hide copies.
    Leinster & Cobbold 2012 ("Measuring diversity: the importance of species similarity"), q = 2.

    Args:
        images: [-1, 1], (N, C, H, W), N at least 2.
        scale: Distance at which images begin to differ, root mean square of pixels at a side of 16 at most, such as half the
            `neighbor_distance` of real ones.

    Returns:
        From 1, all alike, to N.

    Raises:
        GddlabError: Fewer than two images.
    """
    d = _distances(images)
    return len(d) ** 2 / torch.exp(-((d / scale) ** 2)).sum().item()
