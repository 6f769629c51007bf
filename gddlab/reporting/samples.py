"""Images in grids, those of several networks from the same noise, and those that runs and teachers keep in grids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from torch import Tensor

from gddlab.errors import GddlabError
from gddlab.sampling import image_grid
from gddlab.theme import axes_of, themed

GAP = 1
"""Pixels between the images of a grid, whatever its scale."""


def cut_grid(pixels: np.ndarray, *, size: int, columns: int = 8) -> Tensor:
    """The images of a grid that `save_grid` wrote: a run's `samples/KIMG.png`, or a teacher's `samples-STEPS.png`.

    Both hold 64 images of seeds 0 to 63, row by row, in 8 columns: image i has seed i.

    Args:
        pixels: uint8, (height, width, 3).
        size: Side of an image, pixels.
        columns: Images in a row.

    Returns:
        float32 in [-1, 1], (N, 3, size, size); grey images have three equal channels. The last row is filled
        up with grey images.

    Raises:
        GddlabError: No grid of images of this size.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise GddlabError(f"pixels are {pixels.dtype} {pixels.shape}: give uint8 (height, width, 3)")
    height, width = pixels.shape[0] + GAP, pixels.shape[1] + GAP
    scale = (width // columns - GAP) // size
    step = size * scale + GAP
    if scale < 1 or width != columns * step or height % step:
        raise GddlabError(
            f"{pixels.shape[1]} x {pixels.shape[0]} pixels are no grid of {columns} columns of images of {size} "
            "pixels: give size= and columns= as they were"
        )
    padded = np.zeros((height, width, 3), np.uint8)
    padded[:-GAP, :-GAP] = pixels
    tiles = padded.reshape(height // step, step, columns, step, 3)[:, :-GAP:scale, :, :-GAP:scale]
    images = torch.from_numpy(np.ascontiguousarray(tiles)).permute(0, 2, 4, 1, 3).flatten(0, 1)
    return images.float() / 127.5 - 1


@themed
def draw_images(images: Tensor, *, columns: int = 8, ax: Axes | None = None, title: str = "") -> Axes:
    """A grid of images, float [-1, 1], (N, C, H, W)."""
    ax = axes_of(ax, 5.2, 3.2)
    ax.imshow(image_grid(images, columns=columns), interpolation="nearest")
    ax.set_axis_off()
    ax.set_title(title)
    return ax


def draw_rows(*images: Tensor, ax: Axes | None = None, title: str = "") -> Axes:
    """A grid with a row for each image: of each tensor one column, (B, C, H, W), or n, (B, n, C, H, W)."""
    rows = torch.cat([x if x.ndim == 5 else x[:, None] for x in images], 1)
    return draw_images(rows.flatten(0, 1), columns=rows.shape[1], ax=ax, title=title)


@themed
def draw_same_noise(images: Mapping[str, Tensor], seeds: Sequence[int] = range(16), *, ax: Axes | None = None) -> Axes:
    """One row per network, one column per seed: what each makes of the same noise.

    Args:
        images: Label -> images of seeds 0, 1, 2, ..., float [-1, 1], (N, C, H, W); grey or RGB.
        seeds: Which to show.

    Raises:
        GddlabError: No images or seeds; a network has no image of a seed; images differ in size.
    """
    if not images or not len(seeds):
        raise GddlabError("nothing to draw: give images of at least one network, and at least one seed")
    sides = {label: tuple(x.shape[-2:]) for label, x in images.items()}
    for label, x in images.items():
        if x.ndim != 4 or sides[label] != next(iter(sides.values())):
            raise GddlabError(f"images of {label!r} are {tuple(x.shape)}: give (N, C, H, W), all of one size")
        if (wrong := next((seed for seed in seeds if not 0 <= seed < len(x)), None)) is not None:
            raise GddlabError(f"{label!r} has images of seeds 0 to {len(x) - 1}, not of {wrong}: sample more of it")
    rows = [x[list(seeds)].expand(-1, 3, -1, -1).cpu() for x in images.values()]
    grid = image_grid(torch.cat(rows), columns=len(seeds))
    side = (grid.shape[0] + GAP) // len(rows), (grid.shape[1] + GAP) // len(seeds)
    grid[side[0] - GAP :: side[0]] = grid[:, side[1] - GAP :: side[1]] = 255  # white lines between images
    if ax is None:
        names = 0.07 * max(map(len, images)) + 0.1
        ax = axes_of(None, 6.4, (6.4 - names) * grid.shape[0] / grid.shape[1] + 0.3)
    ax.imshow(grid, interpolation="nearest")
    ax.set_anchor("E")
    ax.set_yticks([side[0] * (i + 0.5) - 1 for i in range(len(rows))], list(images), fontsize=8)
    ax.set_xticks([side[1] * (i + 0.5) - 1 for i in range(len(seeds))], [str(s) for s in seeds], fontsize=8)
    ax.xaxis.tick_top()
    ax.tick_params(length=0, pad=2)
    ax.spines[:].set_visible(False)
    ax.annotate("seed", (0, 1), (-4, 2), xycoords="axes fraction", textcoords="offset points", ha="right", fontsize=8)
    return ax


def found_again(images: Mapping[str, Tensor], target: Tensor) -> pd.DataFrame:
    """How often networks make one network's image of the same noise.

    Images are compared by the correlation of their pixels, after the mean of each set is subtracted.

    Args:
        images: Label -> images, (N, C, H, W), image i from the noise of `target[i]`.
        target: The other network's, (N, C, H, W); colours are averaged.

    Returns:
        Indexed by label: found, the share of images to which the target's image of the same noise is more alike than
        those of all other noises (1/N by chance), and correlation, the mean with the target's image of the same noise.

    Raises:
        GddlabError: Fewer images than in `target`, or of another size.
    """
    n, theirs = len(target), _centred(target)
    rows = {}
    for label, x in images.items():
        if len(x) < n or x.shape[-2:] != target.shape[-2:]:
            raise GddlabError(
                f"images of {label!r} are {tuple(x.shape)}: give {n} of {tuple(target.shape[-2:])} pixels"
            )
        alike = _centred(x[:n]) @ theirs.T
        found = (alike.argmax(1) == torch.arange(n)).double().mean()
        rows[label] = {"found": found.item(), "correlation": alike.diagonal().mean().item()}
    return pd.DataFrame.from_dict(rows, orient="index")


def _centred(x: Tensor) -> Tensor:
    """Images as rows of length 1, (N, H * W), without their mean."""
    x = x.detach().cpu().double().mean(1).flatten(1)
    return torch.nn.functional.normalize(x - x.mean(0), dim=1)
