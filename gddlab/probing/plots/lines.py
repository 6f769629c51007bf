"""One statistic as lines, over noise levels or along depth."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gddlab.errors import GddlabError, unknown
from gddlab.probing.plots.bands import LINES, MARKERS, hue
from gddlab.probing.plots.canvas import axes
from gddlab.probing.plots.depth import along_depth, depth_axes
from gddlab.probing.plots.scales import plain, sigma_axis, value_axis
from gddlab.probing.plots.table import (
    Rows,
    about,
    levels,
    nearest,
    pick,
    rows_of,
    short_names,
    stat_label,
    titled,
    wide,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from gddlab.probing.result import ProbeResult

__all__ = ["draw_lines"]

NAMED = 8
"""As many lines have a colour and a name each."""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
"""Okabe and Ito's, with a grey for the yellow that white paper swallows."""
LEVELS = 5
"""Noise levels along depth where `at` names none."""


def draw_lines(
    result: ProbeResult,
    stat: str,
    layers: str | Iterable[str] | None = None,
    ax: Axes | None = None,
    *,
    over: str = "sigma",
    at: float | Sequence[float] | None = None,
) -> Axes:
    """One statistic over noise levels, a line a layer; or along depth, a line a noise level.

    Up to eight layers have a colour each and a band of one standard error over images. More are thin, in the colours of
    resolutions, with the median of each stage and resolution in bold. Encoders are solid, decoders dashed.

    Args:
        layers: Names or globs; None takes all that have the statistic.
        ax: Where to draw; None makes a figure.
        over: What the x axis is, "sigma" or "depth".
        at: For "depth": noise levels; the measured ones next to them are drawn. None takes five at equal steps of the grid.

    Raises:
        GddlabError: Unknown statistic or layer, `over` is something else, or `at` is no noise level or not used.
    """
    if over not in ("sigma", "depth"):
        raise unknown("over", over, ("sigma", "depth"))
    if over == "sigma" and at is not None:
        raise GddlabError(f'at={at!r} chooses noise levels of over="depth": leave it away, or give over="depth"')
    table, sems = wide(result.frame, stat), wide(result.frame, stat, "sem")
    names = pick(table.index, layers)
    rows = rows_of(result.frame, names)
    table, sems = table.loc[names], sems.loc[names]
    if over == "depth":
        table = table[_chosen(levels(table), at)]
        ax = depth_axes(ax, len(rows))
        _over_depth(ax, table, sems, rows)
    else:
        ax = axes(ax, 7.2, 4.0)
        (_few if len(rows) <= NAMED else _many)(ax, table, sems, rows)
    ax.set_ylabel(stat_label(result.frame, stat, value_axis(ax, table.to_numpy())), fontsize=9)
    handles, labels = ax.get_legend_handles_labels()
    if over == "depth":  # drawn from the lowest level up, named from the top down, as they lie
        handles, labels = handles[::-1], labels[::-1]
    ax.legend(handles, labels, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8)
    title = titled(f"{stat}: {about(result, stat)}", table.to_numpy())
    if over == "depth":
        return along_depth(ax, rows, title)
    sigma_axis(ax, levels(table))
    ax.set_title(title, fontsize=9)
    return ax


def _few(ax: Axes, table: pd.DataFrame, sems: pd.DataFrame, rows: Rows) -> None:
    """A colour and a name a layer."""
    sigmas = np.array(levels(table))
    for i, (name, stage) in enumerate(zip(short_names(rows.names), rows.stages, strict=True)):
        y, e = table.iloc[i].to_numpy(), sems.iloc[i].to_numpy()
        ax.plot(sigmas, y, label=name, linewidth=1.5, **_look(COLOURS[i], stage))
        ax.fill_between(sigmas, y - e, y + e, color=COLOURS[i], alpha=0.2, linewidth=0)


def _many(ax: Axes, table: pd.DataFrame, sems: pd.DataFrame, rows: Rows) -> None:
    """Thin lines, and the median of each stage and resolution."""
    sigmas = np.array(levels(table))
    for i, (rank, stage) in enumerate(zip(rows.ranks, rows.stages, strict=True)):
        ax.plot(sigmas, table.iloc[i], LINES.get(stage, "-"), color=hue(rank), linewidth=0.6, alpha=0.4)
    kinds: dict[str, list[int]] = {}
    for g in rows.groups():
        kinds.setdefault(g.label, []).extend(range(g.start, g.stop))
    for label, members in kinds.items():
        median = table.iloc[members].median().to_numpy()
        text = f"{label}: median of {len(members)}" if label else f"median of {len(members)}"
        look = _look(hue(rows.ranks[members[0]]), rows.stages[members[0]])
        ax.plot(sigmas, median, linewidth=2.6, color="white", zorder=3)
        ax.plot(sigmas, median, linewidth=1.8, label=text, zorder=3, **look)


def _over_depth(ax: Axes, table: pd.DataFrame, sems: pd.DataFrame, rows: Rows) -> None:
    import matplotlib.pyplot as plt

    x, _ = rows.positions()
    shades = plt.get_cmap("cividis")(np.linspace(0, 0.85, table.shape[1]))  # its last shades are lost on white
    for i, (sigma, shade) in enumerate(zip(levels(table), shades, strict=True)):
        y, e = table[sigma].to_numpy(), sems[sigma].to_numpy()
        marker = "osD^vP*X"[i % 8]
        ax.plot(x, y, color=shade, linewidth=1.1, marker=marker, markersize=3.5, label=f"σ = {plain(sigma)}")
        ax.fill_between(x, y - e, y + e, color=shade, alpha=0.2, linewidth=0)


def _chosen(measured: list[float], at: float | Sequence[float] | None) -> list[float]:
    """Noise levels to draw, ascending."""
    if at is None:
        steps = np.linspace(0, len(measured) - 1, min(LEVELS, len(measured)))
        return [measured[i] for i in sorted({round(s) for s in steps})]
    wanted = list(at) if isinstance(at, Iterable) and not isinstance(at, str) else [at]
    if not wanted:
        raise GddlabError("at is an empty list: give noise levels, or leave it away")
    return sorted({nearest(measured, a) for a in wanted})


def _look(colour: str, stage: str) -> dict[str, Any]:
    return {
        "color": colour,
        "linestyle": LINES.get(stage, "-"),
        "marker": MARKERS.get(stage, "D"),
        "markersize": 3.5,
    }
