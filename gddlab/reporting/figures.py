"""Figures from tables: training curves, distances over training, rows of images. Each takes `ax` and returns it."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from gddlab.files import atomic_path
from gddlab.sampling import image_grid

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

__all__ = ["draw_images", "draw_metrics", "figure_html", "image_html", "save_figure"]

COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")
"""Okabe and Ito's, colour-blind safe."""


def save_figure(figure: Any, path: str | Path, *, dpi: int = 150) -> None:
    """Writes a PNG atomically and frees the figure."""
    import matplotlib.pyplot as plt

    with atomic_path(path) as tmp:
        figure.savefig(tmp, format="png", dpi=dpi)
    plt.close(figure)


def figure_html(figure: Any, alt: str, *, dpi: int = 130) -> str:
    """A figure as an <img> with the picture inside, and frees it."""
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    plt.close(figure)
    width = round(figure.get_size_inches()[0] * 88)
    return _img(buffer.getvalue(), alt, f"max-width:100%;width:{width}px")


def image_html(pixels: np.ndarray, alt: str, *, scale: int = 2) -> str:
    """uint8 (H, W, 3) as an <img>, enlarged without smoothing."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return _img(buffer.getvalue(), alt, f"width:{pixels.shape[1] * scale}px;image-rendering:pixelated")


def _img(png: bytes, alt: str, style: str) -> str:
    from html import escape

    data = base64.b64encode(png).decode()
    return f'<img alt="{escape(alt)}" style="{style}" src="data:image/png;base64,{data}">'


def draw_metrics(metrics: pd.DataFrame, names: Mapping[str, str], *, ax: Axes | None = None, ylabel: str = "") -> Axes:
    """Columns of a run's metrics over kimg.

    Args:
        metrics: A row a tick, with `kimg`.
        names: Column -> label.
        ylabel: What is drawn.
    """
    ax = _axes(ax)
    for color, (name, label) in zip(COLORS, names.items(), strict=False):
        if name in metrics:
            shown = metrics.dropna(subset=[name])
            ax.plot(shown["kimg"], shown[name], color=color, label=label, linewidth=1.4)
    ax.set(xlabel="real images seen, thousands", ylabel=ylabel)
    ax.legend(frameon=False, fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def draw_images(images: Tensor, *, columns: int = 8, ax: Axes | None = None, title: str = "") -> Axes:
    """A grid of images, float [-1, 1], (N, C, H, W)."""
    ax = _axes(ax)
    ax.imshow(image_grid(images, columns=columns), interpolation="nearest")
    ax.set_axis_off()
    ax.set_title(title, fontsize=9)
    return ax


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(5.2, 3.2), layout="constrained")[1]
