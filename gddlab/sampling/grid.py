"""Grids of images as uint8 arrays and PNG files."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from gddlab.files import atomic_path


def to_uint8(images: Float[Tensor, "b c h w"]) -> UInt8[Tensor, "b c h w"]:
    """float [-1, 1] NCHW to uint8 NCHW, rounded."""
    return (images.detach().float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8).cpu()


def image_grid(
    images: Float[Tensor, "b c h w"], *, columns: int | None = None, scale: int = 1, gap: int = 1
) -> UInt8[np.ndarray, "height width 3"]:
    """Tiles images in [-1, 1] row by row, `gap` grey pixels between them."""
    x = to_uint8(images)
    x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
    x = x.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    n, c, h, w = x.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    tiles = torch.full((rows * columns, c, h + gap, w + gap), 90, dtype=torch.uint8)
    tiles[:n, :, :h, :w] = x
    grid = tiles.reshape(rows, columns, c, h + gap, w + gap).permute(0, 3, 1, 4, 2)
    grid = grid.reshape(rows * (h + gap), columns * (w + gap), c)
    return grid[: rows * (h + gap) - gap, : columns * (w + gap) - gap].numpy()


def save_grid(
    images: Float[Tensor, "b c h w"], path: str | Path, *, columns: int | None = None, scale: int = 2
) -> None:
    """Writes a PNG grid atomically."""
    from PIL import Image

    with atomic_path(path) as tmp:
        Image.fromarray(image_grid(images, columns=columns, scale=scale)).save(tmp, format="PNG")
