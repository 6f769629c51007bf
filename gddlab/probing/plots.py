"""Pictures of a probe: layer by noise level, noise level by noise level."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from gddlab.errors import unknown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from gddlab.probing.result import ProbeResult

__all__ = ["draw_heatmap", "draw_similarity"]

INCH_A_LAYER = 0.135
POINTS = 6.5
"""Size of layer labels; every layer has its label where rows are as high as this."""


def _edges(sigmas: np.ndarray) -> np.ndarray:
    """Borders of cells around noise levels, half way on the log scale."""
    logs = np.log10(sigmas)
    if len(logs) == 1:
        return 10 ** np.array([logs[0] - 0.5, logs[0] + 0.5])
    mid = (logs[1:] + logs[:-1]) / 2
    return 10 ** np.concatenate([[2 * logs[0] - mid[0]], mid, [2 * logs[-1] - mid[-1]]])


def _apart(sigmas: np.ndarray, width: float) -> list[float]:
    """Noise levels, from the largest down, whose labels do not overlap on a log axis of `width` points."""
    span = np.ptp(np.log10(_edges(sigmas)))
    out: list[float] = []
    for s in sorted(sigmas.tolist(), reverse=True):
        if not out or np.log10(out[-1] / s) / span * width >= POINTS + 1:
            out.append(s)
    return out[::-1]


def _norm(values: np.ndarray, stat: str) -> tuple[Any, str]:
    """Colour scale: logarithmic where positive values span more than a factor of 30."""
    from matplotlib.colors import LogNorm, Normalize

    finite = values[np.isfinite(values)]
    if finite.size == 0:
        return Normalize(0, 1), ""
    low, high = float(finite.min()), float(finite.max())
    if stat == "cosine":
        return Normalize(min(0.0, low), 1), ""
    if low > 0 and high > 30 * low:
        return LogNorm(low, high), ", log scale"
    return Normalize(low, high if high > low else low + 1), ""


def _common_prefix(names: list[str]) -> str:
    """Whole path components that all names begin with."""
    parts = [n.split(".")[:-1] for n in names]
    shared = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False))
    return "".join(column[0] + "." for column in shared)


def draw_heatmap(result: ProbeResult, stat: str, ax: Axes | None = None) -> Axes:
    import matplotlib.pyplot as plt

    table = result.pivot(stat).iloc[:, ::-1]  # noise levels ascend to the right
    values = table.to_numpy(dtype=float)
    sigmas = table.columns.to_numpy(dtype=float)
    names = list(table.index)
    if ax is None:
        height = max(2.5, INCH_A_LAYER * len(names) + 1.3)
        _, ax = plt.subplots(figsize=(8.0, height), layout="constrained")
    figure = ax.figure
    norm, scale = _norm(values, stat)
    colours = plt.get_cmap("cividis").with_extremes(bad="0.8")
    mesh = ax.pcolormesh(
        _edges(sigmas), np.arange(len(names) + 1), np.ma.masked_invalid(values), norm=norm, cmap=colours
    )
    ax.set_xscale("log")
    ax.set_ylim(len(names), 0)
    ax.minorticks_off()
    ax.set_xlabel("noise level σ")
    ax.tick_params(length=2)
    _label(ax, names, sigmas)
    _bands(result, names, ax)
    unit = result.frame.loc[result.frame["stat"] == stat, "unit"].iloc[0]
    bar = figure.colorbar(mesh, ax=ax, pad=0.03, shrink=min(1.0, 30 / len(names)), anchor=(0.0, 1.0))
    bar.set_label(f"{stat}{scale}" if unit == stat else f"{stat} ({unit}{scale})")
    title = f"{stat}, {result.meta['n_images']} images, {result.meta['states']}"
    ax.set_title(title if not np.ma.masked_invalid(values).mask.any() else title + "; grey: undefined", fontsize=9)
    figure.canvas.figure.draw_without_rendering()  # now the layout says how much room there is for labels
    _label(ax, names, sigmas)
    return ax


def _label(ax: Axes, names: list[str], sigmas: np.ndarray) -> None:
    """As many layers and noise levels as have room."""
    box, inch = ax.get_window_extent(), ax.figure.dpi
    ticks = _apart(sigmas, box.width / inch * 72)
    ax.set_xticks(ticks, [f"{s:.2g}" for s in ticks], rotation=90, fontsize=7)
    every = max(1, math.ceil(0.9 * POINTS * len(names) / max(box.height / inch * 72, 1)))
    prefix = _common_prefix(names)
    rows = np.arange(0, len(names), every)
    ax.set_yticks(rows + 0.5, [names[i][len(prefix) :] for i in rows], fontsize=POINTS)


def _bands(result: ProbeResult, names: list[str], ax: Axes) -> None:
    """Stage and resolution at the right edge, with a line where they change."""
    from matplotlib.transforms import ScaledTranslation

    where = result.frame.drop_duplicates("layer").set_index("layer").loc[names]
    keys = [(s, int(r) if r > 0 else None) for s, r in zip(where["stage"], where["resolution"].fillna(0), strict=True)]
    start = 0
    for i, (key, group) in enumerate(itertools.groupby(keys)):
        stop = start + len(list(group))
        if start:
            ax.axhline(start, color="white", linewidth=1.2)
        if key[1] is not None:
            at = ax.get_yaxis_transform() + ScaledTranslation(5 / 72, 0, ax.figure.dpi_scale_trans)
            line: dict[str, Any] = {"color": "0.15" if i % 2 else "0.55", "linewidth": 3, "solid_capstyle": "butt"}
            ax.plot([1, 1], [start + 0.2, stop - 0.2], transform=at, clip_on=False, **line)
            ax.text(1, (start + stop) / 2, f"  {key[0]} {key[1]}", transform=at, va="center", fontsize=7)
        start = stop


def draw_similarity(result: ProbeResult, layer: str, ax: Axes | None = None) -> Axes:
    import matplotlib.pyplot as plt

    if layer not in result.gram:
        raise unknown("layer with a Gram matrix", layer, result.gram)
    if ax is None:
        _, ax = plt.subplots(figsize=(4.6, 4.0), layout="constrained")
    matrix = result.gram[layer][::-1, ::-1]
    labels = [f"{s:.2g}" for s in result.sigmas[::-1]]
    image = ax.imshow(
        matrix, vmin=min(0.0, float(np.nanmin(matrix, initial=0.0))), vmax=1, cmap="cividis", origin="lower"
    )
    ax.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7)
    ax.set_yticks(range(len(labels)), labels, fontsize=7)
    ax.set_xlabel("noise level σ")
    ax.set_ylabel("noise level σ")
    ax.set_title(layer, fontsize=8)
    ax.figure.colorbar(image, ax=ax, label="cosine")
    return ax
