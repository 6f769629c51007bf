"""Pictures with the layers along depth: one noise level, and teacher against student."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from gddlab.errors import GddlabError
from gddlab.probing.plots.bands import MARKERS, POINTS, bands, hue
from gddlab.probing.plots.canvas import axes
from gddlab.probing.plots.scales import Spread, edges, plain, value_axis
from gddlab.probing.plots.table import Rows, about, levels, nearest, rows_of, short_names, stat_label, titled, wide

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from gddlab.probing.result import ProbeResult

__all__ = ["along_depth", "depth_axes", "draw_pair", "draw_stem"]

LOOKS: dict[str, dict[str, Any]] = {
    "teacher": {"fmt": "o", "color": "black", "markerfacecolor": "white"},
    "student": {"fmt": "D", "color": "#D55E00"},
}


def draw_stem(result: ProbeResult, stat: str, at: float = 80.0, ax: Axes | None = None) -> Axes:
    """One statistic at one noise level along depth, in the colours of resolutions, with standard errors over images.

    Args:
        at: Noise level; the measured one next to it is drawn, and named in the title.
        ax: Where to draw; None makes a figure that fits the number of layers.

    Raises:
        GddlabError: `stat` was not measured, or `at` is no noise level.
    """
    table = wide(result.frame, stat)
    sigma = nearest(levels(table), at)
    values, errors = table[sigma].to_numpy(), wide(result.frame, stat, "sem")[sigma].to_numpy()
    rows = rows_of(result.frame, table.index)
    ax = depth_axes(ax, len(rows))
    x, _ = rows.positions()
    spread = Spread.of(values)
    floor = spread.low / 1.5 if spread.kind == "log" else 0.0
    for g in rows.groups():
        part, colour = slice(g.start, g.stop), hue(rows.ranks[g.start])
        ax.vlines(x[part], floor, values[part], color=colour, linewidth=1.2, alpha=0.55)
        style: dict[str, Any] = {"color": colour, "markersize": 4.5, "elinewidth": 1, "capsize": 2}
        ax.errorbar(x[part], values[part], errors[part], fmt=MARKERS.get(g.stage, "D"), **style)
    ax.set_ylabel(stat_label(result.frame, stat, value_axis(ax, values)), fontsize=9)
    if spread.kind == "log":
        ax.set_ylim(bottom=floor)
    title = titled(f"{stat} at σ = {plain(sigma)}: {about(result, stat)}", values)
    return along_depth(ax, rows, title, coloured=True)


def draw_pair(
    teacher: ProbeResult, student: ProbeResult, stat: str, at: float | None = None, ax: Axes | None = None
) -> Axes:
    """A student's values beside its teacher's along depth, and the range of the teacher's over all its noise levels.

    Args:
        at: Noise level of both; each shows its measured one next to it. None takes the student's largest.
        ax: Where to draw; None makes a figure that fits the number of layers.

    Raises:
        GddlabError: `stat` was not measured in both, the layers differ, or `at` is no noise level.
    """
    sides = {"teacher": teacher, "student": student}
    tables = {who: wide(r.frame, stat) for who, r in sides.items()}
    for who, other in (("teacher", "student"), ("student", "teacher")):
        if alone := [n for n in tables[who].index if n not in tables[other].index]:
            count = f" ({len(alone)} such layers)" if len(alone) > 1 else ""
            raise GddlabError(
                f"the {who} has {stat} of {alone[0]!r}, the {other} has not{count}: probe both with the same layers="
            )
    names = tables["teacher"].index
    wanted = levels(tables["student"])[-1] if at is None else at
    sigmas = {who: nearest(levels(t), wanted) for who, t in tables.items()}
    rows = rows_of(teacher.frame, names)
    x, _ = rows.positions()
    ax = depth_axes(ax, len(rows))
    low, high = tables["teacher"].min(axis=1).to_numpy(), tables["teacher"].max(axis=1).to_numpy()
    ends = levels(tables["teacher"])
    label = f"teacher, σ {plain(ends[0])} to {plain(ends[-1])}"
    ax.use_sticky_edges = False  # the bars end above the axis
    width = 0.6 * min(np.diff(x).min(initial=1.0), 1.0)
    ax.bar(x, high - low, width, bottom=low, color="0.85", zorder=1, label=label)
    values: list[np.ndarray] = []
    for who, r in sides.items():
        values.append(tables[who].loc[names, sigmas[who]].to_numpy())
        sem = wide(r.frame, stat, "sem").loc[names, sigmas[who]]
        label = f"{who}, σ = {plain(sigmas[who])}"
        ax.errorbar(x, values[-1], sem, markersize=4, elinewidth=1, zorder=3, label=label, **LOOKS[who])
    ax.vlines(x, values[0], values[1], color=LOOKS["student"]["color"], linewidth=1, alpha=0.7, zorder=2)
    note = value_axis(ax, np.concatenate([*values, low, high]))
    ax.set_ylabel(stat_label(teacher.frame, stat, note), fontsize=9)
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8)
    title = titled(
        f"{stat}: teacher ({about(teacher, stat)}), student ({about(student, stat)})", np.stack(values, axis=1)
    )
    return along_depth(ax, rows, title)


def depth_axes(ax: Axes | None, n: int) -> Axes:
    """`ax`, or an axes wide enough for `n` layers."""
    return axes(ax, min(13.0, max(5.5, 0.12 * n + 2.2)), 4.2)


def along_depth(ax: Axes, rows: Rows, title: str, *, coloured: bool = False) -> Axes:
    """Ends a picture with the layers on the x axis: bands on top, names where there is room, else depth."""
    from gddlab.probing.plots.labels import label_axis

    x, label = rows.positions()
    borders = edges(x)
    ax.set_xlim(borders[0], borders[-1])
    height = bands(ax, rows, borders.tolist(), "top", coloured=coloured)
    ax.set_title(title, fontsize=9, pad=72 * height + 5)
    ax.set_xlabel(label, fontsize=9)
    ax.tick_params(axis="x", labelsize=8)
    ax.figure.canvas.figure.draw_without_rendering()  # now the layout says how much room there is
    points = ax.get_window_extent().width / ax.figure.dpi * 72 / (borders[-1] - borders[0])
    if np.diff(x).min(initial=math.inf) * points >= 1.1 * POINTS:
        label_axis(ax.xaxis, x, short_names(rows.names), size=POINTS, rotation=90)
        ax.set_xlabel("")
    return ax
