"""Heat maps with a row a layer: over noise levels, with a mask beside it, and over training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gddlab.errors import GddlabError
from gddlab.probing.plots.bands import GAP, POINTS, Mask, bands, beside, frozen_shares, frozen_strip
from gddlab.probing.plots.canvas import axes
from gddlab.probing.plots.scales import ColourScale, edges, plain
from gddlab.probing.plots.table import Rows, about, levels, rows_of, short_names, stat_label, wide

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from gddlab.probing.result import ProbeResult

__all__ = ["draw_course", "draw_heatmap"]

INCH_A_LAYER = 0.135
"""Height of a row; every layer has its name where rows are as high as this."""
CORRELATIONS = ("cosine", "cka")


def draw_heatmap(result: ProbeResult, stat: str, ax: Axes | None = None, *, mask: Mask | None = None) -> Axes:
    """One statistic, layers down, noise levels across (log scale), resolution and stage at the right.

    The colour scale is logarithmic where values span more than a factor of 30, and has two hues around 0 where they have
    both signs. Cells without a value are grey.

    Args:
        ax: Where to draw; None makes a figure that fits the number of layers.
        mask: A `FreezeMask`: adds a strip with the frozen share of each row's parameters.

    Raises:
        GddlabError: `stat` was not measured, or `mask` is for another network.
    """
    table = wide(result.frame, stat)
    rows = rows_of(result.frame, table.index)
    shares = None if mask is None else frozen_shares(mask, rows)
    ax = axes(ax, 8.0, max(2.5, INCH_A_LAYER * len(rows) + 1.3))
    ax.set_xscale("log")
    _grid(ax, result.frame, stat, table, rows, 10 ** edges(np.log10(levels(table))), shares)
    _columns(ax, table, "noise level σ")
    ax.set_title(f"{stat}: {about(result, stat)}", fontsize=9, pad=6 if mask is None else 20)
    return ax


def draw_course(frame: pd.DataFrame, stat: str, ax: Axes | None = None) -> Axes:
    """One statistic of a student over its training: layers down, thousands of images seen across.

    Args:
        frame: Frames of results at several moments, with their thousands of images in an additional column `kimg`.
        ax: Where to draw; None makes a figure that fits the number of layers.

    Raises:
        GddlabError: `stat` is not in the frame, the frame has no `kimg`, or more than one noise level or value a moment.
    """
    if "kimg" not in frame:
        raise GddlabError('the frame has no column "kimg": add the thousands of images at which each result was probed')
    part = frame[frame["stat"] == stat]
    if (sigmas := sorted(set(part["sigma"]), reverse=True))[1:]:
        shown = ", ".join(plain(s) for s in sigmas[:4])
        raise GddlabError(
            f"the frame has {len(sigmas)} noise levels ({shown}): keep one, frame[frame.sigma == {sigmas[0]:g}]"
        )
    if (twice := part[part.duplicated(["layer", "kimg"])]).size:
        raise GddlabError(
            f"the frame has layer {twice.iloc[0]['layer']!r} twice at kimg {twice.iloc[0]['kimg']:g}: keep one run"
        )
    table = wide(frame, stat, across="kimg")
    rows = rows_of(frame, table.index)
    ax = axes(ax, 8.0, max(2.5, INCH_A_LAYER * len(rows) + 1.3))
    _grid(ax, frame, stat, table, rows, edges(np.array(levels(table))), None)
    _columns(ax, table, "real images seen, thousands")
    images = int(part["n_images"].max())  # none where weights were measured, which no noise level has a part in
    ax.set_title(f"{stat} at σ = {plain(sigmas[0])}: n = {images}" if images else stat, fontsize=9)
    return ax


def _grid(
    ax: Axes,
    frame: pd.DataFrame,
    stat: str,
    table: pd.DataFrame,
    rows: Rows,
    borders: np.ndarray,
    shares: tuple[list[float], float] | None,
) -> None:
    """Cells, strips and colour bar; `borders` are the ends of the columns, in data."""
    from gddlab.probing.plots.labels import label_axis

    values = table.to_numpy()
    scale = ColourScale.of(values, correlation=stat in CORRELATIONS)
    ends = list(range(len(rows) + 1))
    mesh = ax.pcolormesh(borders, ends, scale.shown(values), norm=scale.norm, cmap=scale.colours)
    ax.set_xlim(borders[0], borders[-1])
    ax.set_ylim(len(rows), 0)
    label_axis(ax.yaxis, [e + 0.5 for e in ends[:-1]], short_names(rows.names), size=POINTS)
    start = GAP if shares is None else frozen_strip(ax, *shares) + GAP
    start = bands(ax, rows, ends, "right", start=start)
    height = min(1.0, 3.5 / (ax.get_window_extent().height / ax.figure.dpi))
    where = (start + 0.15, 1 - height, 0.17, height)
    bar = ax.inset_axes(where, transform=beside(ax, "right", along=ax.transAxes))
    scale.bar(mesh, stat_label(frame, stat, scale.note), cax=bar)


def _columns(ax: Axes, table: pd.DataFrame, label: str) -> None:
    """Labels of noise levels or moments, from the last down."""
    from gddlab.probing.plots.labels import label_axis

    at = levels(table)[::-1]
    names = [plain(x, 2 if table.columns.name == "sigma" else 6) for x in at]
    label_axis(ax.xaxis, at, names, size=7.5, rotation=90 if len(at) > 8 else 0)
    ax.set_xlabel(label, fontsize=9)
